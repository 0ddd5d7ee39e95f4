"""Teach Stable Diffusion personal concepts as spectral adapters, and use them together in one picture.

errors, config, layer_names    errors that users can cause; strict settings; canonical names of layers
output_files                   the one way to write, whole or not at all
spectral/                      the mathematics: spectrum, slices, Delta, rotation, interference
adapters/  methods/            trainable changes to one weight; ways to merge several changes
models/                        Stable Diffusion pipelines: layers, targets, tokens, gates, attach and bake
formats/                       adapters in files, our own and other programs'
base_models/                   bases opened from folders, hub ids and single files
distillation/                  gated adapters -> one plain LoRA
composition/                   fuse, and compatibility before it
generation/                    pipeline + adapters + prompt -> pictures with recipes
library/                       folders of adapters: slices, reservations, cached spectra
training/  evaluation/         pictures -> adapter; adapters -> numbers
hub/                           adapters -> repositories on the Hub
peft/                          a method of PEFT, for language models too; imported by itself
cli/                           one file per verb
"""

import ast
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any


def _public() -> dict[str, str]:
    """Public name -> the module it is defined in, read from `__init__.pyi`, so that type checkers see the same."""
    tree = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


# Imported on first use: `import fusion` costs nothing and needs no torch.
_PUBLIC = _public()
_PACKAGES = {module.split(".")[1] for module in _PUBLIC.values()}
# Former public name -> today's. Each use warns; none of them is in __all__, dir() or the stub.
_RENAMED = {
    "examine": "check_pictures",
    "foresee": "forecast",
    "keep_settings": "save_training_settings",
    "unfinished": "find_unfinished_trainings",
}
__all__ = list(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"fusion.{name}")
    if name in _RENAMED:
        now = _RENAMED[name]
        message = f"fusion.{name} is now fusion.{now}; the old name goes away in 0.3"
        warnings.warn(message, FutureWarning, stacklevel=2)
        name = now
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fusion' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
