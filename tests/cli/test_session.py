"""A whole session at the terminal, on a toy base in a folder: train, inspect, fuse, generate, export, evaluate."""

import json
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

import tiny
from fusion.cli import main

pytestmark = pytest.mark.slow
# For what depends on no family.
LONG_FOR_XL = ["sd1", pytest.param("sdxl", marks=pytest.mark.long)]
any_family = pytest.mark.parametrize("base", LONG_FOR_XL, indirect=True, scope="module")


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / f"tiny-{request.param}"
    tiny.pipeline(request.param).save_pretrained(folder)
    (folder / "fusion.toml").write_text("[generation]\nsteps = 2\n")
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return str(folder)


@pytest.fixture
def train(base, pictures, tmp_path, monkeypatch):
    """`fusion train` of three steps in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return lambda token, *more: main(training(base, pictures, token, *more))


def training(base: str, pictures: str, token: str, *more: str) -> list[str]:
    words = ["--pretrained_model_name_or_path", base, "--instance_data_dir", pictures, "--token", token]
    settings = ["--noun", "dog", "--rank", "4", "--max_train_steps", "3", "--resolution", "16"]
    return ["train", *words, *settings, "--learning_rate", "0.1", *more]


@pytest.fixture(scope="module")
def library(base, pictures, tmp_path_factory):
    """A library with <dog> and <cat>, trained once."""
    folder = tmp_path_factory.mktemp("library")
    for token in ("<dog>", "<cat>"):
        more = ["--output_dir", str(folder), "--num_validation_images", "0"]
        assert main(training(base, pictures, token, *more)) == 0
    return folder


@pytest.fixture
def pets(library, tmp_path, monkeypatch):
    """A working folder with a copy of that library in `out`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(library, "out")


