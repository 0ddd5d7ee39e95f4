"""Outputs of every verb: checked before the work, replaced only where they are one's own, and never lost."""

import os
import shlex
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from test_output_files import files_of_at_most

import fusion
import tiny
from fusion.cli import main
from fusion.errors import OutputError
from fusion.training import loop
from fusion.training.optimizers import PACKAGES
from fusion.training.setup import named_parameters
from trained import trained_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "tiny-sd1"
    tiny.pipeline("sd1").save_pretrained(folder)
    (folder / "fusion.toml").write_text("[generation]\nsteps = 1\n")
    return str(folder)


@pytest.fixture(scope="module")
def dog():
    return trained_adapter(tiny.pipeline("sd1"), "<dog>")


@pytest.fixture
def place(tmp_path, monkeypatch, dog):
    """A working folder with an adapter, a folder of pictures and a file of somebody else's."""
    monkeypatch.chdir(tmp_path)
    fusion.save(dog, "dog.safetensors")
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0)
    for number in range(2):
        pixels = noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path


def words_of_training(base, *more):
    words = ["train", "--base", base, "--instance_data_dir", "photos", "--token", "<dog>", "--noun", "dog"]
    settings = ["--rank", "4", "--max_train_steps", "3", "--resolution", "16", "--num_validation_images", "0"]
    return [*words, *settings, "--learning_rate", "0.1", *more]


