"""One rule for devices and precision: where a base is opened, in which dtype, and how it is trained there.

On a GPU bfloat16 where the card itself computes in it, else float16 (with a gradient scaler in training); on a CPU
float32, or bfloat16 where float32 would take more than half of the free memory.
"""

import logging
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from fusion.errors import ConfigError, OutOfMemory
from fusion.models.stored_weights import stored_parameters

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PRECISIONS = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}  # as accelerate names them
INSTALL_CUDA = "python -m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
# Measured: drawing with SDXL (3.5 billion parameters) takes 18.5 GB in float32, on a CPU.
_BYTES_TO_DRAW = 5.3
# Of the free memory, that a base in float32 may take on a CPU: half precision takes half as much, and little more time.
_LARGEST_SHARE = 0.5


def as_device(device: str | torch.device | None) -> torch.device:
    """A device that can be used here; None: the best there is, "gpu": a GPU of any kind. Raises ConfigError."""
    name = str(device if device is not None else best_device())
    try:
        usable = torch.device(best_device() if name == "gpu" and best_device() != "cpu" else name)
        if usable.type == "meta":
            raise ValueError("meta holds no numbers")
        if usable.type == "cuda" and not (
            torch.cuda.is_available() and (usable.index or 0) < torch.cuda.device_count()
        ):
            raise ValueError("no such card")
        if usable.type not in ("cpu", "cuda"):
            torch.empty(1, device=usable)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError, ValueError, TypeError):
        if name.partition(":")[0] in ("cuda", "gpu") and lacks_cuda():
            raise ConfigError(_without_cuda("")) from None
        devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        devices += ["mps"] * torch.backends.mps.is_available()
        raise ConfigError(f"There is no device '{name[:100]}' here; there is {', '.join(devices)}.") from None
    if device is None and usable.type == "cpu" and lacks_cuda():
        logger.warning("%s", _without_cuda(" Until then the CPU is used."))
    return usable


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def lacks_cuda() -> bool:
    """Whether an NVIDIA card is beside a torch that was built without CUDA, as PyPI's for Windows is."""
    built_for_gpus = torch.version.cuda or torch.version.hip or torch.backends.mps.is_built()
    return not built_for_gpus and shutil.which("nvidia-smi") is not None


def _without_cuda(end: str) -> str:
    return f"This machine has an NVIDIA card, and its torch no CUDA; install one that has: {INSTALL_CUDA}{end}"


def half_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the device itself computes in it, else float16, whose narrow range needs a gradient scaler."""
    if device.type == "cuda":
        with torch.cuda.device(-1 if device.index is None else device.index):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.bfloat16 if native else torch.float16


def as_dtype(dtype: torch.dtype | str | None, device: torch.device, folder: Path | None = None) -> torch.dtype:
    """A torch dtype, also from its name; None: the one that suits the device and the base in `folder`.

    Raises ConfigError for another name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is one of {', '.join(DTYPES)}; got '{dtype}'.")
    if dtype is not None:
        return DTYPES[dtype]
    if device.type != "cpu":
        return half_precision(device)
    parameters = stored_parameters(folder) if folder else 0
    available = psutil.virtual_memory().available
    size = parameters * _BYTES_TO_DRAW
    if size <= available * _LARGEST_SHARE:
        return torch.float32
    logger.warning(
        "The base has %.1f billion parameters; in float32 it would take %.1f of the %.1f GB of memory that are free: "
        "it is opened in bfloat16.", parameters / 1e9, size / 1e9, available / 1e9,
    )  # fmt: skip
    return half_precision(device)


@contextmanager
def explained_memory(advice: Callable[[], str]) -> Generator[None]:
    """Raise OutOfMemory, a line ending in `advice()`, where the machine's memory or a GPU's does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (line := memory_line(error)) is None:
            raise
        raise OutOfMemory(f"{line}; {advice()}") from error


def memory_line(error: Exception) -> str | None:
    """The beginning of a sentence for an error of Python's or torch's allocators; None for any other error."""
    text = str(error)
    if not (isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or "out of memory" in text.lower()):
        return None
    size = re.search(r"allocate (\d+ bytes|[\d.]+ \w+)", text)
    return "The memory does not suffice" + (f" for another {_readable(size[1])}" if size else "")


def _readable(size: str) -> str:
    """`512 bytes` and more in GB; other units as they are."""
    number, unit = size.split()
    billions = int(number) / 1e9 if unit == "bytes" else 0
    return size if unit != "bytes" else f"{billions:.0f} GB" if billions >= 10 else f"{billions:.2g} GB"
