"""The verbs the studio shows: check, library, bake, compare, and presets, on toy bases."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fusion
import tiny
from fusion.cli import main
from fusion.training.dataset import instance_dataset
from trained import trained_adapter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "tiny-sd1"
    tiny.pipeline("sd1").save_pretrained(folder)
    (folder / "fusion.toml").write_text("[training]\nmax_train_steps = 10\nrank = 2\n[generation]\nsteps = 2\n")
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    made = torch.Generator().manual_seed(0)
    for name in ("one", "two", "three"):
        pixels = torch.randint(0, 256, (40, 90 if name == "two" else 40, 3), generator=made, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((80, 160) if name == "two" else (40, 40)).save(folder / f"{name}.png")
    shutil.copy(folder / "one.png", folder / "zwilling.png")
    (folder / "fake.png").write_text("not a picture")
    return folder


@pytest.fixture
def library(base, photos, tmp_path):
    (photos / "fake.png").unlink()
    for token in ("<dog>", "<cat>"):
        words = ["train", "--pretrained_model_name_or_path", base, "--instance_data_dir", str(photos), "--token", token]
        words += ["--preset", "quick", "--library", str(tmp_path / "out"), "--output_dir", str(tmp_path / "out")]
        assert main([*words, "--noun", token.strip("<>"), "--learning_rate", "0.01", "--text_encoder_lr", "0.01"]) == 0
    return tmp_path / "out"


def width(path) -> int:
    with Image.open(path) as picture:
        return picture.width


def test_check_says_what_is_wrong_and_shows_the_cuts(photos, tmp_path, capsys):
    assert main(["check", str(photos), "--resolution", "64", "-o", str(tmp_path / "cut.png")]) == 1  # as train would
    said = capsys.readouterr().out
    assert "fake.png is no PNG" in said and "Nearly the same as one.png" in said and "is enlarged to 64" in said
    assert "Long: much of it" in said and "4 of 5 pictures can be used." in said
    assert width(tmp_path / "cut.png") > 400
    (photos / "fake.png").unlink()
    (photos / "one.txt").write_text("a <Rex> asleep")
    (photos / "5_a rex").mkdir()
    (photos / "two.png").rename(photos / "5_a rex" / "two.png")
    (photos / "5_a rex" / "two.txt").write_text("a photo of rex on a table")
    assert main(["check", "--instance_data_dir", str(photos), "--token", "<rex>"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert '"a <rex> asleep"' in said and '"a photo of <rex> on a table", 5 times an epoch' in said
    assert "4 of 4 pictures can be used." in said and "Without a caption, so 'a <rex>' is used" in said
    dataset = instance_dataset(fusion.TrainingConfig(token="<rex>", instance_data_dir=photos))
    assert all(f'"{example.caption}"' in said for example in dataset.examples)


def test_a_preset_is_a_share_of_the_usual_steps(library):
    assert fusion.load(library / "dog.safetensors").info.provenance.steps == 4


def test_the_library_is_kept_in_order(library, base, capsys, tmp_path):
    assert main(["library", str(library), "--slices", "--base", base]) == 0
    said = capsys.readouterr().out
    assert "<dog>" in said and "0-1" in said and "2-3" in said and "directions are free" in said
    assert main(["library", str(library), "--rename", "dog", "rex", "--tokens", "<dog>=<rex>"]) == 0
    assert not (library / "dog.safetensors").exists()
    rex = fusion.load(library / "rex.safetensors")
    assert [c.token for c in rex.info.concepts] == ["<rex>"] and rex.info.name == "rex"
    assert rex.branches[0].gate == ("<rex>",)
    fusion.export(rex, tmp_path / "lora.safetensors", "kohya")
    assert main(["library", str(library), "--add", str(tmp_path / "lora.safetensors")]) == 0
    assert main(["library", str(library), "--add", str(library / "cat.safetensors")]) == 0
    assert {p.stem for p in library.glob("*.safetensors")} == {"rex", "cat", "cat-2", "lora"}
    assert main(["library", str(library), "--delete", "cat-2"]) == 0
    assert not (library / "cat-2.safetensors").exists()
    for wrong in (["--delete", "../x"], ["--delete", "dgo"], ["--rename", "cat", "../x"], ["--add", str(tmp_path)]):
        assert main(["library", str(library), *wrong]) == 1
    assert {p.stem for p in library.glob("*.safetensors")} == {"rex", "cat", "lora"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_baked_base_has_the_precision_of_the_base_on_disk(dtype, tmp_path):
    """Its weights are the base's with ΔW added in float32, rounded once."""
    folder, pipe = str(tmp_path / "base"), tiny.pipeline("sd1").to(dtype)
    pipe.save_pretrained(folder)
    rex = trained_adapter(pipe.to(torch.float32), gated=False)
    fusion.save(rex, tmp_path / "rex.safetensors", "float32")
    words = ["bake", str(tmp_path / "rex.safetensors"), "--base", folder, "--device", "cpu", "-o"]
    assert main([*words, str(tmp_path / "baked")]) == 0
    unet, text = (
        load_file(next((tmp_path / "baked" / name).glob("*.safetensors"))) for name in ("unet", "text_encoder")
    )
    assert {tensor.dtype for tensor in (*unet.values(), *text.values())} == {dtype}
    for name, delta in rex.deltas().items():
        if name.startswith("unet."):
            weight = pipe.unet.get_submodule(name.removeprefix("unet.")).weight
            assert torch.equal(
                unet[name.removeprefix("unet.") + ".weight"], (weight + delta.dense().view_as(weight)).to(dtype)
            )
    assert main([*words, str(tmp_path / "other"), "--dtype", "bfloat16"]) == 0
    (file,) = (tmp_path / "other" / "unet").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_compare_measures_every_cell(library, base, tmp_path, capsys):
    files = [str(library / "dog.safetensors"), str(library / "cat.safetensors")]
    words = ["--prompt", "a <dog> beside a <cat>", "--strengths", "0", "1", "--alone", "--base", base]
    assert main(["compare", *files, *words, "-o", str(tmp_path / "sheet.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[0].startswith("direct_sum, strength 0  <dog> kept 0%")
    assert lines[4].startswith("<dog> alone, strength 1  <dog> kept 100%  leakage 0.000")
    assert width(tmp_path / "sheet.png") > 3 * 192
    assert main(["compare", *files, "--prompt", "x", "--strengths", *["1"] * 65, "-o", str(tmp_path / "s.png")]) == 1


def test_bake_makes_a_base_and_never_overwrites(library, base, tmp_path):
    file, folder = str(library / "dog.safetensors"), str(tmp_path / "baked")
    assert main(["bake", file, "-o", folder, "--base", base]) == 1  # gated: said, not done
    assert main(["bake", file, "-o", folder, "--base", base, "--gating", "none"]) == 0
    assert main(["generate", "--base", folder, "--prompt", "a <dog>", "--steps", "1", "-o", str(tmp_path)]) == 0
    words = ["bake", file, "--base", base, "--gating", "none", "-o"]
    assert main([*words, folder]) == 1
    before = (tmp_path / "baked" / "model_index.json").stat().st_ino
    assert main([*words, folder, "--overwrite"]) == 0
    assert (tmp_path / "baked" / "model_index.json").stat().st_ino != before
    assert main([*words, str(library), "--overwrite"]) == 1  # no model: never replaced
    assert (library / "dog.safetensors").is_file()
