"""One rule for device and precision, with CUDA's answers faked."""

import contextlib
import logging
import shutil

import pytest
import torch

import fusion
import tiny
from fusion.errors import ConfigError
from fusion.models import devices
from fusion.models.devices import as_device, as_dtype, half_precision
from fusion.models.stored_weights import stored_parameters

CPU = torch.device("cpu")


@pytest.fixture
def cards(monkeypatch):
    """CUDA's answers on a machine with two cards: the first computes in bfloat16, the second only emulates it."""
    current = [0]

    @contextlib.contextmanager
    def chosen(index):
        current[0] = max(index, 0)
        yield
        current[0] = 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", chosen)
    supported = lambda including_emulation=True: including_emulation or current[0] == 0  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)


def test_a_card_is_used_in_the_precision_that_it_computes_in(cards):
    assert str(as_device(None)) == "cuda" and str(as_device("gpu")) == "cuda" and str(as_device("cuda:1")) == "cuda:1"
    assert as_dtype(None, torch.device("cuda")) == as_dtype(None, torch.device("cuda:0")) == torch.bfloat16
    assert as_dtype(None, torch.device("cuda:1")) == torch.float16
    assert as_dtype("float32", torch.device("cuda:1")) == torch.float32
    assert as_dtype(None, as_device("cpu")) == torch.float32
    with pytest.raises(ConfigError, match=r"^There is no device 'cuda:2' here; there is cpu, cuda:0, cuda:1.$"):
        as_device("cuda:2")


def test_apples_gpu_computes_in_bfloat16_from_macos_14(monkeypatch):
    for version, dtype in (((14, 0), torch.bfloat16), ((13, 3), torch.float16)):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *asked, v=version: asked <= v)
        assert half_precision(torch.device("mps")) == dtype


def test_a_card_beside_a_torch_without_cuda_is_told_in_one_line_with_the_command(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", {"nvidia-smi": "/usr/bin/nvidia-smi"}.get)
    monkeypatch.setattr(torch.version, "cuda", None)
    for name in ("cuda", "cuda:1", "gpu"):
        with pytest.raises(ConfigError) as raised:
            as_device(name)
        assert "\n" not in str(raised.value) and str(raised.value).endswith(devices.INSTALL_CUDA)
    assert as_device("cpu") == CPU and not caplog.records
    assert as_device(None) == CPU and devices.INSTALL_CUDA in caplog.messages[0]
    monkeypatch.setattr(shutil, "which", {}.get)
    with pytest.raises(ConfigError, match=r"^There is no device 'cuda' here; there is cpu.$"):
        as_device("cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny.pipeline("sd2").save_pretrained(folder)
    return folder


def parameters(pipe):
    parts = (pipe.unet, pipe.text_encoder, pipe.vae)
    return sum(tensor.numel() for part in parts for tensor in part.state_dict().values())


def test_a_base_that_would_take_more_than_half_of_the_memory_is_opened_in_half_precision(folder, monkeypatch, caplog):
    count = parameters(tiny.pipeline("sd2"))
    assert stored_parameters(folder) == count
    for name, other in (("unet", ".fp16"), ("vae", ".fp16")):  # a second variant of a component is no second component
        file = folder / name / "diffusion_pytorch_model.safetensors"
        shutil.copy(file, file.with_suffix(f"{other}.safetensors"))
    assert stored_parameters(folder) == count
    memory = type("Memory", (), {"available": 2 * 5.3 * count})
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: memory)
    assert fusion.open_pipeline(folder, device="cpu").unet.dtype == torch.float32 and not caplog.records
    memory.available -= 10
    assert fusion.open_pipeline(folder, device="cpu").unet.dtype == torch.bfloat16
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert fusion.open_pipeline(folder, device="cpu", dtype="float32").unet.dtype == torch.float32
