"""Concepts that are taught.

While others draw in between, a training is gated by its own tokens, so that their pictures are the same as without it;
an ungated training keeps the pipeline to its end.
"""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

import fusion
from fusion_studio.jobs import Job
from fusion_studio.session import Session, safe_name, tokens_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PICTURES = 100
PREVIEWS = 5  # of a whole training
CHECKPOINTS = 20  # of a whole training, and at least one every MAX_LOST_STEPS steps
MAX_LOST_STEPS = 50
REFERENCES = 4  # pictures shown beside the results at the end
# What the page itself decides; a path typed by a visitor would name any folder of this machine.
PAGE_SETTINGS = {
    *("token", "noun", "library", "pretrained_model_name_or_path", "revision", "variant", "report_to"),
    *("base_config", "pretrained_vae_model_name_or_path"),
    *("instance_data_dir", "caption_extension", "class_data_dir", "output_dir", "output_name"),
    *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
}


class TrainingJob(Job):
    """One concept to be taught, being taught, or done."""

    def __init__(self, session: Session, config: fusion.TrainingConfig, place: Any) -> None:
        super().__init__(config.token, config.max_train_steps)
        self.config, self.token = config, config.token
        self.place = place  # its TrainingFolder in the library, locked
        pictures = sorted(path for path in config.instance_data_dir.iterdir() if path.suffix != ".txt")
        checks = fusion.check_pictures(pictures[:REFERENCES], config.resolution or session.resolution())
        self.references, self.pictures = [check.crop for check in checks.pictures if check.crop], len(pictures)
        self.checkpoint = place.folder / f"{config.name}.safetensors"  # the adapter at the latest checkpoint
        self.previews: list[tuple[Image.Image, str]] = []
        self.phase = ""  # what is done before the first step

    def report(self, phase: str, done: int, total: int) -> None:
        self.phase = f"{phase[:1].upper()}{phase[1:]}: {done} of {total}"

    def record(self, last: fusion.TrainStep) -> None:
        super().record(last)
        self.previews += [(image, f"step {last.step}") for image in last.images]

    def run(self, session: Session) -> None:
        if self.start == self.total:  # the studio ended after the last step, before the library had the adapter
            adapter = fusion.load(self.checkpoint)
            self.saved = self._save(session, adapter)
            if self.config.num_validation_images and not self.saved.with_suffix(".png").exists():
                prompt, seed = next(iter(self.config.validation_prompts()), None), self.config.seed
                with session.pipeline(self.activity):
                    picture = fusion.draw_adapter_picture(session.pipe, adapter, prompt, seed=seed)
                fusion.save_adapter_picture(self.saved, picture)
            return
        ungated = self.config.gating == "none"  # then the pipeline is held to the end
        pipeline = partial(session.queue.acquire, self.activity)
        with pipeline() if ungated else nullcontext():
            last, steps = None, fusion.train(session.pipe, self.config, on_progress=self.report)
            try:
                while not self.stop.is_set() and (last is None or last.step < last.total):
                    with nullcontext() if ungated else pipeline():
                        last = next(steps)
                    self.record(last)
                    if last.checkpoint:  # an adapter beside it owns the slice even when the studio has ended
                        fusion.save(last.adapter, self.checkpoint, dtype=self.config.save_precision)
                    while not self.unpaused.wait(0.2) and not self.stop.is_set():
                        pass
                if last is not None:  # saved while its slice is still reserved
                    self.saved = self._save(session, last.adapter)
                    if last.step < last.total:  # with a checkpoint of this step, to resume from
                        with suppress(KeyboardInterrupt), nullcontext() if ungated else pipeline():
                            steps.throw(KeyboardInterrupt())
                        fusion.save(last.adapter, self.checkpoint, dtype=self.config.save_precision)
            finally:
                with nullcontext() if ungated else pipeline():
                    steps.close()

    def _save(self, session: Session, adapter: fusion.Adapter) -> Path:
        """Into the library, with the latest preview beside it; in place of what this training has left there before."""
        dtype, settings = self.config.save_precision, adapter.info.provenance.settings
        entries = [e for e in session.entries().values() if tokens_of(e.info) == [self.token]]
        earlier = next((e.path for e in entries if e.info.provenance.settings == settings), None)
        library = fusion.Library(session.library)
        if earlier:
            path = library.replace(adapter, earlier.stem, dtype)
        else:
            path = library.save(adapter, safe_name(self.token), dtype)
        if self.previews:
            fusion.save_adapter_picture(path, self.previews[-1][0])
        return path

    def release(self, state: str) -> None:
        """What failed keeps its pictures and captions, too: it can be resumed, or changed and taught anew."""
        (self.place.delete if state == "learned" else self.place.release)()


