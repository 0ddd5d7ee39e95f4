"""Forward hooks on modules of a base, which no copy and no pickle of these modules takes along."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_HOOK_TABLES = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


class Hooks:
    """Hooks of one attached state; `remove()` leaves the modules as they were."""

    def __init__(self) -> None:
        self._handles: dict[nn.Module, list[RemovableHandle]] = {}

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before the module's forward."""
        self._add(module, module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, output)` after it."""
        self._add(module, module.register_forward_hook(hook))

    def _add(self, module: nn.Module, handle: RemovableHandle) -> None:
        handles = self._handles.setdefault(module, [])
        handles.append(handle)
        # What copy.deepcopy and pickle ask for; past nn.Module's registry.
        object.__setattr__(module, "__getstate__", partial(_state_without, module, handles))

    def remove(self) -> None:
        for module, handles in self._handles.items():
            for handle in handles:
                handle.remove()
            object.__delattr__(module, "__getstate__")
        self._handles = {}


def _state_without(module: nn.Module, handles: list[RemovableHandle]) -> dict[str, Any]:
    state = dict(type(module).__getstate__(module))  # pyright: ignore[reportAttributeAccessIssue]
    del state["__getstate__"]
    hooks = {handle.id for handle in handles}
    for table in _HOOK_TABLES:
        state[table] = OrderedDict((key, value) for key, value in state[table].items() if key not in hooks)
    return state
