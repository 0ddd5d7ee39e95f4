"""`fusion demo` and `fusion studio`, which need no make, and end well where the base is open in half precision."""

from functools import partial

import pytest
from PIL import Image

import fusion
import tiny
from fusion.cli import main
from fusion.models import devices, pipelines


@pytest.mark.long
def test_the_demo_in_bfloat16_as_on_a_gpu(tmp_path, monkeypatch, capsys):
    base = tmp_path / "base"
    monkeypatch.setattr(tiny, "tokenizer", partial(tiny.tokenizer, length=160))  # words that it spells in letters
    tiny.pipeline("sd1").save_pretrained(base)
    settings = "[training]\nmax_train_steps = 1\nrank = 2\ntrain_batch_size = 1\n[generation]\nsteps = 1\n"
    (base / "fusion.toml").write_text(settings)
    monkeypatch.setattr(pipelines, "pocket", lambda: base)
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 0}))
    monkeypatch.setenv("FUSION_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "demo"
    assert main(["demo", "--device", "cpu", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "opened in bfloat16" in shown.err and "error" not in shown.err
    assert {path.name for path in out.glob("*.png")} == {"sheet.png", "slices.png", "all.png"} | {
        f"{name}.png" for name in ("octopus", "robot", "owl")
    }
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 1000
    adapters = [fusion.load(out / f"{name}.safetensors") for name in ("octopus", "robot", "owl")]
    assert [adapter.info.provenance.settings["mixed_precision"] for adapter in adapters] == ["bf16"] * 3
    assert len({directions for adapter in adapters for directions in adapter.slices}) == 3


def test_the_studio_without_gradio_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("fusion.cli.studio.find_spec", {"gradio": None}.get)
    assert main(["studio"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "pip install 'spectral-fusion[app]'" in shown
