"""What all pages of one running app share: the loaded base, the library folder, and whose turn it is.

A pipeline can do one thing at a time (an adapter and a schedule are set on it), so drawing, teaching and changing
the base take turns. Nothing here knows of gradio.
"""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import atexit
import logging
import re
import secrets
import shutil
import tempfile
import threading
import tomllib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

from PIL import Image

import fusion

logger = logging.getLogger(__name__)
PATIENCE = 5.0  # seconds a request waits for its turn before it says what it waits for


class Frame(NamedTuple):
    """One moment of a drawing: how far it is, sometimes a preview, and at the end the files with recipes in words."""

    step: int
    total: int
    preview: Image.Image | None = None
    pictures: tuple[tuple[str, str], ...] = ()


class Session:
    """Base, library and turn. `base` None is the embedded pocket base."""

    def __init__(self, base: str | None = None, library: str | Path = "out") -> None:
        self.base, self.library = base, Path(library)
        self.teaching: Any = None  # the latest teaching.Teaching
        self.folder = Path(tempfile.mkdtemp(prefix="spectral-fusion-"))  # pictures and downloads
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self._opening, self._pipe = threading.Lock(), None
        self._turn, self._busy = threading.Lock(), ""
        self._read: dict[Path, tuple[int, fusion.Adapter]] = {}

    @contextmanager
    def turn(self, clause: str) -> Generator[None]:
        """The pipeline to oneself. Raises FusionError, with its clause, when other work does not let go of it."""
        if not self._turn.acquire(timeout=0 if self.teaching and self.teaching.running else PATIENCE):
            raise fusion.FusionError(f"{self._busy}; wait until that is done, or stop it.")
        self._busy = clause
        try:
            yield
        finally:
            self._turn.release()

    @property
    def pipe(self) -> Any:
        """The base's pipeline, opened when first asked for."""
        with self._opening:
            if self._pipe is None:
                self._pipe = fusion.open_pipeline(self.base)
            return self._pipe

    def warm_up(self) -> None:
        """Open the base before anyone asks; what is wrong with it is told to the one who does."""
        with suppress(Exception):
            _ = self.pipe

    def open_base(self, name: str) -> None:
        """Change to another base: "pocket", a folder or a hub id. On an error the old one stays."""
        wanted = None if name.strip().lower() in ("", "pocket") else name.strip()
        if wanted != self.base:
            with self.turn("The base is being changed"), self._opening:
                self._pipe, self.base = fusion.open_pipeline(wanted), wanted

    def usual(self) -> tuple[int, int, float]:
        """Training steps, drawing steps and guidance that suit the base: its own `fusion.toml`, or what suits most."""
        file = Path(str(self.pipe.config.get("_name_or_path") or "")) / "fusion.toml"
        own = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        training, generation = own.get("training", {}), own.get("generation", {})
        steps = training.get("max_train_steps", fusion.TrainingConfig.model_fields["max_train_steps"].default)
        return int(steps), int(generation.get("steps", 30)), float(generation.get("guidance_scale", 7.5))

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

    def fused(self, keys: Sequence[str], strengths: Sequence[float]) -> Path:
        """The chosen adapters fused into one native file, for download."""
        if not keys:
            raise fusion.FusionError("Pick at least one concept to put into the file.")
        path = self.folder / f"{safe_name('+'.join(keys))}.safetensors"
        fusion.save(fusion.fuse(self.adapters(keys), list(strengths)), path)
        return path

    def draw(self, work: Callable[..., list[fusion.Picture]]) -> Iterator[Frame]:
        """The frames of `work(on_step=...)`, a call of `fusion.generate`. Closing the iterator cancels it."""
        frames: Queue[Frame | BaseException] = Queue()
        cancelled = threading.Event()

        def on_step(step: int, total: int, preview: Callable[[], Image.Image]) -> None:
            if cancelled.is_set():
                raise fusion.Cancelled("Nobody is waiting for this picture any more.")
            # A page slower than the pipeline gets fewer previews, and the pipeline decodes fewer.
            frames.put(Frame(step, total, preview() if frames.empty() else None))

        def run() -> None:
            try:
                frames.put(Frame(1, 1, None, tuple(self._keep(picture) for picture in work(on_step=on_step))))
            except BaseException as error:  # handed to the one who asked
                frames.put(error)

        with self.turn("A picture is being drawn"):
            thread = threading.Thread(target=run, name="drawing", daemon=True)
            thread.start()
            try:
                while isinstance(frame := frames.get(), Frame):
                    yield frame
                    if frame.pictures:
                        return
                raise frame
            finally:
                cancelled.set()
                thread.join()

    def _keep(self, picture: fusion.Picture) -> tuple[str, str]:
        name = f"{safe_name(picture.recipe.prompt)}-{secrets.token_hex(4)}.png"
        return str(picture.save(self.folder / name)), in_words(picture.recipe)


def in_a_sentence(error: Exception) -> str:
    """What to tell people of an error. One that is no FusionError is our mistake: the log has it in full."""
    if isinstance(error, fusion.FusionError):
        return str(error)
    logger.error("Unexpected error", exc_info=error)
    return f"Something unexpected happened ({type(error).__name__}); the terminal has details."


def safe_name(text: str) -> str:
    """A short file name out of any words: nothing but letters, digits, `+`, `-` and `_`."""
    return re.sub(r"[^a-z0-9+_-]+", "-", text.lower()).strip("-")[:48] or "unnamed"


def in_words(recipe: fusion.Recipe) -> str:
    """What a person needs to draw the picture again."""
    avoided = [f"without {recipe.negative_prompt}"] if recipe.negative_prompt else []
    settings = [f"seed {recipe.seed + recipe.index}", f"{recipe.steps} steps", f"guidance {recipe.guidance_scale:g}"]
    used = [f"{' '.join(a.tokens) or a.name} at {a.strength:g}" for a in recipe.adapters if a.strength != 1]
    return " · ".join([recipe.prompt, *avoided, *settings, *used])
