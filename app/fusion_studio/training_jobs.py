"""Concepts being taught, one after the other, in a thread of their own: pages come and go, the work goes on.

A training takes a turn in the session's line for every step, so others draw in between. It learns at its own words
only, so that what they draw is what they would have drawn without it; an ungated training keeps the pipeline.
"""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from PIL import Image

import fusion
from fusion_studio.session import Session, error_sentence, safe_name, tokens_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PICTURES = 100
PREVIEWS = 5  # how often a training shows what it has learned
CHECKPOINTS = 20  # how often a training is put on disk, and at least every MAX_LOST_STEPS steps
MAX_LOST_STEPS = 50
THUMBNAIL = 256  # pixels, longest side, of the picture kept beside a concept
REFERENCES = 4  # pictures shown beside the results at the end
# What the page itself decides; a path typed by a visitor would name any folder of this machine.
PAGE_SETTINGS = {
    *("token", "noun", "library", "pretrained_model_name_or_path", "revision", "variant", "report_to"),
    *("instance_data_dir", "class_data_dir", "output_dir", "output_name"),
    *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
}


class TrainingJob:
    """One concept to be taught, under way, or done. Written by one thread, read by many."""

    def __init__(self, config: fusion.TrainingConfig, place: Any, references: list[Image.Image], pictures: int) -> None:
        self.config, self.references, self.token, self.pictures = config, references, config.token, pictures
        self.place = place  # its TrainingFolder in the library, taken
        self.sofar = place.folder / f"{config.name}.safetensors"  # the adapter at the latest checkpoint
        self.begun, self.step, self.total, self.seconds = 0, 0, config.max_train_steps, 0.0
        self.losses: list[float] = []
        self.previews: list[tuple[Image.Image, str]] = []
        self.state, self.error = "waiting", ""  # preparing, learning, then learned, stopped or failed
        self.earlier: Path | None = None  # what the library has of it since it was stopped
        self.saved: Path | None = None

    def note(self, last: fusion.TrainStep) -> None:
        self.state, self.step, self.total, self.seconds = "learning", last.step, last.total, last.seconds
        self.losses.append(last.loss)
        self.previews += [(image, f"step {last.step}") for image in last.images]


def new_job(
    session: Session, pictures: Sequence[Mapping[str, Any]], token: str, noun: str, preset: str = "standard",
    settings: Mapping[str, str] | None = None,
) -> TrainingJob:  # fmt: skip
    """What is to be learned, from uploads with captions. `token` may lack its angle brackets.

    `settings` are further ones of TrainingConfig, as text. Raises FusionError for what cannot be used.
    """
    token = f"<{token.strip().strip('<>').lower()}>"
    if not noun.strip():
        raise fusion.FusionError("Say what it is in one ordinary word, like dog: learning starts from there.")
    usable = [picture for picture in pictures or () if picture.get("crop")]
    if not 0 < len(usable) <= MAX_PICTURES:
        count = f"{len(usable)} pictures" if usable else "No pictures"
        raise fusion.FusionError(f"{count} cannot be learned from; four to eight are good, {MAX_PICTURES} the limit.")
    known = [token for entry in session.entries().values() for token in tokens_of(entry.info)]
    if token in [*known, *(session.trainings.tokens() if session.trainings else ())]:
        raise fusion.FusionError(f"{token} is in the library already, or being taught; give this one another name.")
    if token in [own.config.token for own in unfinished_jobs(session).values() if own.config]:
        raise fusion.FusionError(f"{token} is not learned to the end yet; resume or discard that training first.")
    sources = [session.upload_path(picture.get("id", "")) for picture in usable]
    place = fusion.Library(session.library).new_training_folder(safe_name(token))
    folder = place.folder / "pictures"
    try:
        folder.mkdir()
        for number, (source, picture) in enumerate(zip(sources, usable, strict=True), start=1):
            copied = shutil.copyfile(source, folder / f"{number:02d}{source.suffix}")
            if caption := str(picture.get("caption") or "").strip():
                named = caption if any(word in caption for word in (token, "{token}")) else f"{{token}}, {caption}"
                copied.with_suffix(".txt").write_text(named, encoding="utf-8")
        config = _config(session, folder, token, noun.strip().lower(), preset, settings or {})
        fusion.keep_settings(place, config)
        made = _job(session, config, place)
    except BaseException:
        place.delete()
        raise
    for source in sources:
        source.unlink(missing_ok=True)
    return made


def _job(session: Session, config: fusion.TrainingConfig, place: Any) -> TrainingJob:
    pictures = sorted(path for path in config.instance_data_dir.iterdir() if path.suffix != ".txt")
    shown = fusion.check_pictures(pictures[:REFERENCES], config.resolution or session.resolution())
    return TrainingJob(config, place, [look.crop for look in shown.looks if look.crop], len(pictures))


def unfinished_jobs(session: Session) -> dict[str, Any]:
    """Trainings that were stopped, or ended with the app, by the names of their folders in the library."""
    return fusion.unfinished(fusion.Library(session.library))


