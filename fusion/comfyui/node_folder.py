"""The nodes as a folder of their own, which ComfyUI finds in `custom_nodes`.

It holds copies of the modules that the nodes import, with relative imports, so nothing is installed into ComfyUI's
environment: the copies need torch, safetensors, numpy and pydantic, which ComfyUI has.
"""

import ast
import os
import re
from importlib import metadata
from pathlib import Path

from fusion.output_files import check_output, output_group

NAME = "comfyui-spectral-fusion"
_PACKAGE = Path(__file__).parents[1]  # fusion/
_ENTRY = "fusion.comfyui.nodes"
_IMPORT = re.compile(r"^(\s*)from fusion\.(\S+) import", re.MULTILINE)

_INIT = '''"""Nodes of spectral-fusion, written by `fusion comfyui`."""

from .fusion.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
'''
_PROJECT = """[project]
name = "{name}"
description = "Spectral adapters in ComfyUI: concepts and any LoRA, each at its own word of the prompt."
version = "{version}"
license = {{ text = "Apache-2.0" }}
requires-python = ">=3.11"
dependencies = []

[tool.comfy]
DisplayName = "Spectral Fusion"
"""
_README = """# Spectral adapters in ComfyUI

Put this folder into ComfyUI's `custom_nodes`; it needs no other packages. Adapters go into
`models/spectral_adapters` or `models/loras`.

**Load Spectral Adapter** and **Bind LoRA to Word** take MODEL and CLIP and return both; connect both. Then write the
token, such as `<dog>`, or the bound words into any prompt that is encoded with this CLIP.

**Find Concept Masks** returns a MASK for each concept of a prompt, for Conditioning (Set Mask). **Adapter
Compatibility** reports whether the loaded adapters disturb each other; connect Preview Any. `example_workflows` has a
graph with all four.
"""


def write_node_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the folder, whole or not at all. One that this command wrote is replaced. Raises OutputError."""

    def foreign(folder: Path) -> str:
        project = folder / "pyproject.toml"
        own = project.is_file() and f'name = "{NAME}"' in project.read_text(encoding="utf-8", errors="replace")
        return "" if own or not any(folder.iterdir()) else "it is a folder of something else"

    target = check_output(path, folder=True, foreign=foreign, overwrite=overwrite)
    with output_group(target) as group:
        folder = group / target.name
        for name, text in _texts().items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return target


def _texts() -> dict[str, str]:
    """File name -> text, of everything in the folder."""
    texts = {f"fusion/{name}": text for name, text in _modules().items()}
    texts["fusion/__init__.py"] = '"""Copies of the modules of spectral-fusion that the nodes need."""\n'
    texts["__init__.py"], texts["README.md"], texts["requirements.txt"] = _INIT, _README, ""
    texts["pyproject.toml"] = _PROJECT.format(name=NAME, version=_version())
    example = Path(__file__).with_name("example_workflow.json")
    texts["example_workflows/spectral_adapter.json"] = example.read_text(encoding="utf-8")
    return texts


def _modules() -> dict[str, str]:
    """Path below fusion/ -> source with relative imports, of every module that the nodes import."""
    texts: dict[str, str] = {}
    queue = [_ENTRY]
    while queue:
        path = _file(queue.pop())
        name = path.relative_to(_PACKAGE).as_posix()
        if name in texts or path == _PACKAGE / "__init__.py":
            continue
        source = path.read_text(encoding="utf-8")
        texts[name] = _IMPORT.sub(rf"\1from {'.' * (name.count('/') + 1)}\2 import", source)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fusion."):
                queue += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        queue.append(f"fusion.{name.rpartition('/')[0].replace('/', '.')}".rstrip("."))
    return texts


def _file(module: str) -> Path:
    """The file of a module; of a package its `__init__`; of a name in a module, that module's."""
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    if path.is_dir():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else _file(module.rpartition(".")[0])


def _version() -> str:
    try:
        return metadata.version("spectral-fusion")
    except metadata.PackageNotFoundError:
        return "0"
