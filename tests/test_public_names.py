"""The public names: each resolves, former names resolve to the same objects and warn, and a wheel carries them all."""

import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import warnings
import zipfile
from importlib import metadata

import pytest
from huggingface_hub import SpaceCard
from test_architecture import ROOT

import fusion
from fusion.errors import OutputError
from fusion.hub.space import write_space

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


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A Space, whose wheel is built as any is."""
    return write_space(tmp_path_factory.mktemp("spaces") / "space")


@pytest.mark.slow
def test_the_wheel_carries_the_stub_the_studio_and_the_assets(space):
    (wheel,) = space.glob("*.whl")
    files = {*zipfile.ZipFile(wheel).namelist()}
    assert {"fusion/__init__.pyi", "fusion/py.typed", "fusion_studio/interface.py"} <= files
    assert {"fusion_studio/style.css", "fusion_studio/widgets/regions.js"} <= files
    assert {"fusion/_assets/recipes/owl.toml", "fusion/_assets/concepts/owl/01.png"} <= files
    assert {"fusion/_assets/pocket/model_index.json", "fusion/_assets/pocket-clip/model.safetensors"} <= files
    tops = {file.split("/")[0] for file in files}
    assert tops == {"fusion", "fusion_studio", f"spectral_fusion-{wheel.name.split('-')[1]}.dist-info"}


@pytest.mark.slow
def test_a_space_has_a_card_and_what_its_wheel_needs(space, tmp_path):
    card = SpaceCard.load(space / "README.md").data
    assert (card.sdk, card.app_file, card.sdk_version) == ("gradio", "app.py", metadata.version("gradio"))
    lines = (space / "requirements.txt").read_text().splitlines()
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = {re.split(r"[<>=]", line)[0] for line in [*needed["dependencies"], "gradio"]}
    assert {re.split(r"[<>=]", line)[0] for line in lines if line[0] not in "#-"} == packages
    wheel = next(space.glob("*.whl"))
    again = write_space(space.with_name("again"), wheel=wheel)
    assert write_space(again, wheel=wheel) == again  # one's own is replaced
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(OutputError, match="it is another folder"):
        write_space(tmp_path, wheel=wheel)
    with pytest.raises(OutputError, match="no wheel of spectral-fusion"):
        write_space(tmp_path / "space", wheel=tmp_path / "letters")
    assert {path.name for path in tmp_path.iterdir()} == {"letters"}


@pytest.mark.slow
def test_a_space_passes_what_its_variables_say(space, tmp_path):
    """With a stand-in for the package, whose command line prints its words."""
    shutil.copy(space / "app.py", tmp_path)
    with zipfile.ZipFile(tmp_path / "spectral_fusion-0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("fusion/__init__.py", "")
        wheel.writestr("fusion/cli.py", "def main(words):\n    print(*words)")
    settings = {"SPACE_HOST": "user-space.hf.space", "STUDIO_ACCOUNTS": "me:pass", "STUDIO_BASE": "user/base"}
    about = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | settings
    words = [sys.executable, str(tmp_path / "app.py")]
    done = subprocess.run(words, env=about | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("studio --host 0.0.0.0 --port 7860 ")
    assert "--allowed-frame huggingface.co --allowed-host user-space.hf.space --auth " in done.stdout
    assert done.stdout.endswith(" --base user/base\n")
    assert [file.read_text() for file in tmp_path.glob("*/accounts")] == ["me:pass"]


@pytest.mark.long
def test_a_space_opens_under_its_own_name_and_in_pages_of_the_hub(space, tmp_path):
    """app.py alone, with nothing of this checkout on its path."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"SPACE_HOST": "user-space.hf.space", "GRADIO_SERVER_PORT": str(port), "TMPDIR": str(tmp_path)}
    about = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | settings
    output = (tmp_path / "output").open("w+")
    words = [sys.executable, "-u", str(space / "app.py")]
    process = subprocess.Popen(words, cwd=tmp_path, env=about, stdout=output, stderr=subprocess.STDOUT)
    frame = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
    try:
        for _ in range(600):
            output.seek(0)
            if "in a browser" in (shown := output.read()) or process.poll() is not None:
                break
            time.sleep(0.2)
        assert "Open http" in shown, shown
        status, policy = answer_of(port, {"Host": "user-space.hf.space", **frame})
        assert (status, policy) == (200, "frame-ancestors 'self' https://huggingface.co")
        assert answer_of(port, {"Host": "evil.example"})[0] == 403
        assert list(tmp_path.glob("spectral-fusion-*/fusion_studio/interface.py"))
    finally:
        process.terminate()
        process.wait()
        output.close()


def answer_of(port, headers):
    """Status and frame policy of the studio's page."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/", headers=headers)
    response = connection.getresponse()
    connection.close()
    return response.status, response.getheader("content-security-policy")
