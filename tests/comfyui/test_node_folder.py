"""The folder that `fusion comfyui` writes: what it needs of its host, and its example. Without ComfyUI."""

import ast
import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import fusion
import tiny
from fusion.cli import main
from fusion.comfyui.nodes import NODE_CLASS_MAPPINGS
from trained import trained_adapter

LINKED = ("MODEL", "CLIP", "CONDITIONING", "LATENT")
WIDGETS = {"STRING": str, "INT": int, "FLOAT": float}
# Everything is blocked but the standard library and what ComfyUI has, with what that imports in turn.
BLOCKED = """
import importlib.util, sys
import numpy, pydantic, safetensors.torch, torch
known = {name.partition(".")[0] for name in sys.modules} | sys.stdlib_module_names | {"nodes_under_test"}
known |= {"annotated_types", "typing_inspection", "sympy", "mpmath", "networkx", "jinja2", "filelock", "fsspec"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in known and not name.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"{name} may not be imported")

sys.meta_path.insert(0, Block())
folder, adapter = sys.argv[1:]
spec = importlib.util.spec_from_file_location("nodes_under_test", folder + "/__init__.py",
                                              submodule_search_locations=[folder])
package = sys.modules["nodes_under_test"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from nodes_under_test.fusion.comfyui import adapter_report, attachment, concept_masks
from nodes_under_test.fusion.formats.adapter_file import load
print(sorted(package.NODE_CLASS_MAPPINGS), len(load(adapter).deltas()))
print(sorted({"torch._dynamo", "fusion", "transformers", "diffusers", "peft", "PIL"} & sys.modules.keys()))
"""


def test_nodes_import_nothing_that_comfyui_lacks(node_folder, tmp_path):
    """Not even an installed spectral-fusion, and not torch._dynamo, which takes seconds."""
    adapter = trained_adapter(tiny.pipeline("sd1"))
    fusion.save(adapter, tmp_path / "rex.safetensors")
    words = [sys.executable, "-c", BLOCKED, str(node_folder), str(tmp_path / "rex.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{sorted(NODE_CLASS_MAPPINGS)} {len(adapter.deltas())}", "[]"]
    names = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for path in node_folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for alias in node.names
    }
    here = {"torch", "safetensors", "numpy", "pydantic", "comfy", "folder_paths"}
    # For annotations alone, and inside a function that no node calls.
    assert names - sys.stdlib_module_names - here == {"PIL", "huggingface_hub"}
    assert (node_folder / "requirements.txt").read_text() == ""
    assert "[tool.comfy]" in (node_folder / "pyproject.toml").read_text()


def test_the_example_fits_the_nodes(node_folder, monkeypatch):
    """Every link joins an output to an input of its type, and every widget of our nodes has a value of its kind."""
    samplers = ModuleType("comfy.samplers")
    samplers.KSampler = SimpleNamespace(SAMPLERS=["euler"], SCHEDULERS=["normal"])
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)
    monkeypatch.setattr("fusion.comfyui.nodes._files", lambda: ["dog.safetensors", "knight.safetensors"])
    (path,) = (node_folder / "example_workflows").iterdir()
    workflow = json.loads(path.read_text())
    by_number = {node["id"]: node for node in workflow["nodes"]}
    for number, source, output, target, slot, kind in workflow["links"]:
        assert by_number[source]["outputs"][output]["type"] == kind
        assert by_number[target]["inputs"][slot]["type"] in (kind, "*")
        assert number in by_number[source]["outputs"][output]["links"]
        assert by_number[target]["inputs"][slot]["link"] == number
    types = {node["type"] for node in workflow["nodes"]}
    assert set(NODE_CLASS_MAPPINGS) <= types
    for node in workflow["nodes"]:
        if (kind := NODE_CLASS_MAPPINGS.get(node["type"])) is not None:
            inputs = kind.INPUT_TYPES()["required"]
            links = {name: spec[0] for name, spec in inputs.items() if spec[0] in LINKED}
            assert {slot["name"]: slot["type"] for slot in node["inputs"]} == links
            values = iter(node["widgets_values"])
            for form, *options in (spec for name, spec in inputs.items() if name not in links):
                value = next(values)
                assert value in form if isinstance(form, list) else isinstance(value, WIDGETS[form])
                if options and options[0].get("control_after_generate"):
                    assert next(values) in ("fixed", "increment", "decrement", "randomize")
            assert list(values) == []
            assert [output["type"] for output in node["outputs"]] == list(kind.RETURN_TYPES)
            assert [output["name"] for output in node["outputs"]] == list(
                getattr(kind, "RETURN_NAMES", kind.RETURN_TYPES)
            )


def test_a_folder_of_something_else_is_not_replaced(tmp_path, capsys):
    folder = tmp_path / "nodes"
    assert main(["comfyui", "-o", str(folder)]) == 0
    (folder / "stale.py").touch()
    assert main(["comfyui", "-o", str(folder)]) == 0
    assert not (folder / "stale.py").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    assert main(["comfyui", "-o", str(tmp_path / "other")]) == 1
    assert "it is a folder of something else" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]
