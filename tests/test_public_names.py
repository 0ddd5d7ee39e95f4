"""The public names: each resolves, former names resolve to the same objects and warn, and a wheel carries them all."""

import subprocess
import sys
import warnings
import zipfile

import pytest
from test_architecture import ROOT

import fusion

# Public names of 0.1. They resolve, some with a warning, until 0.3.
FORMER = """
    ADAPTERS Adapter Cancelled Cell Concept FusionError Library METHODS MethodOptions PRESETS Picture Recipe Region
    SCHEDULERS SliceMap SpectralSlice TrainStep TrainingConfig attach bake base_defaults base_info compare
    compatibility contact_sheet cross_talk evaluate examine export foresee fuse generate interference keep_settings
    load load_moments load_picture merge_error open_judge open_pipeline pocket preset recipe_of record_moments save
    save_moments slice_map train unfinished
"""


@pytest.mark.parametrize("name", fusion.__all__)
def test_every_public_name_resolves_without_a_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(fusion, name) is not None


@pytest.mark.parametrize(("old", "new"), fusion._RENAMED.items())
def test_a_former_name_is_the_same_object_and_warns_once_a_use(old, new):
    for _ in range(2):
        with pytest.warns(FutureWarning, match=f"fusion.{old} is now fusion.{new}") as caught:
            assert getattr(fusion, old) is getattr(fusion, new)
        assert len(caught) == 1
        assert caught[0].filename == __file__, "the warning names the caller's line"


def test_no_name_of_the_last_version_is_lost():
    assert {*FORMER.split()} <= {*fusion.__all__, *fusion._RENAMED}


def test_former_names_are_listed_nowhere():
    assert not fusion._RENAMED.keys() & {*fusion.__all__, *dir(fusion)}
    assert {*fusion._RENAMED.values()} <= {*fusion.__all__}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'fusion' has no attribute 'nothing'"):
        fusion.nothing  # noqa: B018


@pytest.mark.slow
def test_the_wheel_carries_the_stub_the_studio_and_the_assets(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = {*zipfile.ZipFile(wheel).namelist()}
    assert {"fusion/__init__.pyi", "fusion/py.typed", "fusion_studio/interface.py"} <= files
    assert {"fusion_studio/style.css", "fusion_studio/widgets/regions.js"} <= files
    assert {"fusion/_assets/recipes/owl.toml", "fusion/_assets/concepts/owl/01.png"} <= files
    assert {"fusion/_assets/pocket/model_index.json", "fusion/_assets/pocket-clip/model.safetensors"} <= files
    tops = {file.split("/")[0] for file in files}
    assert tops == {"fusion", "fusion_studio", f"spectral_fusion-{wheel.name.split('-')[1]}.dist-info"}
