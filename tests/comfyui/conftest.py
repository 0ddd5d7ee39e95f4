"""A real ComfyUI, where COMFYUI_DIR names a checkout, and one toy model in its classes and in diffusers'."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = os.environ.get("COMFYUI_DIR", "")


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory):
    """The folder that `fusion comfyui` writes."""
    from fusion.comfyui.node_folder import write_node_folder

    return write_node_folder(tmp_path_factory.mktemp("custom_nodes") / "comfyui-spectral-fusion")


@pytest.fixture(scope="session")
def comfyui():
    """ComfyUI, imported without its command line."""
    if not ROOT:
        pytest.skip("COMFYUI_DIR names no checkout of ComfyUI")
    if not (Path(ROOT) / "comfy").is_dir():
        pytest.fail(f"COMFYUI_DIR={ROOT} is no checkout of ComfyUI")
    sys.path.append(ROOT)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import nodes

    return nodes


@pytest.fixture(scope="session")
def spectral(comfyui, node_folder):
    """The nodes, imported as ComfyUI imports a folder of custom_nodes."""
    name = "comfyui_spectral_fusion_under_test"
    spec = importlib.util.spec_from_file_location(
        name, node_folder / "__init__.py", submodule_search_locations=[str(node_folder)]
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS


@pytest.fixture
def folders(comfyui, tmp_path):
    """ComfyUI's folders of adapters and of temporary files."""
    import folder_paths

    adapters = tmp_path / "models"
    adapters.mkdir()
    before = folder_paths.get_temp_directory(), dict(folder_paths.folder_names_and_paths)
    folder_paths.set_temp_directory(str(tmp_path / "temp"))
    folder_paths.folder_names_and_paths["spectral_adapters"] = ([str(adapters)], {".safetensors"})
    folder_paths.filename_list_cache.clear()
    yield adapters
    folder_paths.set_temp_directory(before[0])
    folder_paths.folder_names_and_paths.clear()
    folder_paths.folder_names_and_paths.update(before[1])


@pytest.fixture(scope="session")
def toys(comfyui):
    """family -> a Toy, made once."""
    from comfy_toys import Toy

    cache: dict[str, Toy] = {}

    def toy(family):
        if family not in cache:
            cache[family] = Toy(family)
        return cache[family]

    return toy
