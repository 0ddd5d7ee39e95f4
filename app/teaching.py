"""Concepts being taught, one after the other, in a thread of their own: pages come and go, the work goes on.

A training takes a turn in the session's line for every step, so others draw in between. It learns at its own words
only, so that what they draw is what they would have drawn without it; an ungated training keeps the pipeline.
"""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

from PIL import Image

import fusion
from app.session import Session, in_a_sentence, safe_name

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
MOST_PICTURES = 100
PREVIEWS = 5  # how often a training shows what it has learned
THUMBNAIL = 256  # pixels, longest side, of the picture kept beside a concept
REFERENCES = 4  # pictures shown beside the results at the end
# What the page itself decides; a path typed by a visitor would name any folder of this machine.
OURS = {
    *("token", "noun", "library", "pretrained_model_name_or_path", "revision", "variant", "report_to"),
    *("instance_data_dir", "class_data_dir", "output_dir", "output_name"),
    *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
}


class Lesson:
    """One concept to be taught, under way, or done. Written by one thread, read by many."""

    def __init__(self, config: fusion.TrainingConfig, references: list[Image.Image], pictures: int) -> None:
        self.config, self.references, self.token, self.pictures = config, references, config.token, pictures
        self.step, self.total, self.seconds = 0, config.max_train_steps, 0.0
        self.losses: list[float] = []
        self.previews: list[tuple[Image.Image, str]] = []
        self.state, self.error = "waiting", ""  # preparing, learning, then learned, stopped or failed
        self.saved: Path | None = None

    def note(self, last: fusion.TrainStep) -> None:
        self.state, self.step, self.total, self.seconds = "learning", last.step, last.total, last.seconds
        self.losses.append(last.loss)
        self.previews += [(image, f"step {last.step}") for image in last.images]


def lesson(
    session: Session,
    pictures: Sequence[Mapping[str, Any]],
    token: str,
    noun: str,
    preset: str = "standard",
    settings: Mapping[str, str] | None = None,
) -> Lesson:
    """What is to be learned, from uploads with captions. `token` may lack its angle brackets.

    `settings` are further ones of TrainingConfig, as text. Raises FusionError for what cannot be used.
    """
    token = f"<{token.strip().strip('<>').lower()}>"
    if not noun.strip():
        raise fusion.FusionError("Say what it is in one ordinary word, like dog: learning starts from there.")
    usable = [picture for picture in pictures or () if picture.get("crop")]
    if not 0 < len(usable) <= MOST_PICTURES:
        count = f"{len(usable)} pictures" if usable else "No pictures"
        raise fusion.FusionError(f"{count} cannot be learned from; four to eight are good, {MOST_PICTURES} the limit.")
    known = [concept.token for entry in session.entries().values() for concept in entry.info.concepts]
    if token in [*known, *(session.teaching.tokens() if session.teaching else ())]:
        raise fusion.FusionError(f"{token} is in the library already, or being taught; give this one another name.")
    sources = [session.upload(picture.get("id", "")) for picture in usable]
    folder = Path(tempfile.mkdtemp(dir=session.folder))
    try:
        for number, (source, picture) in enumerate(zip(sources, usable, strict=True), start=1):
            copied = shutil.copyfile(source, folder / f"{number:02d}{source.suffix}")
            if caption := str(picture.get("caption") or "").strip():
                named = caption if any(word in caption for word in (token, "{token}")) else f"{{token}}, {caption}"
                copied.with_suffix(".txt").write_text(named, encoding="utf-8")
        config = _config(session, folder, token, noun.strip().lower(), preset, settings or {})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    for source in sources:
        source.unlink(missing_ok=True)
    resolution = config.resolution or session.side()
    shown = fusion.examine(sorted(p for p in folder.iterdir() if p.suffix != ".txt")[:REFERENCES], resolution)
    return Lesson(config, [look.crop for look in shown.looks if look.crop], len(usable))


