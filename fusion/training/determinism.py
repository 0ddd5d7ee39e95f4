"""Equal bits from equal trainings on one GPU; on a CPU they are equal anyway."""

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch

from fusion.errors import ConfigError


@contextmanager
def deterministic_algorithms(on: bool) -> Generator[None]:
    """Where `on`, let PyTorch use kernels only that add in one order, and restore its settings afterwards.

    Raises ConfigError for an operation that has no such kernel.
    """
    if not on:
        yield
        return
    # Read at the first matrix product on a GPU; workspaces of other sizes may add in another order from call to call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # else the fastest convolution of the moment is taken
    try:
        yield
    except RuntimeError as error:
        operation, separator, _ = str(error).partition(" does not have a deterministic implementation")
        if not separator:
            raise
        raise ConfigError(f"deterministic = true: {operation} of PyTorch adds in any order; leave it out.") from error
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
