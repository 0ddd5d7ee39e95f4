"""What all pages of one running studio share: the open base, the library folder and the pipeline's queue. No gradio."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import fusion
from fusion_studio.pipeline_queue import PipelineQueue
from fusion_studio.temporary_folder import TemporaryFolder

logger = logging.getLogger(__name__)
LIFETIME = 6 * 3600  # seconds that an upload waits to be taught, and a drawing or an export to be saved


class Session:
    """Base, library and queue. `base` None is the embedded pocket base, `device` None the best there is.

    `options` are further ones of `open_pipeline` for this base.
    """

    def __init__(
        self, base: str | None = None, library: str | Path = "out", *, device: str | None = None,
        compiled: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        self.base, self.library, self.device, self.compiled = base, Path(library), device, compiled
        self.options = options
        from fusion_studio.jobs import JobQueue  # which knows sessions

        self.jobs = JobQueue(self)
        self._temporary = TemporaryFolder()
        self.folder = self._temporary.path  # pictures and downloads
        self.uploads = self.folder / "uploads"
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder / "gradio")  # where gradio keeps uploads and what it serves
        self.queue = PipelineQueue()
        self._closing = False
        self.first_picture: tuple[str, fusion.Recipe] | None = None  # its path and recipe
        self.idle = threading.Event()  # set unless `warm_up` is running
        self.idle.set()
        self._opening, self._pipe = threading.Lock(), None
        self._adapters: dict[Path, tuple[int, fusion.Adapter]] = {}  # with the time at which the file was changed

    @property
    def pipe(self) -> Any:
        """The base's pipeline, opened on first use."""
        with self._opening:
            if self._pipe is None:
                self._pipe = self._open(self.base, self.options)
            return self._pipe

    def _open(self, base: str | None, options: Mapping[str, Any]) -> Any:
        pipe = fusion.open_pipeline(base, device=self.device, **options)
        if self.compiled:
            fusion.compile_unet(pipe)
        return pipe

    @property
    def is_open(self) -> bool:
        return self._pipe is not None

    @property
    def has_pictures(self) -> bool:
        return any(self.folder.glob("*.png"))

    def warm_up(self) -> None:
        """Open the base before it is needed; the embedded one also draws the picture that a new page shows.

        Nothing waits for this. If it fails, the first use of the base raises the error, and another can be chosen.
        """
        self.idle.clear()
        try:
            _ = self.pipe
            if self.base is None:  # another base may take minutes for a picture
                with self.queue.acquire("The first picture is being drawn"):
                    if not self.has_pictures:
                        (picture,) = fusion.generate(self.pipe, fusion.base_example())
                        self.first_picture = self.store_picture(picture), picture.recipe
        except Exception as error:
            logger.warning("The base is not ready: %s", self.error_sentence(error))
        finally:
            self.idle.set()

    def example(self) -> fusion.GenerationConfig:
        """Prompt and seed of a picture that shows the base at its best; an empty prompt where they cannot be read."""
        try:
            return fusion.base_example(self.base)
        except fusion.FusionError:
            return fusion.GenerationConfig(prompt="")

    def example_prompt(self, tokens: Sequence[str]) -> str:
        """A first prompt for a selection, in words that a small base too understands; the base's own for none."""
        if len(tokens) < 2:
            return f"a {tokens[0]} on a blue background" if tokens else self.example().prompts[0]
        rest = "".join(f" and a {token}" for token in tokens[2:])
        return f"a {tokens[0]} on the left and a {tokens[1]} on the right{rest} on a red background"

    def open_base(self, name: str) -> None:
        """Change to another base: "pocket", a folder, file or hub id. On an error the old one stays."""
        base = None if name.strip().lower() in ("", "pocket") else name.strip()
        if base == self.base:
            return
        if jobs := self.jobs.unfinished:
            raise fusion.FusionError(f"{jobs[0].activity} on this base; wait until that is done.")
        with self.queue.acquire("The base is being changed"), self._opening:
            self._pipe, self.base, self.options = self._open(base, {}), base, {}

    def close(self) -> None:
        """End the training under way, so that it can be resumed, and delete all temporary files."""
        self._closing = True
        self.jobs.close()
        self._temporary.remove()

    def error_sentence(self, error: Exception) -> str:
        """An error as the page shows it. What is neither ours nor the system's is a bug: the log has it in full.

        While the session closes, its files are deleted under requests, so whatever fails is answered with that.
        """
        if self._closing:
            return "The studio is ending; do this again once it is running."
        if isinstance(error, fusion.FusionError):
            return str(error)
        logger.error("Unexpected error", exc_info=error)
        if isinstance(error, OSError) and error.strerror:  # a full disk, a deleted file; no path of the machine
            return f"{error.strerror}{f': {Path(str(error.filename)).name}' if error.filename else ''}."
        return f"Something unexpected happened ({type(error).__name__}); the terminal has details."

    @contextmanager
    def pipeline(self, activity: str) -> Generator[None]:
        """Wait for the pipeline, and have it for the block without the adapter that is being taught."""
        with self.queue.acquire(activity), self.without_training():
            yield

    def without_training(self) -> AbstractContextManager[None]:
        """For whoever has the pipeline: a concept that is stopped and resumed can be drawn while it learns."""
        return fusion.detached(self.pipe) if self.is_open else nullcontext()

    @property
    def base_flags(self) -> list[str]:
        """The base, and how it is opened, as flags of the command line."""
        flags = {"base": self.base, **self.options}
        flags = {name: value for name, value in flags.items() if value is not None}
        return [word for name, value in flags.items() for word in (f"--{name}", *([str(value)] * (value is not True)))]

    @property
    def base_path(self) -> str | None:
        """The base as settings on disk name it: a folder or file by its whole path."""
        return str(Path(self.base).absolute()) if self.base and os.path.exists(self.base) else self.base  # noqa: PTH110

    def resolution(self) -> int:
        """Width and height of the pictures that the base draws, in pixels."""
        return int(self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor)

    def defaults(self) -> tuple[int, int, float]:
        """Training steps, drawing steps and guidance: the base's own, else the general ones."""
        training, generation = (fusion.base_defaults(self.pipe, table) for table in ("training", "generation"))
        fusion.base_example(self.base)  # raises where `example` does without
        steps = training.get("max_train_steps", fusion.TrainingConfig.model_fields["max_train_steps"].default)
        drawing = fusion.GenerationConfig(prompt="").with_base_defaults(generation)
        return int(steps), drawing.num_inference_steps, drawing.guidance_scale

    def entries(self) -> dict[str, Any]:
        """The adapters of the library by the stems of their files, newest first."""
        entries = fusion.Library(self.library).adapters() if self.library.is_dir() else []
        return {entry.path.stem: entry for entry in sorted(entries, key=lambda entry: -entry.path.stat().st_mtime)}

    def adapters(self, keys: Sequence[str]) -> list[fusion.Adapter]:
        """These adapters of the library, each file read once."""
        _ = self.pipe  # what uses adapters imports diffusers, whose lazy imports cannot bear a second thread
        paths = [self.library / f"{key}.safetensors" for key in keys]
        for key, path in zip(keys, paths, strict=True):
            if Path(key).name != key or not os.path.isfile(path):  # noqa: PTH113 (names may be too long)
                raise fusion.FusionError(f"'{key}' is no longer in the library {self.library}; pick again.")
            changed = path.stat().st_mtime_ns
            if self._adapters.get(path, (0,))[0] != changed:
                self._adapters[path] = (changed, fusion.load(path))
        return [self._adapters[path][1] for path in paths]

    def fused(self, picked: Mapping[str, float], method: str = "direct_sum", name: str | None = None) -> fusion.Adapter:
        """The picked adapters at their strengths, as one."""
        if not picked:
            raise fusion.FusionError("Pick at least one concept first.")
        adapters, strengths = self.adapters(list(picked)), list(picked.values())
        runs_base = method in fusion.METHODS and fusion.METHODS[method].needs_base
        with self.pipeline("Concepts are being fused") if runs_base else nullcontext():
            return fusion.fuse(adapters, strengths, method, pipe=self.pipe if runs_base else None, name=name)

    def store_picture(self, picture: fusion.Picture) -> str:
        """Save a drawn picture as a PNG with its recipe, in the folder that pages may show."""
        self._delete_old_files()
        name = f"{safe_name(picture.recipe.picture_prompt)}-{secrets.token_hex(4)}.png"
        return str(picture.save(self.folder / name))

    def store_upload(self, source: str | Path) -> Path:
        """Copy an uploaded file to a random name.

        Gradio gives equal uploads of several people one name; so its file stays, until gradio deletes it as old.
        """
        self._delete_old_files()
        self.uploads.mkdir(exist_ok=True)
        suffix = Path(source).suffix.lower()
        suffix = suffix if re.fullmatch(r"\.[a-z0-9]{1,12}", suffix) else ".bin"
        return Path(shutil.copyfile(source, self.uploads / f"{secrets.token_hex(8)}{suffix}"))

    def _delete_old_files(self) -> None:
        for path in (*self.folder.glob("*"), *self.uploads.glob("*"), *(self.folder / "exports").glob("*")):
            with suppress(OSError):  # another thread was faster
                if path.is_file() and time.time() - path.stat().st_mtime > LIFETIME:
                    path.unlink()

    def upload_path(self, name: str) -> Path:
        """An upload by its name from `store_upload`; no other text from a page is ever used as a path."""
        path = self.uploads / str(name)
        if not re.fullmatch(r"[0-9a-f]{16}\.[a-z0-9]{1,12}", str(name)) or not path.is_file():
            raise fusion.FusionError("One of the pictures is no longer here; drop it again.")
        return path


def safe_name(text: str) -> str:
    """A short file name made of any text: only a-z, 0-9, `+`, `-` and `_`."""
    return re.sub(r"[^a-z0-9+_-]+", "-", text.lower()).strip("-+_")[:48].rstrip("-+_") or "unnamed"


def tokens_of(info: Any) -> list[str]:
    return [concept.token for concept in info.concepts]