def new_job(
    session: Session, pictures: Sequence[Mapping[str, Any]], token: str, noun: str, preset: str = "standard",
    settings: Mapping[str, str] | None = None,
) -> TrainingJob:  # fmt: skip
    """A training on uploads with captions. `token` may lack its angle brackets.

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
    if token in [*known, *taught_tokens(session)]:
        raise fusion.FusionError(f"{token} is in the library already, or being taught; give this one another name.")
    if token in [training.config.token for training in unfinished_jobs(session).values() if training.config]:
        raise fusion.FusionError(f"{token} is not learned to the end yet; resume or discard that training first.")
    uploads = [session.upload_path(picture.get("id", "")) for picture in usable]
    place = fusion.Library(session.library).new_training_folder(safe_name(token))
    folder = place.folder / "pictures"
    try:
        folder.mkdir()
        for number, (upload, picture) in enumerate(zip(uploads, usable, strict=True), start=1):
            copy = fusion.write_output(folder / f"{number:02d}{upload.suffix}", upload.read_bytes())
            if caption := str(picture.get("caption") or "").strip():
                if not (settings or {}).get("trigger_word") and token not in caption and "{token}" not in caption:
                    caption = f"{{token}}, {caption}"
                fusion.write_output(copy.with_suffix(".txt"), caption.encode())
        config = _config(session, folder, token, noun.strip().lower(), preset, settings or {})
        fusion.check_training(session.pipe, config)  # while the form still has everything
        fusion.save_training_settings(place, config)
        job = TrainingJob(session, config, place)
    except BaseException:
        place.delete()
        raise
    for upload in uploads:
        upload.unlink(missing_ok=True)
    return job


def unfinished_jobs(session: Session) -> dict[str, Any]:
    """Trainings that were stopped, or ended with the studio, by the names of their folders in the library."""
    return fusion.find_unfinished_trainings(fusion.Library(session.library))


def unfinished_job(session: Session, name: str) -> Any:
    """An unfinished training by the name that a page sends, which is never used as a path."""
    if training := unfinished_jobs(session).get(name):
        return training
    raise fusion.FusionError("This training is not unfinished any more; choose another.")


def resume_job(session: Session, name: str) -> TrainingJob:
    """An unfinished training from its latest checkpoint on; the result is the same as without the interruption."""
    training = unfinished_job(session, name)
    config = training.acquire()
    try:
        if config is None:
            raise fusion.FusionError("The settings of this training cannot be read; it can only be discarded.")
        if (base := config.pretrained_model_name_or_path) != session.base_path:
            raise fusion.FusionError(f"{config.token} was being taught on {base or 'pocket'}; choose that base first.")
        job = TrainingJob(session, config, training.folder)
    except BaseException:
        training.folder.release()
        raise
    job.start = job.step = training.steps
    return job


def _config(
    session: Session, folder: Path, token: str, noun: str, preset: str, settings: Mapping[str, str]
) -> fusion.TrainingConfig:
    values = fusion.preset(preset.lower(), fusion.base_defaults(session.pipe, "training"))
    typed = fusion.TrainingConfig.parsed(settings)
    values |= {name: value for name, value in typed.items() if name not in PAGE_SETTINGS}
    total = values["max_train_steps"] if isinstance(values["max_train_steps"], int) else 1  # if not, it is refused
    previews = {"validation_steps": max(1, total // PREVIEWS), "num_validation_images": 1}
    every = max(1, min(MAX_LOST_STEPS, total // CHECKPOINTS))
    folders = {"instance_data_dir": folder, "output_dir": folder.parent, "library": session.library}
    base = {"pretrained_model_name_or_path": session.base_path, **session.options} if session.base else {}
    page = {**folders, **base, "checkpointing_steps": every, "checkpoints_total_limit": 1, "token": token, "noun": noun}
    return fusion.TrainingConfig.model_validate({"validation_prompt": "a {token}", **previews, **values, **page})


def trainings(session: Session) -> list[TrainingJob]:
    """All trainings of the session."""
    return session.jobs.of(TrainingJob)


def current_training(session: Session) -> TrainingJob | None:
    """The training under way, or else the latest."""
    begun = [job for job in trainings(session) if job.state != "waiting"]
    return next((job for job in begun if job.active), begun[-1] if begun else None)


def taught_tokens(session: Session) -> list[str]:
    """The concepts that are being taught, or will be."""
    return [job.token for job in session.jobs.unfinished if isinstance(job, TrainingJob)]
