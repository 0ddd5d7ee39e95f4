"""Calls that torch.compile leaves out of its graphs. Importing this loads torch._dynamo."""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def call(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function uncompiled."""
    return function(*args)
