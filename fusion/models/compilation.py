"""torch.compile for drawing: faster steps after a first picture that takes longer, whatever is attached."""

import shutil
from importlib.util import find_spec

from fusion.errors import ConfigError
from fusion.models.pipeline import Pipeline, uncompiled


def compile_unet(pipe: Pipeline) -> None:
    """Compile the transformer blocks of the UNet in place, at its next call.

    Pictures differ from uncompiled ones by rounding. Other prompts, strengths and concepts compile nothing anew, but
    another size does, and so do adapters of other layers. Raises ConfigError where torch.compile has no compiler.
    """
    device = pipe.device.type
    if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise ConfigError("torch.compile needs a C++ compiler on a CPU, such as g++; install one, or do not compile.")
    if device == "cuda" and find_spec("triton") is None:
        package = "triton-windows" if shutil.which("cmd.exe") else "triton"
        raise ConfigError(f"torch.compile needs Triton on a GPU; install it with: python -m pip install {package}")
    uncompiled(pipe.unet).compile_repeated_blocks()  # pyright: ignore[reportCallIssue]
