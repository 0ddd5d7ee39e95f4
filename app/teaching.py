"""One concept being taught, in a thread of its own: pages come and go, the work goes on until it is done or stopped."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import logging
import shutil
import tempfile
import threading
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from PIL import Image

import fusion
from app.session import Session, safe_name

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
MOST_PICTURES = 100
PREVIEWS = 5  # how often a training shows what it has learned
THUMBNAIL = 256  # pixels, longest side, of the picture kept beside a concept

logger = logging.getLogger(__name__)


class Lesson(NamedTuple):
    """What is to be learned. `token` may be written with or without its angle brackets."""

    token: str
    noun: str
    pictures: tuple[tuple[Path, str], ...]  # each with a caption, or "" for none
    steps: int
    adapter_type: str = "additive"
    seed: int = 0


class Teaching:
    """A running or finished training, as a page sees it. Written by one thread, read by many."""

    def __init__(self, session: Session, lesson: Lesson) -> None:
        """Begin to teach. Raises FusionError at once for what can be told at once; the rest ends up in `error`."""
        self.session, self.lesson = session, lesson
        self.concept = fusion.Concept(f"<{lesson.token.strip().strip('<>').lower()}>", lesson.noun.strip().lower())
        self.step, self.total, self.seconds = 0, lesson.steps, 0.0
        self.losses: list[float] = []
        self.previews: list[tuple[Image.Image, str]] = []
        self.state = "preparing"  # then "learning", and at last "learned", "stopped" or "failed"
        self.error = ""
        self.saved: Path | None = None
        self._stop, self._ended = threading.Event(), threading.Event()
        self._check()
        session.take_turn(f"{self.concept.token} is being taught")
        session.teaching = self
        threading.Thread(target=self._run, name="teaching", daemon=True).start()

    @property
    def running(self) -> bool:
        return not self._ended.is_set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """Ask it to end after the present step; what was learned so far is kept."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it ended within that time."""
        return self._ended.wait(seconds)

    def _check(self) -> None:
        lesson, token = self.lesson, self.concept.token
        if not lesson.noun.strip():
            raise fusion.FusionError("Say what it is in one ordinary word, like dog: learning starts from there.")
        if not 0 < len(lesson.pictures) <= MOST_PICTURES:
            raise fusion.FusionError(
                f"{len(lesson.pictures)} pictures are no good: four to eight are enough, {MOST_PICTURES} the most."
            )
        if token in (c.token for entry in self.session.entries().values() for c in entry.info.concepts):
            raise fusion.FusionError(f"The library already has {token}; give this one another name.")

    def _run(self) -> None:
        try:
            with tempfile.TemporaryDirectory(dir=self.session.folder) as folder:
                self._learn(Path(folder))
            self.state = "stopped" if self.stopping else "learned"
        except fusion.FusionError as error:
            self.state, self.error = "failed", str(error)
        except Exception as error:
            logger.exception("Teaching %s failed", self.concept.token)
            self.state, self.error = "failed", f"Something unexpected happened ({type(error).__name__})."
        finally:
            self.session.end_turn()
            self._ended.set()

    def _learn(self, folder: Path) -> None:
        last, pipe = None, self.session.pipe  # opened before anything else imports diffusers
        with closing(fusion.train(pipe, self._config(folder))) as steps:
            for last in steps:
                self.state, self.step, self.total, self.seconds = "learning", last.step, last.total, last.seconds
                self.losses.append(last.loss)
                self.previews += [(image, f"step {last.step}") for image in last.images]
                if self.stopping:
                    break
            if last is not None:  # saved while its slice is still reserved
                self.saved = self._keep(last)

    def _config(self, folder: Path) -> fusion.TrainingConfig:
        """Pictures are copied under harmless names: nobody's path is trusted."""
        (folder / "pictures").mkdir()
        for number, (source, caption) in enumerate(self.lesson.pictures, start=1):
            if source.suffix.lower() not in ENDINGS:
                raise fusion.FusionError(f"'{source.name}' is no picture we can read; use {', '.join(ENDINGS)}.")
            name = f"{number:02d}-{safe_name(source.stem)}{source.suffix.lower()}"
            copied = shutil.copyfile(source, folder / "pictures" / name)
            if caption.strip():
                copied.with_suffix(".txt").write_text(caption.strip(), encoding="utf-8")
        return fusion.TrainingConfig(
            token=self.concept.token,
            noun=self.concept.noun,
            instance_data_dir=folder / "pictures",
            output_dir=folder / "out",
            library=self.session.library,
            adapter_type=self.lesson.adapter_type,
            max_train_steps=self.lesson.steps,
            validation_prompt="a {token}",
            validation_steps=max(1, self.lesson.steps // PREVIEWS),
            num_validation_images=1,
            checkpointing_steps=0,
            seed=self.lesson.seed,
        )

    def _keep(self, last: fusion.TrainStep) -> Path:
        """Into the library, with the latest preview beside it: other tools too show name.png for name.safetensors."""
        name = safe_name(self.concept.token)
        names = (f"{name}{end}.safetensors" for end in ("", *(f"-{i}" for i in range(2, 1000))))
        path = next(path for path in map(self.session.library.joinpath, names) if not path.exists())
        fusion.save(last.adapter, path)
        if self.previews:
            thumbnail = self.previews[-1][0].copy()
            thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
            thumbnail.save(path.with_suffix(".png"))
        return path