COMMANDS = {
    "train": [*words_of_training("nowhere"), "--library", "{}"],
    "fuse": ["fuse", "dog.safetensors", "-o", "{}/y.safetensors"],
    "export": ["export", "dog.safetensors", "--to", "kohya", "-o", "{}/x.safetensors"],
    "generate": ["generate", "--prompt", "a dog", "--base", "nowhere", "-o", "{}/x.png"],
    "generate folder": ["generate", "--prompt", "a dog", "--base", "nowhere", "-o", "{}"],
    "compare": ["compare", "dog.safetensors", "--prompt", "a dog", "--base", "nowhere", "-o", "{}/x.png"],
    "check": ["check", "photos", "-o", "{}/x.png"],
    "inspect": ["inspect", "dog.safetensors", "--plot", "{}/x.png"],
    "bake": ["bake", "dog.safetensors", "--gating", "none", "--base", "nowhere", "-o", "{}/x"],
    "library": ["library", "{}", "--add", "dog.safetensors"],
}
FOLDERS = {"a file": "photos/0.png", "too long": "n" * 300, "nobody's home": "~nobody-of-this-name", "NUL": "a\0b"}


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(words, folder, place, capsys):
    before = sorted(place.rglob("*"))
    assert main([word.format(folder) for word in words]) in (1, 2)
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "nowhere" not in shown.err and shown.out == ""
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("words", [words for words in COMMANDS.values() if "." in words[-1] and "{}/" in words[-1]])
@pytest.mark.parametrize("kind", ["somebody's file", "folder", "pipe"])
def test_what_is_somebody_elses_is_not_replaced(words, kind, place, capsys):
    target = place / words[-1].format("out")
    target.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    else:
        shutil_copy = (place / "photos" / "0.png").read_bytes()
        target.write_bytes(shutil_copy)
    assert main([word.format("out") for word in words]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and ("--overwrite" in shown) == (kind == "somebody's file")
    assert target.stat().st_size == (len(shutil_copy) if kind == "somebody's file" else target.stat().st_size)


def test_ones_own_is_replaced(place, base, capsys):
    for words in COMMANDS.values():
        if words[0] in ("fuse", "export", "check", "inspect", "generate"):
            words = [base if word == "nowhere" else word.format("out") for word in words]
            assert main(words) == main(words) == 0, capsys.readouterr().err
    other = trained_adapter(tiny.pipeline("sd1"), "<cat>")
    for save in (
        lambda: fusion.save(other, "dog.safetensors"),
        lambda: fusion.export(other, "out/x.safetensors", "kohya", overwrite=False),
    ):
        with pytest.raises(OutputError, match="--overwrite"):
            save()
    assert main(["fuse", "dog.safetensors", "-o", "dog.safetensors"]) == 2  # an input
    fusion.save(other, "dog.safetensors", overwrite=True)


def test_an_export_lacks_no_embedding(place, dog, monkeypatch):
    from fusion.formats import lora_export

    def full(path, *_):
        raise OutputError("no room")

    monkeypatch.setattr(lora_export, "_write_embedding", full)
    with pytest.raises(OutputError, match="no room"):
        fusion.export(dog, "out/x.safetensors", "kohya")
    assert list((place / "out").iterdir()) == []


def test_a_full_disk_leaves_nothing(place, base, capsys):
    """Pictures of one drawing, an export with its embeddings, a baked model: all or none."""
    wide = ["--num_images", "3", "--width", "64", "--height", "64"]
    (place / "out").mkdir()
    drawing = ["generate", "--prompt", "a dog", "--base", base, *wide, "-o", "{}"]
    for words in (drawing, COMMANDS["export"], COMMANDS["bake"]):
        with files_of_at_most(9_000):
            assert main([base if word == "nowhere" else word.format("out") for word in words]) == 1
        assert "File too large" in capsys.readouterr().err
        assert list((place / "out").rglob("*")) == []


def test_a_training_replaces_its_own_adapter_only(place, base, capsys):
    fusion.save(trained_adapter(tiny.pipeline("sd1"), "<cat>"), "out/pet.safetensors")
    words = words_of_training(base, "--output_name", "pet")
    assert main(words) == 1
    shown = capsys.readouterr().err
    assert "is the adapter of <cat>" in shown and "--overwrite" in shown
    assert main([*words, "--overwrite"]) == main(words) == 0
    assert [concept.token for concept in fusion.load("out/pet.safetensors").info.concepts] == ["<dog>"]


def test_names_of_one_verb_are_names_of_all(place, base, capsys):
    name = "rex (final)"
    assert main(words_of_training(base, "--output_name", name)) == 0
    assert main(["library", "out", "--rename", name, "rex & co"]) == 0
    assert main(["library", "out", "--delete", "rex & co"]) == 0
    assert list((place / "out").glob("*.safetensors")) == []
    assert main(["library", "out", "--delete", "n" * 250]) == 1


def test_an_optimizer_without_its_package_is_refused_before_the_base_is_opened(place, base, capsys, monkeypatch):
    monkeypatch.setitem(PACKAGES, "adafactor", "no_such_package")
    monkeypatch.setattr("fusion.cli.train.open_base", lambda *_: pytest.fail("the base is opened"))
    assert main(words_of_training(base, "--optimizer", "adafactor")) == 1
    assert capsys.readouterr().err.count("pip install no_such_package") == 1 and not (place / "out").exists()


def interrupted_at(step, monkeypatch, action):
    """Do `action` in the middle of a training step."""
    gradients = loop._Training._gradients

    def changed(training, number):
        loss = gradients(training, number)
        if number == step:
            action()
        return loss

    monkeypatch.setattr(loop._Training, "_gradients", changed)
    return lambda: monkeypatch.setattr(loop._Training, "_gradients", gradients)


@pytest.fixture
def interruptible():
    """Ctrl+C as in a terminal; a shell that started the tests in the background lets its programs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_training_with_a_checkpoint_and_says_how_to_go_on(
    number, code, place, base, capsys, monkeypatch
):
    assert main(words_of_training(base)) == 0
    whole = dict(named_parameters(fusion.load("out/dog.safetensors")))
    (place / "out/dog.safetensors").unlink()
    restore = interrupted_at(3, monkeypatch, lambda: os.kill(os.getpid(), number))
    assert main(words_of_training(base)) == code
    restore()
    shown = capsys.readouterr().err
    assert "stopped after step 2. Continue after checkpoint-2 with:" in shown
    assert [path.name for path in (place / "out").iterdir() if path.suffix == ".reserved"] == []
    command = shlex.split(next(line for line in shown.splitlines() if "fusion train" in line))
    assert main(command[1:]) == 0
    assert "resumed after step 2 of 3" in capsys.readouterr().out
    resumed = dict(named_parameters(fusion.load("out/dog.safetensors")))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_finished_training_is_never_lost(place, base, capsys, monkeypatch):
    from fusion.library import library_folder

    save = library_folder.save

    def full(*_, **__):
        raise OutputError("'out/dog.safetensors' cannot be written: No space left on device.")

    monkeypatch.setattr(library_folder, "save", full)
    assert main(words_of_training(base)) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "No space left on device. The training is done." in shown
    monkeypatch.setattr(library_folder, "save", save)
    command = shlex.split(shown[shown.index("fusion train") :])
    assert main(command[1:]) == 0
    assert fusion.load("out/dog.safetensors").info.provenance.steps == 3
    # Without checkpoints, it is saved elsewhere.
    monkeypatch.setattr(library_folder, "save", full)
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr("tempfile.tempdir", None)
    capsys.readouterr()
    assert main(words_of_training(base, "--checkpointing_steps", "0")) == 1
    monkeypatch.setattr(library_folder, "save", save)
    shown = capsys.readouterr().err
    command = shlex.split(shown[shown.index("fusion library") :])
    assert main(command[1:]) == 0
    assert fusion.load("out/dog-2.safetensors").info.provenance.steps == 3


def test_a_name_that_became_anothers_is_not_replaced(place, base, capsys, monkeypatch):
    other = trained_adapter(tiny.pipeline("sd1"), "<cat>")
    interrupted_at(2, monkeypatch, lambda: fusion.save(other, "out/dog.safetensors"))
    assert main(words_of_training(base)) == 0
    assert "is the adapter of <cat>" in capsys.readouterr().err
    assert [c.token for c in fusion.load("out/dog.safetensors").info.concepts] == ["<cat>"]
    assert [c.token for c in fusion.load("out/dog-2.safetensors").info.concepts] == ["<dog>"]


def test_a_checkpoint_that_cannot_be_written_ends_nothing(place, base, capsys, monkeypatch):
    def block():
        (place / "out/checkpoints/dog").rename(place / "out/checkpoints/away")
        (place / "out/checkpoints/dog").touch()

    interrupted_at(2, monkeypatch, block)
    assert main(words_of_training(base, "--checkpointing_steps", "1")) == 0
    shown = capsys.readouterr().err
    assert "No checkpoint after step 2: " in shown and "is a file, not a folder" in shown
    assert (place / "out/dog.safetensors").is_file()


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_is_told_as_one_wherever_it_comes(monkeypatch, capsys):
    def within_compiled_code(_args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    def while_flags_are_read(*_):
        os.kill(os.getpid(), signal.SIGINT)

    class HalfMade:
        def __del__(self):
            raise AttributeError("what its constructor would have set")

    def with_something_half_made(_args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            HalfMade()

    def before_anything(*_):
        raise KeyboardInterrupt

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr("fusion.cli.library.run", within_compiled_code)
    assert main(["library", "out"]) == 143
    monkeypatch.setattr("fusion.cli.library.run", with_something_half_made)
    assert main(["library", "out"]) == 143
    monkeypatch.setattr("fusion.cli.arguments", while_flags_are_read)
    assert main(["library", "out"]) == 130
    monkeypatch.setattr("fusion.cli.interrupts", before_anything)
    assert main(["library", "out"]) == 130
    assert capsys.readouterr().err == "interrupted\n" * 4
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