def resume_job(session: Session, name: str) -> TrainingJob:
    """An unfinished training, from its latest checkpoint on; what it learns is what it would have learned in one go."""
    own = unfinished_job(session, name)
    config = own.take()
    try:
        if config is None:
            raise fusion.FusionError("The settings of this training cannot be read; it can only be discarded.")
        if (base := config.pretrained_model_name_or_path) != session.base_path:
            raise fusion.FusionError(f"{config.token} was being taught on {base or 'pocket'}; choose that base first.")
        made = _job(session, config, own.place)
    except BaseException:
        own.place.release()
        raise
    made.begun = made.step = own.done
    same = [entry for entry in session.entries().values() if own.sofar and entry.slices == own.sofar.slices]
    made.earlier = next((entry.path for entry in same if tokens_of(entry.info) == [made.token]), None)
    return made


def unfinished_job(session: Session, name: str) -> Any:
    """An unfinished training by what a page says, which is never used as a path."""
    if own := unfinished_jobs(session).get(name):
        return own
    raise fusion.FusionError("This training is not unfinished any more; choose another.")


def _config(
    session: Session, folder: Path, token: str, noun: str, preset: str, settings: Mapping[str, str]
) -> fusion.TrainingConfig:
    values = fusion.preset(preset.lower(), fusion.base_defaults(session.pipe, "training"))
    typed = fusion.TrainingConfig.parsed(settings)
    values |= {name: value for name, value in typed.items() if name not in PAGE_SETTINGS}
    total = values["max_train_steps"] if isinstance(values["max_train_steps"], int) else 1  # if not, it is refused
    shows = {"validation_steps": max(1, total // PREVIEWS), "num_validation_images": 1}
    kept = {"checkpointing_steps": max(1, min(MAX_LOST_STEPS, total // CHECKPOINTS)), "checkpoints_total_limit": 1}
    places = {"instance_data_dir": folder, "output_dir": folder.parent, "library": session.library}
    base = {"pretrained_model_name_or_path": session.base_path} if session.base else {}
    return fusion.TrainingConfig.model_validate(
        {"validation_prompt": "a {token}", **shows, **values, **kept, **places, **base, "token": token, "noun": noun}
    )


class TrainingQueue:
    """The lessons of a session, taught in order. Set `stop` to end the present one, which keeps what it learned."""

    def __init__(self, session: Session) -> None:
        self.session, self.jobs = session, list[TrainingJob]()
        self.stop, self.going, self.changed = threading.Event(), threading.Event(), threading.Event()
        self.going.set()  # cleared while paused
        self._lock, self._thread = threading.Lock(), None

    @property
    def running(self) -> bool:
        return any(own.state in ("waiting", "preparing", "learning") for own in self.jobs)

    @property
    def now(self) -> TrainingJob | None:
        """The lesson to look at: the one under way, or else the latest."""
        active = (own for own in self.jobs if own.state in ("preparing", "learning"))
        over = [own for own in self.jobs if own.state != "waiting"]
        return next(active, over[-1] if over else None)

    @property
    def token(self) -> str:
        return self.now.token if self.now else ""

    def tokens(self) -> list[str]:
        """What is being taught, or will be."""
        return [own.token for own in self.jobs if own.state in ("waiting", "preparing", "learning")]

    def add(self, new: TrainingJob) -> None:
        with self._lock:
            self.jobs = [*self.jobs[-20:], new]
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="teaching", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                own = next((own for own in self.jobs if own.state == "waiting"), None)
                if own is None:
                    self._thread = None
                    return
                own.state = "preparing"
            self.stop.clear()
            state = "failed"
            try:
                self._learn(own)
                state = "learned" if own.step == own.total else "stopped"
            except Exception as error:
                own.error = error_sentence(error)
            finally:
                done = state == "learned" or (state == "failed" and not own.sofar.exists())  # nothing to go on with
                (own.place.delete if done else own.place.release)()
                own.state = state
                self.changed.set()

    def _learn(self, own: TrainingJob) -> None:
        if own.begun == own.total:  # the app has ended after the last step, before anything was in the library
            own.saved = own.earlier or fusion.Library(self.session.library).add(own.sofar, safe_name(own.token))
            return
        line, clause, alone = self.session.queue, f"{own.token} is being taught", own.config.gating == "none"
        with line.acquire(clause) if alone else nullcontext():
            last, steps = None, fusion.train(self.session.pipe, own.config)
            try:
                while not self.stop.is_set() and (last is None or last.step < last.total):
                    with nullcontext() if alone else line.acquire(clause):
                        last = next(steps)
                    own.note(last)
                    if last.checkpoint:  # beside it the adapter, which owns its slice when the app is gone
                        fusion.save(last.adapter, own.sofar, dtype=own.config.save_precision)
                    while not self.going.wait(0.2) and not self.stop.is_set():
                        pass
                if last is not None:  # saved while its slice is still reserved
                    own.saved = self._keep(own, last)
            finally:
                with nullcontext() if alone else line.acquire(clause):
                    steps.close()

    def _keep(self, own: TrainingJob, last: fusion.TrainStep) -> Path:
        """Into the library, with the latest preview beside it: other tools too show name.png for name.safetensors."""
        library, dtype = fusion.Library(self.session.library), own.config.save_precision
        path = own.earlier or library.save(last.adapter, safe_name(own.token), dtype)
        if own.earlier:
            fusion.save(last.adapter, path, dtype=dtype)
        if own.previews:
            thumbnail = own.previews[-1][0].copy()
            thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
            thumbnail.save(path.with_suffix(".png"))
        return path
