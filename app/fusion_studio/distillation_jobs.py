"""One plain LoRA for other programs, learned from what picked concepts do together with their gates."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import json
import shutil
from collections.abc import Generator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

import fusion
from fusion_studio.jobs import Job
from fusion_studio.session import Session, safe_name, tokens_of

FOLDER = ".distillations"  # in the library: request and checkpoints of what is not finished
REQUEST = "request.json"
CHECKPOINTS = 20  # of a whole distillation, and at least one every MAX_LOST_STEPS steps
MAX_LOST_STEPS = 50
THOROUGHNESS = {"quick": 0.5, "standard": 1.0, "careful": 2.0}  # times the default number of steps


class DistillationJob(Job):
    """One LoRA to be learned, being learned, or done."""

    def __init__(
        self, session: Session, picked: Mapping[str, float], name: str, thoroughness: str = "standard",
        rank: int | None = None, prompts: str = "",
    ) -> None:  # fmt: skip
        """`prompts` of the user's own, one a line. Raises FusionError for what cannot be distilled."""
        if not picked:
            raise fusion.FusionError("Pick at least one concept first.")
        if thoroughness not in THOROUGHNESS:
            raise fusion.FusionError(f"Choose one of {', '.join(THOROUGHNESS)}.")
        self.adapters, self.strengths = session.adapters(list(picked)), list(picked.values())
        fusion.check_distillable(session.pipe, self.adapters)
        self.picked, self.name, self.prompts = dict(picked), safe_name(name), prompts.strip()
        self.tokens = [token for adapter in self.adapters for token in tokens_of(adapter.info)]
        self.prompt = session.example_prompt(self.tokens[:2])
        self.folder = session.library / FOLDER / self.name
        defaults = fusion.DistillationConfig.model_validate({})
        usual = {"rank": defaults.rank, "max_train_steps": defaults.steps_for(len(self.tokens))}
        total = round(usual["max_train_steps"] * THOROUGHNESS[thoroughness])
        super().__init__(" ".join(self.tokens), total)
        values = {"rank": rank or defaults.rank, "max_train_steps": total}
        self.settings = {name: value for name, value in values.items() if value != usual[name]}
        self.request = {
            "picked": self.picked, "name": self.name, "thoroughness": thoroughness, "rank": values["rank"],
            "prompts": self.prompts,
        }  # fmt: skip
        every = max(1, min(MAX_LOST_STEPS, total // CHECKPOINTS))
        run = {"output_dir": self.folder, "output_name": self.name, "checkpointing_steps": every}
        self.config = fusion.DistillationConfig.model_validate({**values, **run})
        self.adapter: fusion.Adapter | None = None
        self.errors: fusion.HeldOutErrors | None = None
        self.pictures: list[tuple[Image.Image, str]] = []

    @property
    def activity(self) -> str:
        return f"One LoRA of {self.title} is being learned"

    @property
    def active(self) -> bool:
        return self.state in ("preparing", "learning", "drawing")

    @property
    def finished(self) -> bool:
        return self.saved is not None

    def run(self, session: Session) -> None:
        """Learn in steps, each of which waits for the pipeline, save the result, and draw with it once."""
        pipeline = partial(session.queue.acquire, self.activity)
        with pipeline():
            steps, last = self._begin(session)
        try:
            while True:
                self.record(last)
                if self.stop.is_set() or last.adapter is not None:
                    break
                with pipeline():
                    last = next(steps)
            if last.adapter is None:
                with suppress(KeyboardInterrupt):
                    steps.throw(KeyboardInterrupt())  # ends it with a checkpoint of this step
        finally:
            steps.close()
        if last.adapter is not None:
            self.adapter, self.errors = last.adapter, last.errors
            self.saved = self._save(session, last.adapter)
            shutil.rmtree(self.folder, ignore_errors=True)
            fusion.join_adapter_pictures([session.library / f"{key}.safetensors" for key in self.picked], self.saved)
            self._draw(session, pipeline)

    def _begin(self, session: Session) -> tuple[Generator[fusion.DistillationStep], fusion.DistillationStep]:
        """The steps and the first of them: from the latest checkpoint of the same distillation, else from the start."""
        fusion.write_output(self.folder / REQUEST, json.dumps(self.request).encode())
        config = self.config
        if self.prompts:
            file = fusion.write_output(self.folder / "prompts.txt", f"{self.prompts}\n".encode())
            config = config.updated({"prompts": file})
        distill = partial(fusion.distill, session.pipe, self.adapters, strengths=self.strengths)
        if config.checkpoint_folder.is_dir():
            steps = distill(config=config.updated({"resume_from_checkpoint": "latest"}))
            try:
                return steps, next(steps)
            except fusion.FusionError:  # checkpoints of another set, or of other settings
                shutil.rmtree(config.checkpoint_folder, ignore_errors=True)
        steps = distill(config=config)
        return steps, next(steps)

    def _save(self, session: Session, adapter: fusion.Adapter) -> Path:
        """Into the library; in place of what this run has left there, when the studio ended right afterwards."""
        library, run = fusion.Library(session.library), adapter.info.provenance.run
        earlier = next((e.path for e in session.entries().values() if e.info.provenance.run == run), None)
        return library.replace(adapter, earlier.stem) if earlier else library.save(adapter, self.name)

    def _draw(self, session: Session, pipeline: Any) -> None:
        """One prompt, drawn by the gated concepts and by the LoRA; the latter is its picture in the library."""
        assert self.adapter is not None and self.saved is not None
        self.state, config = "drawing", fusion.GenerationConfig(prompt=self.prompt)
        sides = (("With gates", self.adapters, self.strengths), ("One LoRA", [self.adapter], None))
        for label, adapters, strengths in sides:
            if self.stop.is_set():
                return
            with pipeline():
                (picture,) = fusion.generate(session.pipe, config, adapters, strengths=strengths)
            self.pictures = [*self.pictures, (picture.image, label)]
        fusion.save_adapter_picture(self.saved, self.pictures[-1][0])


def current_distillation(session: Session) -> DistillationJob | None:
    """The distillation under way, else the first that waits, else the latest."""
    jobs = session.jobs.of(DistillationJob)
    return next(
        (job for states in (("preparing", "learning", "drawing"), ("waiting",)) for job in jobs if job.state in states),
        jobs[-1] if jobs else None,
    )


def unfinished_distillations(session: Session) -> dict[str, dict[str, Any]]:
    """What was asked for and is neither finished nor in the queue, by name, newest last; empty if unreadable."""
    busy = {job.name for job in session.jobs.unfinished if isinstance(job, DistillationJob)}
    folders = [path for path in (session.library / FOLDER).glob("*") if path.is_dir()]
    requests = dict[str, dict[str, Any]]()
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime):
        if folder.name in busy:
            continue
        # A studio ended before it had written the request.
        if not (folder / REQUEST).exists() and not any(folder.rglob("*.safetensors")):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            request = {}
        requests[folder.name] = request if isinstance(request, dict) else {}
    return requests


def resume_distillation(session: Session, name: str) -> DistillationJob:
    """A job that goes on with an unfinished distillation. Raises FusionError where that is not possible."""
    request = unfinished_distillations(session).get(name)
    try:
        job = DistillationJob(session, **(request or {}))
    except (TypeError, ValueError, AttributeError):
        raise fusion.FusionError(f"'{name}' cannot be gone on with; discard it.") from None
    if job.name != name:
        raise fusion.FusionError(f"'{name}' cannot be gone on with; discard it.")
    return job


def discard_distillation(session: Session, name: str) -> None:
    """Delete the checkpoints of an unfinished distillation."""
    if name in unfinished_distillations(session):
        shutil.rmtree(session.library / FOLDER / name, ignore_errors=True)


def export_lora(session: Session, job: DistillationJob, form: str) -> Any:
    """The LoRA and its embeddings in a form, written anew into the session's folder: the report of the export."""
    assert job.adapter is not None
    stem = f"{job.name}_lora" if form == "kohya" else f"{job.name}_peft"
    folder = session.folder / "exports" / (job.saved or job.folder).stem
    folder.mkdir(parents=True, exist_ok=True)
    return fusion.export(job.adapter, folder / f"{stem}.safetensors", form, overwrite=True)
