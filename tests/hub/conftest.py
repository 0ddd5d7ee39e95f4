"""The Hub on loopback, and its own client pointed at it."""

import pytest
from huggingface_hub import constants
from loopback_hub import LoopbackHub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The client reads its environment at import, so what it has read is changed."""
    server = LoopbackHub()
    for name, value in {
        "ENDPOINT": server.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.close()
