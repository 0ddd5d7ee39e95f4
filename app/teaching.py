"""One concept being taught, in a thread of its own: pages come and go, the work goes on until it is done or stopped."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import shutil
import tempfile
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from PIL import Image

import fusion
from app.session import Session, in_a_sentence, safe_name

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
MOST_PICTURES = 100
PREVIEWS = 5  # how often a training shows what it has learned
THUMBNAIL = 256  # pixels, longest side, of the picture kept beside a concept


def lesson(
    session: Session,
    pictures: Sequence[tuple[str, str | None]],
    token: str,
    noun: str,
    steps: int,
    kind: str,
    seed: int,
) -> fusion.TrainingConfig:
    """What is to be learned, from pictures with captions or None. `token` may lack its angle brackets.

    The pictures are copied under harmless names: nobody's path is trusted. Raises FusionError for what cannot be used.
    """
    token = f"<{token.strip().strip('<>').lower()}>"
    if not noun.strip():
        raise fusion.FusionError("Say what it is in one ordinary word, like dog: learning starts from there.")
    if not 0 < len(pictures) <= MOST_PICTURES:
        count = f"{len(pictures)} pictures" if pictures else "No pictures"
        raise fusion.FusionError(f"{count} cannot be learned from; four to eight are good, {MOST_PICTURES} the limit.")
    if unreadable := [Path(path).name for path, _ in pictures if Path(path).suffix.lower() not in ENDINGS]:
        raise fusion.FusionError(f"'{unreadable[0]}' is no picture we can read; use {', '.join(ENDINGS)}.")
    if token in (concept.token for entry in session.entries().values() for concept in entry.info.concepts):
        raise fusion.FusionError(f"The library already has {token}; give this one another name.")
    folder = Path(tempfile.mkdtemp(dir=session.folder))
    for number, (source, caption) in enumerate(pictures, start=1):
        name = f"{number:02d}-{safe_name(Path(source).stem)}{Path(source).suffix.lower()}"
        copied = shutil.copyfile(source, folder / name)
        if caption and caption.strip():
            copied.with_suffix(".txt").write_text(caption.strip(), encoding="utf-8")
    settings = {
        "token": token,
        "noun": noun.strip().lower(),
        "adapter_type": kind,
        "max_train_steps": steps,
        "seed": seed,
    }
    places = {"instance_data_dir": folder, "output_dir": folder, "library": session.library, "checkpointing_steps": 0}
    often = max(1, steps // PREVIEWS)
    previews = {"validation_prompt": "a {token}", "validation_steps": often, "num_validation_images": 1}
    return fusion.TrainingConfig.model_validate(settings | places | previews)


class Teaching:
    """A running or finished training, as a page sees it. Written by one thread, read by many.

    Set `stop` to end it after the present step; what was learned so far is kept. `ended` is set when it has ended.
    """

    def __init__(self, session: Session, config: fusion.TrainingConfig) -> None:
        """Begin to teach a `lesson`, whose pictures are deleted at the end. Raises FusionError when busy."""
        self._turn = session.turn(f"{config.token} is being taught")
        self._turn.__enter__()
        self.session, self.config = session, config
        self.step, self.total, self.seconds = 0, config.max_train_steps, 0.0
        self.losses: list[float] = []
        self.previews: list[tuple[Image.Image, str]] = []
        self.state, self.error = "preparing", ""  # then "learning", and at last "learned", "stopped" or "failed"
        self.saved: Path | None = None
        self.stop, self.ended = threading.Event(), threading.Event()
        session.teaching = self
        threading.Thread(target=self._run, name="teaching", daemon=True).start()

    @property
    def running(self) -> bool:
        return not self.ended.is_set()

    def _run(self) -> None:
        try:
            self._learn()
            self.state = "stopped" if self.stop.is_set() else "learned"
        except Exception as error:
            self.state, self.error = "failed", in_a_sentence(error)
        finally:
            shutil.rmtree(self.config.instance_data_dir, ignore_errors=True)
            self._turn.__exit__(None, None, None)
            self.ended.set()

    def _learn(self) -> None:
        last, pipe = None, self.session.pipe  # opened before anything else imports diffusers
        with closing(fusion.train(pipe, self.config)) as steps:
            for last in steps:
                self.state, self.step, self.total, self.seconds = "learning", last.step, last.total, last.seconds
                self.losses.append(last.loss)
                self.previews += [(image, f"step {last.step}") for image in last.images]
                if self.stop.is_set():
                    break
            if last is not None:  # saved while its slice is still reserved
                self.saved = self._keep(last)

    def _keep(self, last: fusion.TrainStep) -> Path:
        """Into the library, with the latest preview beside it: other tools too show name.png for name.safetensors."""
        name = safe_name(self.config.token)
        names = (f"{name}{end}.safetensors" for end in ("", *(f"-{i}" for i in range(2, 1000))))
        path = next(path for path in map(self.session.library.joinpath, names) if not path.exists())
        fusion.save(last.adapter, path)
        if self.previews:
            thumbnail = self.previews[-1][0].copy()
            thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
            thumbnail.save(path.with_suffix(".png"))
        return path
