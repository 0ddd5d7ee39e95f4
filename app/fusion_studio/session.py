"""What all pages of one running app share: the loaded base, the library folder, and the line for the pipeline.

Nothing here knows of gradio.
"""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import atexit
import logging
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fusion
from fusion_studio.pipeline_queue import PipelineQueue

logger = logging.getLogger(__name__)
FIRST_PROMPT = "a cat on a blue background"  # drawn while the studio starts, and what the page then suggests
UPLOAD_LIFETIME = 6 * 3600  # seconds a picture waits to be taught before it is deleted


class Session:
    """Base, library and line. `base` None is the embedded pocket base."""

    def __init__(self, base: str | None = None, library: str | Path = "out") -> None:
        self.base, self.library = base, Path(library)
        self.trainings: Any = None  # the TrainingQueue of this session, once something is taught
        self.folder = Path(tempfile.mkdtemp(prefix="spectral-fusion-"))  # pictures and downloads, gone at the end
        self.uploads = self.folder / "uploads"
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.queue = PipelineQueue()
        self.first_picture: tuple[str, fusion.Recipe] | None = None  # a first picture and how it was made
        self._opening, self._pipe = threading.Lock(), None
        self._read: dict[Path, tuple[int, fusion.Adapter]] = {}

    @property
    def pipe(self) -> Any:
        """The base's pipeline, opened when first asked for."""
        with self._opening:
            if self._pipe is None:
                self._pipe = fusion.open_pipeline(self.base)
            return self._pipe

    @property
    def is_open(self) -> bool:
        return self._pipe is not None

    def warm_up(self) -> None:
        """Open the base before anyone asks, and let the embedded one draw the picture that greets who opens the page.

        Nothing waits for it. What is wrong with the base is told to whoever asks for it; another can be chosen then.
        """
        try:
            _ = self.pipe
            if self.base is None:  # of others, a picture may take minutes
                with self.queue.acquire("The base is being opened"):
                    (made,) = fusion.generate(self.pipe, FIRST_PROMPT, seed=0)
                self.first_picture = self.store_picture(made), made.recipe
        except Exception as error:
            logger.warning("The base is not ready: %s", error_sentence(error))

    def open_base(self, name: str) -> None:
        """Change to another base: "pocket", a folder or a hub id. On an error the old one stays."""
        wanted = None if name.strip().lower() in ("", "pocket") else name.strip()
        if wanted == self.base:
            return
        if self.trainings and self.trainings.running:
            raise fusion.FusionError(f"{self.trainings.token} is being taught on this base; wait until that is done.")
        with self.queue.acquire("The base is being changed"), self._opening:
            self._pipe, self.base = fusion.open_pipeline(wanted), wanted

    @property
    def base_flags(self) -> list[str]:
        """What the command line needs to know of the base."""
        return ["--base", self.base] if self.base else []

    @property
    def base_path(self) -> str | None:
        """The base as settings on disk name it: a folder by its whole path."""
        return str(Path(self.base).absolute()) if self.base and Path(self.base).is_dir() else self.base

    def resolution(self) -> int:
        """Of the square pictures the base draws, in pixels."""
        return int(self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor)

    def defaults(self) -> tuple[int, int, float]:
        """Training steps, drawing steps and guidance that suit the base: its own, or what suits most."""
        training, drawing = (fusion.base_defaults(self.pipe, table) for table in ("training", "generation"))
        steps = training.get("max_train_steps", fusion.TrainingConfig.model_fields["max_train_steps"].default)
        return int(steps), int(drawing.get("steps", 30)), float(drawing.get("guidance_scale", 7.5))

    def entries(self) -> dict[str, Any]:
        """The library by file name without ending, newest first."""
        found = fusion.Library(self.library).adapters() if self.library.is_dir() else []
        return {entry.path.stem: entry for entry in sorted(found, key=lambda entry: -entry.path.stat().st_mtime)}

    def adapters(self, keys: Sequence[str]) -> list[fusion.Adapter]:
        """The chosen adapters, each read from its file once."""
        _ = self.pipe  # what uses adapters imports diffusers, whose lazy imports cannot bear a second thread
        return [self._adapter(key) for key in keys]

    def _adapter(self, key: str) -> fusion.Adapter:
        path = self.library / f"{key}.safetensors"
        if Path(key).name != key or not path.is_file():
            raise fusion.FusionError(f"'{key}' is no longer in the library {self.library}; pick again.")
        stamp = path.stat().st_mtime_ns
        if self._read.get(path, (0,))[0] != stamp:
            self._read[path] = (stamp, fusion.load(path))
        return self._read[path][1]

    def fused(self, picked: Mapping[str, float], method: str = "direct_sum", name: str | None = None) -> fusion.Adapter:
        """The picked adapters at their strengths, as one."""
        if not picked:
            raise fusion.FusionError("Pick at least one concept first.")
        adapters, strengths = self.adapters(list(picked)), list(picked.values())
        needs = method in fusion.METHODS and fusion.METHODS[method].moments  # then the base is run
        with self.queue.acquire("Concepts are being fused") if needs else nullcontext():
            return fusion.fuse(adapters, strengths, method, pipe=self.pipe if needs else None, name=name)

    def store_picture(self, picture: fusion.Picture) -> str:
        """A drawn picture as a PNG with its recipe, where pages may show it from."""
        name = f"{safe_name(picture.recipe.prompt)}-{secrets.token_hex(4)}.png"
        return str(picture.save(self.folder / name))

    def store_upload(self, source: str | Path) -> Path:
        """A copy of an uploaded file under a name of our own; old ones that nobody has used are deleted."""
        self.uploads.mkdir(exist_ok=True)
        for old in self.uploads.iterdir():
            if time.time() - old.stat().st_mtime > UPLOAD_LIFETIME:
                old.unlink(missing_ok=True)
        ending = Path(source).suffix.lower()
        ending = ending if re.fullmatch(r"\.[a-z0-9]{1,12}", ending) else ".bin"
        return Path(shutil.copyfile(source, self.uploads / f"{secrets.token_hex(8)}{ending}"))

    def upload_path(self, name: str) -> Path:
        """An upload by the name `store_upload` gave it; what a page says is never used as a path."""
        path = self.uploads / str(name)
        if not re.fullmatch(r"[0-9a-f]{16}\.[a-z0-9]{1,12}", str(name)) or not path.is_file():
            raise fusion.FusionError("One of the pictures is no longer here; drop it again.")
        return path


def error_sentence(error: Exception) -> str:
    """What to tell people of an error. One that is no FusionError is our mistake: the log has it in full."""
    if isinstance(error, fusion.FusionError):
        return str(error)
    logger.error("Unexpected error", exc_info=error)
    return f"Something unexpected happened ({type(error).__name__}); the terminal has details."


def safe_name(text: str) -> str:
    """A short file name out of any words: nothing but letters, digits, `+`, `-` and `_`."""
    return re.sub(r"[^a-z0-9+_-]+", "-", text.lower()).strip("-+_")[:48].rstrip("-+_") or "unnamed"


def tokens_of(info: Any) -> list[str]:
    return [concept.token for concept in info.concepts]
