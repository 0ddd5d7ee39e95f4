"""The studio as a Space on the Hugging Face Hub: a folder with the package's wheel in it, since it is on no index."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

from fusion.errors import OutputError
from fusion.formats.hub_file import LIBRARY
from fusion.output_files import carries_mark, check_output, output_group

_ROOT = Path(__file__).parents[2]
# On a CPU without the packages for CUDA, which are several gigabytes.
_REQUIREMENTS = "# Without the next line, PyTorch is that for NVIDIA's GPUs.\n--extra-index-url {index}\n{packages}\n"
_INDEX = "https://download.pytorch.org/whl/cpu"
_APP = '''"""The studio of spectral-fusion, from the wheel beside this file."""

import os
import sys
import tempfile
import zipfile
from pathlib import Path

here, packages = Path(__file__).resolve().parent, tempfile.mkdtemp(prefix="spectral-fusion-")
with zipfile.ZipFile(next(here.glob("spectral_fusion-*.whl"))) as wheel:
    wheel.extractall(packages)  # it has no compiled code, so nothing else has to be installed
sys.path.insert(0, packages)

from fusion.cli import main  # noqa: E402

words = ["studio", "--host", "0.0.0.0", "--port", os.environ.get("GRADIO_SERVER_PORT", "7860")]
words += ["--library", str((Path("/data") if Path("/data").is_dir() else here) / "adapters")]
words += ["--allowed-frame", "huggingface.co"]  # whose pages show Spaces
if name := os.environ.get("SPACE_HOST"):
    words += ["--allowed-host", name]
if accounts := os.environ.get("STUDIO_ACCOUNTS"):  # a secret of the Space: lines of the form name:password
    Path(packages, "accounts").write_text(accounts, encoding="utf-8")
    words += ["--auth", str(Path(packages, "accounts"))]
if base := os.environ.get("STUDIO_BASE"):  # a hub id; else the embedded pocket, which a CPU draws in seconds
    words += ["--base", base]
sys.exit(main(words))
'''
_TEXT = """# spectral-fusion

Teach Stable Diffusion concepts and draw them together, on the embedded base *pocket* (128 pixels) on a CPU at once.

* Everybody who can open this Space uses one queue and one library, and can delete from it. Make it private, or set the
  secret `STUDIO_ACCOUNTS` to lines of the form `name:password`.
* The variable `STUDIO_BASE` names another base, such as `stable-diffusion-v1-5/stable-diffusion-v1-5`. That wants a
  GPU, and the line of `requirements.txt` with PyTorch's index has to be deleted.
* Adapters are in `adapters/`, or in `/data/adapters` where the Space has storage that outlives a restart.
"""


def write_space(folder: Path, *, wheel: Path | None = None, title: str = LIBRARY, overwrite: bool = False) -> Path:
    """Write the folder of a Space: card, app.py, requirements and the package's wheel.

    `wheel` is one of this package; without one, it is built from the checkout that this code runs from. An earlier
    folder of a Space is replaced, another one with `overwrite` only. Raises OutputError.
    """
    from huggingface_hub import SpaceCard, SpaceCardData

    def foreign(existing: Path) -> str:
        ours = carries_mark(existing / "README.md") or not any(existing.iterdir())
        return "" if ours else "it is another folder"

    target = check_output(folder, folder=True, foreign=foreign, overwrite=overwrite)
    if wheel is not None:
        _requirements(wheel)  # before anything is written
    with output_group(target) as group:
        space = group / target.name
        space.mkdir()
        file = _built(space) if wheel is None else space / wheel.name
        if wheel is not None:
            file.write_bytes(wheel.read_bytes())
        card = SpaceCardData(
            title=title, sdk="gradio", sdk_version=_version("gradio"), app_file="app.py", license="apache-2.0",
            python_version=f"{sys.version_info.major}.{sys.version_info.minor}", tags=["spectral-adapter", LIBRARY],
            emoji="\N{OCTOPUS}", colorFrom="purple", colorTo="gray",
        )  # fmt: skip
        (space / "app.py").write_text(_APP, encoding="utf-8")
        packages = "\n".join(_requirements(file))
        (space / "requirements.txt").write_text(_REQUIREMENTS.format(index=_INDEX, packages=packages), encoding="utf-8")
        SpaceCard(f"---\n{card.to_yaml()}\n---\n\n{_TEXT}").save(space / "README.md")
    return target


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _built(folder: Path) -> Path:
    """The wheel of the checkout that this code runs from, built into `folder`."""
    advice = "name a wheel of spectral-fusion with --wheel (wheel=)."
    if not (_ROOT / "pyproject.toml").is_file():
        raise OutputError(f"This code runs from no checkout of which a wheel could be built; {advice}")
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    done = subprocess.run([sys.executable, *words, str(folder), str(_ROOT)], capture_output=True, text=True)
    files = list(folder.glob("*.whl"))
    if done.returncode or len(files) != 1:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OutputError(f"The wheel could not be built ({reason}); {advice}")
    return files[0]


def _requirements(wheel: Path) -> list[str]:
    """What the package and its studio need, from the wheel itself."""
    try:
        with zipfile.ZipFile(wheel) as file:
            (name,) = (n for n in file.namelist() if n.startswith("spectral_fusion-") and n.endswith("/METADATA"))
            entries = Parser().parsestr(file.read(name).decode("utf-8")).get_all("Requires-Dist") or []
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise OutputError(
            f"'{wheel.name}' is no wheel of spectral-fusion: {getattr(error, 'strerror', None) or error}."
        ) from error
    pairs = [[part.strip() for part in entry.partition(";")[::2]] for entry in entries]
    return [package for package, condition in pairs if condition.replace('"', "'") in ("", "extra == 'app'")]
