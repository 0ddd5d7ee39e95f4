"""Adapters on the Hub, by its own client against a hub on loopback: pushed, read by id, at a revision, from the cache
offline; what goes wrong is one line. A user of diffusers needs nothing of this package."""

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image

import fusion
import tiny
from fusion.cli import main
from fusion.errors import DatasetError, FormatError, OutputError
from fusion.formats.hub_file import HUB_FILE, hub_id
from fusion.library.library_folder import Library
from trained import attached, draw, trained_adapter

WRONG = {
    "me/nothing": "there is no such repository",
    "me/rex@v9": "it has no such branch, tag or commit",
    "me/model": f"it has no file {HUB_FILE}",
    "me/rex@a/../b": "is no file|no such branch|Invalid|no id",
}


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline("sd1")


@pytest.fixture
def adapters(pipe):
    """Two states of <rex>."""
    return trained_adapter(pipe), trained_adapter(pipe)


def pushed(hub, adapter, **options):
    """The commit of a push to me/rex."""
    fusion.push(adapter, "rex", **options)
    return hub.repositories["me/rex"][-1][0]


def test_an_adapter_comes_back_by_id_at_a_revision_and_from_the_cache(hub, adapters, tmp_path, monkeypatch):
    first, second = adapters
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(DatasetError, match="is no PNG"):
        fusion.push(first, "rex", pictures={str(tmp_path / "no.png"): ""})
    assert not hub.repositories
    commit = pushed(hub, first, dtype="float32")
    assert "me/rex" in hub.private
    assert fusion.load("me/rex").digest() == first.digest()
    pushed(hub, second, dtype="float32")
    assert fusion.load("me/rex").digest() == second.digest()
    assert fusion.load(f"me/rex@{commit}").digest() == first.digest()
    stored = Library(tmp_path / "library").add("me/rex")
    assert stored.name == "rex.safetensors" and fusion.load(stored).info.concepts == second.info.concepts
    downloads = [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    assert {line.rpartition("/")[2] for line in downloads} == {HUB_FILE} and len(downloads) == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.close()
    assert fusion.load("me/rex").digest() == second.digest()
    assert fusion.load(f"me/rex@{commit}").digest() == first.digest()
    with pytest.raises(FormatError, match="HF_HUB_OFFLINE is set, and the cache does not have it"):
        fusion.load("me/other")
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE"):
        fusion.push(first, "me/rex")


def test_a_hub_that_does_not_answer_is_one_line(hub, adapters, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between tries
    pushed(hub, adapters[0], dtype="float32")
    fusion.load("me/rex")
    hub.close()
    assert fusion.load("me/rex").digest() == adapters[0].digest()  # as the cache has it
    with pytest.raises(FormatError, match="does not answer, and the cache"):
        fusion.load("me/other")


def test_wrong_ids_are_one_line(hub, adapters, capsys, monkeypatch, tmp_path):
    pushed(hub, adapters[0])
    hub.repositories["me/model"] = [("1" * 40, {"README.md": b"somebody's", "model.safetensors": b""})]
    for name, reason in WRONG.items():
        with pytest.raises(FormatError, match=reason):
            fusion.load(name)
    assert main(["inspect", "me/nothing"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setattr("fusion.formats.hub_file.MAX_SIZE", 100)
    before = len(hub.requests)
    with pytest.raises(FormatError, match="at most"):
        fusion.load("me/rex")
    assert not [line for line in hub.requests[before:] if line.startswith("GET") and "/resolve/" in line]
    with pytest.raises(OutputError, match="'me/model' holds another kind of model"):
        fusion.push(adapters[0], "me/model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(OutputError, match="hf auth login"):
        fusion.push(adapters[0], "me/rex")


def test_paths_are_no_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/dog").touch()
    for path in ("out/dog", "out/typo", "me/dog.safetensors", "dog", "./me/dog", "/me/dog", "me/dog/x", "me/dog@"):
        assert hub_id(path) is None
    assert hub_id("me/dog-v1.5") == ("me/dog-v1.5", None)
    assert hub_id("out/dog2@v1") == ("out/dog2", "v1") and hub_id(tmp_path.__class__("me/dog")) == ("me/dog", None)


def test_the_card_and_the_files_for_users_of_diffusers(hub, pipe, adapters, tmp_path):
    picture = tmp_path / "private name.png"
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(picture)
    pushed(hub, trained_adapter(pipe, "<tom>"))
    _, files = hub.files("me/rex")
    assert "pytorch_lora_weights_tom.safetensors" in files
    pushed(hub, adapters[0], pictures={picture: "a <rex> in the snow"}, base="me/a-base", dtype="float32")
    _, files = hub.files("me/rex")
    lora, rows = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_rex.safetensors"
    assert files.keys() == {".gitattributes", "README.md", "images/picture-1.png", HUB_FILE, lora, rows}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.instance_prompt) == ("me/a-base", "a <rex>")
    assert {"spectral-adapter", "diffusers", "lora", "template:sd-lora", "stable-diffusion"} <= {*card.data.tags}
    assert card.data.widget == [{"text": "a <rex> in the snow", "output": {"url": "images/picture-1.png"}}]
    assert "You should use `<rex>` (a dog)" in card.text and "private name" not in card.content
    bare = "\n".join(part for n, part in enumerate(card.text.split("`")) if n % 2 == 0)
    assert "<rex>" not in bare  # HTML would hide it

    with attached(pipe, adapters[0], gating="none"):
        ours = draw(pipe, "a photo of <rex>")
    theirs = tiny.pipeline("sd1")
    blocks = card.text.split("```python\n")[1:]
    for line in blocks[1].partition("```")[0].splitlines():
        if line.startswith("pipe.load"):  # exactly what the card says
            exec(line, {"pipe": theirs})
    assert torch.allclose(draw(theirs, "a photo of <rex>"), ours, atol=1e-4)
    compile(blocks[0].partition("```")[0], "card", "exec")


def test_the_card_of_an_sdxl_adapter_is_python_too(hub):
    pipe = tiny.pipeline("sdxl")
    adapter = trained_adapter(pipe)
    pushed(hub, adapter, dtype="float32")
    card = ModelCard(hub.files("me/rex")[1]["README.md"].decode())
    with attached(pipe, adapter, gating="none"):
        ours = draw(pipe, "a photo of <rex>")
    theirs = tiny.pipeline("sdxl")
    block = card.text.split("```python\n")[2].partition("```")[0]
    lines = [line for line in block.splitlines() if "from_pretrained" not in line and "images[0]" not in line]
    exec("\n".join(lines), {"pipe": theirs})
    assert torch.allclose(draw(theirs, "a photo of <rex>"), ours, atol=1e-4)


@pytest.mark.slow
def test_a_session_at_the_terminal(hub, pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("base")
    (tmp_path / "base/fusion.toml").write_text("[generation]\nsteps = 2\n")
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save("photos/0.png")
    words = ["train", "--base", "base", "--instance_data_dir", "photos", "--token", "<rex>", "--noun", "dog"]
    words += ["--rank", "4", "--resolution", "16", "--max_train_steps", "2"]
    assert main([*words, "--hub_model_id", "me/rex"]) == 2
    assert main([*words, "--push_to_hub", "--hub_model_id", "me/rex", "--hub_private_repo", "false"]) == 0
    shown = capsys.readouterr().out
    assert f"pushed rex: {hub.url}/me/rex" in shown and "me/rex" not in hub.private
    assert "images/picture-1.png" in hub.files("me/rex")[1]
    draw_it = ["generate", "me/rex", "--base", "base", "--prompt", "a <rex>"]
    assert main([*draw_it, "-o", "first.png"]) == 0
    commit = hub.files("me/rex")[0]
    assert fusion.recipe_of("first.png").adapters[0].file == f"me/rex@{commit}"
    assert main(["push", "out/rex.safetensors", "me/rex", "--picture", "first.png"]) == 0
    assert fusion.load("me/rex").info.name == "rex"
    assert ModelCard(hub.files("me/rex")[1]["README.md"].decode()).data.widget[0]["text"] == "a <rex>"
    assert main(["generate", "--from", "first.png", "--base", "base", "-o", "again.png"]) == 0
    assert (np.asarray(Image.open("first.png")) == np.asarray(Image.open("again.png"))).all()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    capsys.readouterr()
    assert main([*words, "--push_to_hub", "--hub_token", "hf_secret"]) == 1
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == 1 and "hf auth login" in output.err and "training" not in output.out
