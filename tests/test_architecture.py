"""The architecture, read from the syntax trees: imports point downwards, third-party packages stay in their layer,
the studio sees only the public API, files stay small, names are plain.

A module of `fusion/` that stands on no layer is a failure.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. Names on one line are siblings: they may not import each other.
LAYERS = [
    ["errors"],
    ["config", "layer_names", "output_files", "progress", "prompt_syntax", "spectral"],
    ["adapters", "methods"],
    ["formats", "models"],
    ["base_models", "distillation"],
    ["composition", "generation", "library"],
    ["comfyui", "training", "evaluation", "peft"],
    ["hub"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Third-party packages by layer; the other layers may use whatever the library depends on, never the app's.
ALLOWED = {
    "errors": set(),
    "config": {"pydantic"},
    "layer_names": set(),
    "progress": set(),
    "prompt_syntax": set(),
    "output_files": set(),
    "spectral": {"torch"},
    "adapters": {"torch"},
    "methods": {"torch", "peft"},
    "formats": {"torch", "safetensors", "pydantic", "PIL", "numpy", "huggingface_hub"},
    "library": {"torch", "filelock"},
    "comfyui": {"torch", "safetensors", "comfy", "folder_paths"},
}
# Locks are the library's alone.
DEPENDENCIES = {
    *("torch", "diffusers", "transformers", "accelerate", "safetensors", "peft", "huggingface_hub"),
    *("pydantic", "tqdm", "numpy", "PIL", "matplotlib", "psutil"),
}
# Modules are named for what they hold, in the words of diffusers and PEFT: no drawers for odds and ends, no metaphors.
BANNED_MODULES = {
    *("utils", "util", "common", "helpers", "helper", "misc"),
    *("branches", "injection", "prompts", "conditioning", "locating", "recording", "bases", "families", "names"),
    *("native", "reading", "exporting", "verdict", "conflicts", "measures", "activations", "ownership", "folders"),
    *("captions", "examination", "preparation", "surroundings", "quiet", "interruption", "survival", "foresight"),
    *("judge", "contact", "looks", "notices", "turns", "teaching", "workplace"),
}
# Public names say what a thing is: no participles for things, no metaphors.
BANNED_WORDS = {
    *("asked", "drawn", "found", "given", "got", "heard", "held", "kept", "learned", "looked", "made", "met", "said"),
    *("seen", "shown", "spoiled", "strange", "taken", "told", "wanted", "whereabouts"),
    *("ear", "knob", "look", "loud", "loudness", "quietly", "spoil", "voice", "whisper"),
}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
FUSION = sorted(ROOT.glob("fusion/**/*.py"))
APP = sorted(ROOT.glob("app/**/*.py"))
# The package's own __init__ and __main__ stand above all layers.
MODULES = [p for p in FUSION if p.parent != ROOT / "fusion" or not p.stem.startswith("__")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT / "fusion").with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Absolute dotted names imported anywhere in the file, relative imports resolved."""
    package = path.relative_to(ROOT).parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names} | ({source} - {"fusion"})
    return found


def third_party(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - {"fusion", "fusion_studio"}


def public_definitions(path: Path) -> set[str]:
    """Names of the functions and classes that a module defines at its top."""
    kinds = (*FUNCTION, ast.ClassDef)
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, kinds)}


def public_nodes(path: Path) -> list[ast.stmt]:
    """What stands at the top of a module, and in its public classes, less what a leading underscore makes private."""
    top = ast.parse(path.read_text(encoding="utf-8")).body
    nodes = [
        *top,
        *(node for part in top if isinstance(part, ast.ClassDef) and part.name[0] != "_" for node in part.body),
    ]
    return [node for node in nodes if not isinstance(node, FUNCTION) or not node.name.startswith("_")]


def arguments_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """All but *args, **kwargs, self and cls."""
    of = node.args
    return [a for a in [*of.posonlyargs, *of.args, *of.kwonlyargs] if a.arg not in ("self", "cls")]


def lines(paths: list[Path]) -> dict[str, int]:
    return {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path):
    own = layer_of(path)
    assert own in RANK, f"{own} stands on no layer: add it to LAYERS"
    assert "fusion" not in imports(path), "name the module: the package root is for users"
    used = {name.split(".")[1] for name in imports(path) if name.startswith("fusion.")} - {own}
    assert used <= RANK.keys(), f"{sorted(used - RANK.keys())} are no modules of a layer"
    for other in sorted(used):
        assert RANK[other] < RANK[own], f"{own} may not import {other}: it is not a lower layer"


@pytest.mark.parametrize("path", FUSION, ids=name_of)
def test_third_party_packages_stay_in_their_layer(path):
    allowed = ALLOWED.get(layer_of(path), DEPENDENCIES)
    assert third_party(path) <= allowed, f"only {sorted(allowed) or 'the standard library'} may be used here"


@pytest.mark.parametrize("path", APP, ids=name_of)
def test_the_app_uses_only_the_public_api(path):
    inside = sorted(name for name in imports(path) if name.startswith("fusion."))
    assert not inside, f"write `import fusion`, not {inside}"


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["fusion"], {"torch", "diffusers", "transformers"}),
        ([f"fusion.formats.{path.stem}" for path in ROOT.glob("fusion/formats/[a-z]*.py")], {"filelock", "diffusers"}),
        (["fusion.training.config"], {"filelock", "torch"}),
    ],
    ids=["fusion", "formats", "training settings"],
)
def test_importing_one_part_does_not_import_another(modules, absent):
    code = f"import sys, {', '.join(modules)}; print(*sys.modules.keys() & {absent})"
    imported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert imported.stdout.split() == []


def test_a_file_has_350_lines_at_most():
    assert {name: count for name, count in lines([*FUSION, *APP]).items() if count > 350} == {}


@pytest.mark.parametrize("path", [*FUSION, *APP], ids=name_of)
def test_modules_are_named_for_what_they_hold(path):
    assert not {*path.relative_to(ROOT).with_suffix("").parts} & BANNED_MODULES
    # `fusion.fuse` the function would hide `fusion.fuse` the module: modules are nouns, functions verbs.
    assert path.stem not in public_definitions(path), "a public name hides its own module"


@pytest.mark.parametrize("path", [*FUSION, *APP], ids=name_of)
def test_public_names_say_what_a_thing_is(path):
    nodes = public_nodes(path)
    functions = {node.name for node in nodes if isinstance(node, FUNCTION)}
    fields = {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    arguments = {argument.arg for node in nodes if isinstance(node, FUNCTION) for argument in arguments_of(node)}
    names = functions | {name for name in fields | arguments if not name.startswith("_")}
    assert {name for name in names if {*name.split("_")} & BANNED_WORDS} == set()


@pytest.mark.parametrize("path", [p for p in FUSION if layer_of(p) != "cli"], ids=name_of)
def test_public_arguments_have_types(path):
    """A protocol, `fusion.models.pipeline.Pipeline` for one, says what is needed where a class would be too narrow."""
    untyped = {
        f"{node.name}({argument.arg})"
        for node in public_nodes(path)
        if isinstance(node, FUNCTION)
        for argument in arguments_of(node)
        if argument.annotation is None or ast.unparse(argument.annotation) in ("Any", "Any | None")
    }
    assert untyped == set()


def test_public_names_hide_no_module():
    import fusion

    modules = {path.stem for path in (ROOT / "fusion").iterdir() if not path.name.startswith("_")}
    assert not {*getattr(fusion, "__all__", ())} & modules