@any_family
def test_the_picture_of_a_trained_adapter_can_be_skipped_and_left_out(train, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        assert (tmp_path / "out/dog.safetensors").is_file()  # saved first
        raise KeyboardInterrupt

    monkeypatch.setattr("fusion.generation.adapter_pictures.generate", interrupted)
    assert train("<dog>") == 0
    assert "the adapter is saved" in capsys.readouterr().out
    assert train("<cat>", "--num_validation_images", "0") == 0
    assert "a picture" not in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").glob("[!.]*.*")} == {"dog.safetensors", "cat.safetensors"}


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_from_pictures_to_a_picture_of_both(train, base, tmp_path, capsys):
    assert train("<dog>", "--validation_prompt", "a {token}", "--validation_steps", "3") == 0
    shown = capsys.readouterr().out
    assert "wrote out/dog.safetensors (" in shown and "<dog> on slice 0-3, 3 steps" in shown
    assert f"next: fusion generate out/dog.safetensors --base {base} --prompt 'a <dog>'" in shown
    assert (tmp_path / "out/dog.png").is_file() and list((tmp_path / "out/samples").glob("dog-00003-*.png"))
    assert train("<cat>") == 0
    shown = capsys.readouterr().out
    assert "<cat> on slice 4-7" in shown  # output_dir is the library: dog's slice is taken
    assert 'drawing a picture for the library, "a <cat>" (Ctrl+C skips it' in shown and "wrote out/cat.png" in shown

    assert main(["inspect", "out", "--plot", "plot.png"]) == 0
    shown = capsys.readouterr().out
    assert "dog  ████····" in shown and "cat  ····████" in shown and "\ncompatible: " in shown
    assert pixels("plot.png").shape[1] > 500

    assert main(["fuse", "out/dog.safetensors", "out/cat.safetensors", "-o", "pets.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert (
        shown.startswith("compatible: ") and "wrote pets.safetensors (" in shown and "a <dog> beside a <cat>" in shown
    )

    assert main(["generate", "pets.safetensors", "--prompt", "a <dog> and a <cat>", "--base", base]) == 0
    assert "wrote out/a-dog-and-a-cat-0.png" in capsys.readouterr().out
    assert main(["export", "pets.safetensors", "--to", "kohya", "-o", "lora.safetensors"]) == 0
    assert "wrote lora.safetensors (" in capsys.readouterr().out
    assert main(["inspect", "lora.safetensors"]) == 0


def test_a_picture_is_drawn_again_from_its_recipe(pets, train, base, tmp_path, capsys):
    prompt = ["--prompt", "a <dog>", "--base", base, "--strength", "0.5"]
    assert (
        main(["generate", "out/dog.safetensors", *prompt, "--num_images", "2", "--seed", "3", "-o", "first.png"]) == 0
    )
    assert main(["generate", "--from", "first-4.png", "--base", base, "-o", "again.png"]) == 0
    assert (pixels("again.png") == pixels("first-4.png")).all()
    assert main(["generate", "--from", "first-4.png", "--base", base, "-o", "other.png", "--seed", "9"]) == 0
    assert not (pixels("other-9.png") == pixels("first-4.png")).all()

    capsys.readouterr()
    assert train("<dog>", "--seed", "1") == 0  # another adapter in the same place
    assert main(["generate", "--from", "first-4.png", "--base", base]) == 1
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "is not the adapter this picture was drawn with" in line
    (tmp_path / "out/dog.safetensors").unlink()
    assert main(["generate", "--from", "first-4.png", "--base", base]) == 1
    assert "is gone" in capsys.readouterr().err


@any_family
def test_a_recipe_of_another_base_asks_for_it(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--prompt", "a dog", "--base", base, "-o", "dog.png"]) == 0
    assert main(["generate", "--from", "dog.png"]) == 2
    assert "--base" in capsys.readouterr().err


def test_inspect_and_evaluate_speak_json(pets, base, capsys):
    files = ["out/dog.safetensors", "out/cat.safetensors"]
    assert main(["inspect", *files, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [a["branches"][0]["slices"] for a in told["adapters"]] == [[[0, 4, 1]], [[4, 4, 1]]]
    assert told["compatibility"]["verdict"] == "compatible"
    prompts = ["--prompts", "a {token}", "--concept_free", "a bird"]
    assert main(["evaluate", *files, "--base", base, *prompts, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["gated"]["output_error"] == {"<dog>": 0, "<cat>": 0} and measured["gated"]["drift"] == 0
    assert measured["ungated"]["drift"] > 0 and measured["identity"] is None


def test_pictures_are_judged_against_references(pets, base, pictures, tmp_path, capsys):
    tiny.save_judge(tmp_path / "judge")
    words = ["evaluate", "out/dog.safetensors", "out/cat.safetensors", "--base", base, "--seeds", "1"]
    words += ["--prompts", "a {token}", "--concept_free", "a bird", "--judge", str(tmp_path / "judge")]
    capsys.readouterr()
    assert main([*words, "--references", f"<dog>={pictures}", "--references", f"<cat>={pictures}"]) == 0
    shown = capsys.readouterr().out
    assert "retention in pairs" in shown and "Judge: judge, which tells" in shown
    assert main([*words, "--references", f"<rex>={pictures}"]) == 1
    assert "No adapter knows <rex>" in capsys.readouterr().err
    assert main([*words, "--references", pictures]) == 2
    assert '--references takes "<token>=FOLDER"' in capsys.readouterr().err


@any_family
def test_one_token_twice_is_refused_until_renamed(train, capsys):
    assert train("<dog>", "--output_name", "rex") == train("<dog>", "--output_name", "fido", "--slice", "1") == 0
    fuse = ["fuse", "out/rex.safetensors", "out/fido.safetensors", "-o", "dogs.safetensors"]
    capsys.readouterr()
    assert main(fuse) == 1
    assert "both use <dog>" in capsys.readouterr().err
    assert main([*fuse, "--rename", "<dog>=<fido>"]) == 0
    assert "<dog> <fido>" in capsys.readouterr().out
    assert main([*fuse, "--rename", "<cat>=<fido>"]) == 2


@any_family
def test_an_interrupted_training_says_how_to_go_on(train, capsys, monkeypatch):
    from fusion.training import loop

    whole = loop.train

    def interrupted(pipe, config, **options):
        for step in whole(pipe, config, **options):
            yield step
            if step.step == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupted)
    assert train("<dog>", "--checkpointing_steps", "1") == 130
    shown = capsys.readouterr().err
    assert "stopped after step 2. Continue after checkpoint-2 with:" in shown
    command = shlex.split(next(line for line in shown.splitlines() if "fusion train" in line))
    assert command[:2] == ["fusion", "train"] and command[-2] == "--resume_from_checkpoint"
    monkeypatch.setattr(loop, "train", whole)
    assert train("<dog>", "--checkpointing_steps", "1", "--seed", "1") == 0  # meanwhile another run of this name
    assert main(command[1:]) == 0  # the printed command goes on with its own
    shown = capsys.readouterr().out
    assert "resumed after step 2 of 3" in shown and "3 steps" in shown


@any_family
def test_a_training_that_died_before_its_adapter_was_written_is_finished(train, capsys, tmp_path):
    assert train("<dog>", "--checkpointing_steps", "1") == 0
    file = tmp_path / "out" / "dog.safetensors"
    written = file.read_bytes()
    file.unlink()
    assert train("<dog>", "--checkpointing_steps", "1", "--resume_from_checkpoint", "latest") == 0
    shown = capsys.readouterr().out
    assert "resumed after step 3 of 3" in shown and "wrote out/dog.safetensors" in shown
    assert file.read_bytes() == written
    assert train("<dog>", "--checkpointing_steps", "1", "--resume_from_checkpoint", "latest", "--rank", "2") == 1
    assert "was made with rank = 4, not 2" in capsys.readouterr().err


@any_family
def test_words_nobody_taught_are_pointed_out(pets, base, capsys):
    assert main(["generate", "out/dog.safetensors", "--prompt", "a <dgo>", "--base", base]) == 0
    shown = capsys.readouterr().err
    assert "warning: No adapter given knows <dgo>; did you mean '<dog>'?" in shown
    assert "warning: The prompt has none of the tokens <dog>" in shown
    assert main(["generate", "out/dog.safetensors", "--prompt", "a <dog>", "--base", base]) == 0
    assert "warning" not in capsys.readouterr().err


@any_family
def test_a_picture_drawn_from_a_picture_needs_it_again(base, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start, other = f"{pictures}/0.png", f"{pictures}/1.png"
    words = ["--base", base, "-o"]
    assert main(["generate", "--prompt", "a dog", "--image", start, "--image_strength", "1", *words, "dog.png"]) == 0
    assert main(["generate", "--from", "dog.png", "--image", start, *words, "again.png"]) == 0
    assert (pixels("again.png") == pixels("dog.png")).all()
    assert main(["generate", "--from", "dog.png", *words, "again.png"]) == 2
    assert "--image" in capsys.readouterr().err
    assert main(["generate", "--from", "dog.png", "--image", other, *words, "again.png"]) == 0
    assert "is not the image" in capsys.readouterr().err


@any_family
def test_regions_are_typed_painted_and_repeated(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save("right.png")
    regions = ["--region", "a cat: 0 0 0.5 1", "--region", "a bird: right.png"]
    words = ["generate", "--prompt", "a dog", "--base", base, "-o"]
    assert main([*words, "plain.png"]) == main([*words, "parts.png", *regions]) == 0
    assert not (pixels("plain.png") == pixels("parts.png")).all()
    assert main(["generate", "--from", "parts.png", "--base", base, "-o", "again.png"]) == 0
    assert (pixels("again.png") == pixels("parts.png")).all()
    capsys.readouterr()
    for wrong, said in (("a cat", "PROMPT: LEFT TOP"), ("a cat: 0 1", "neither four numbers nor a mask")):
        assert main([*words, "wrong.png", "--region", wrong]) == 2
        assert said in capsys.readouterr().err
    assert main([*words, "wrong.png", "--region", "a cat: 0 0 64 64"]) == 1
    assert "in shares of the picture" in capsys.readouterr().err


def test_regions_are_found_where_several_concepts_are_named(pets, base):
    words = ["out/dog.safetensors", "out/cat.safetensors", "--base", base, "-o"]
    assert main(["generate", "--prompt", "a <dog> and a <cat>", "--region", "auto", *words, "found.png"]) == 0
    assert main(["generate", "--from", "found.png", *words, "again.png"]) == 0
    assert (pixels("again.png") == pixels("found.png")).all()