def _config(
    session: Session, folder: Path, token: str, noun: str, preset: str, settings: Mapping[str, str]
) -> fusion.TrainingConfig:
    values = fusion.preset(preset.lower(), fusion.base_defaults(session.pipe, "training"))
    values |= {name: parsed(name, text) for name, text in settings.items() if name not in OURS}
    often = max(1, values["max_train_steps"] // PREVIEWS) if isinstance(values["max_train_steps"], int) else 1
    previews = {"validation_prompt": "a {token}", "validation_steps": often, "num_validation_images": 1}
    places = {"instance_data_dir": folder, "output_dir": folder, "library": session.library, "checkpointing_steps": 0}
    return fusion.TrainingConfig.model_validate({**previews, **values, **places, "token": token, "noun": noun})


def parsed(name: str, text: str) -> Any:
    """A setting from what was typed; what is not of its kind is left for TrainingConfig to refuse."""
    field = fusion.TrainingConfig.model_fields.get(name)
    kinds = {*get_args(field.annotation), field.annotation} if field else set[Any]()
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if any(kind == list[str] for kind in kinds) and "\n" in text:
        return [line.strip() for line in text.splitlines() if line.strip()]
    if list[str] in kinds and str not in kinds:
        return text.split()
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


class Teaching:
    """The lessons of a session, taught in order. Set `stop` to end the present one, which keeps what it learned."""

    def __init__(self, session: Session) -> None:
        self.session, self.lessons = session, list[Lesson]()
        self.stop, self.going, self.changed = threading.Event(), threading.Event(), threading.Event()
        self.going.set()  # cleared while paused
        self._lock, self._thread = threading.Lock(), None

    @property
    def running(self) -> bool:
        return any(own.state in ("waiting", "preparing", "learning") for own in self.lessons)

    @property
    def now(self) -> Lesson | None:
        """The lesson to look at: the one under way, or else the latest."""
        active = (own for own in self.lessons if own.state in ("preparing", "learning"))
        over = [own for own in self.lessons if own.state != "waiting"]
        return next(active, over[-1] if over else None)

    @property
    def token(self) -> str:
        return self.now.token if self.now else ""

    def tokens(self) -> list[str]:
        """What is being taught, or will be."""
        return [own.token for own in self.lessons if own.state in ("waiting", "preparing", "learning")]

    def add(self, new: Lesson) -> None:
        with self._lock:
            self.lessons = [*self.lessons[-20:], new]
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="teaching", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                own = next((own for own in self.lessons if own.state == "waiting"), None)
                if own is None:
                    self._thread = None
                    return
                own.state = "preparing"
            self.stop.clear()
            try:
                self._learn(own)
                own.state = "stopped" if self.stop.is_set() else "learned"
            except Exception as error:
                own.state, own.error = "failed", in_a_sentence(error)
            finally:
                shutil.rmtree(own.config.instance_data_dir, ignore_errors=True)
                self.changed.set()

    def _learn(self, own: Lesson) -> None:
        line, clause, alone = self.session.line, f"{own.token} is being taught", own.config.gating == "none"
        with line.turn(clause) if alone else nullcontext():
            last, steps = None, fusion.train(self.session.pipe, own.config)
            try:
                while not self.stop.is_set() and (last is None or last.step < last.total):
                    with nullcontext() if alone else line.turn(clause):
                        last = next(steps)
                    own.note(last)
                    while not self.going.wait(0.2) and not self.stop.is_set():
                        pass
                if last is not None:  # saved while its slice is still reserved
                    own.saved = self._keep(own, last)
            finally:
                with nullcontext() if alone else line.turn(clause):
                    steps.close()

    def _keep(self, own: Lesson, last: fusion.TrainStep) -> Path:
        """Into the library, with the latest preview beside it: other tools too show name.png for name.safetensors."""
        path = fusion.Library(self.session.library).place(safe_name(own.token))
        fusion.save(last.adapter, path, dtype=own.config.save_precision)
        if own.previews:
            thumbnail = own.previews[-1][0].copy()
            thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
            thumbnail.save(path.with_suffix(".png"))
        return path
