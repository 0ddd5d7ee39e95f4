"""What is shipped beside the code: small, nothing to be unpickled, nothing of the machine it was made on."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"
FILES = sorted(path for path in ASSETS.rglob("*") if path.is_file())
KINDS = {".json", ".jpg", ".md", ".png", ".safetensors", ".toml", ".txt"}


def test_all_of_it_is_small():
    assert sum(path.stat().st_size for path in FILES) < 60e6


def test_weights_are_safetensors_and_nothing_else_needs_trust():
    assert {path.suffix for path in FILES} <= KINDS
    assert sum(path.suffix == ".safetensors" for path in FILES) == 4  # UNet, text encoder, autoencoder, judge


def test_no_file_names_the_folders_of_its_maker():
    texts = [path.read_text(encoding="utf-8") for path in FILES if path.suffix in {".json", ".toml", ".md"}]
    assert texts
    assert not [text for text in texts for home in ("/root/", "/home/", "/tmp/", "/Users/") if home in text]
