"""Laws of a dataset folder: all layouts give the same examples, all problems are told together, nothing is skipped."""

import json
import logging
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from fusion.errors import DatasetError
from fusion.training.caption_text import caption_for
from fusion.training.config import TrainingConfig
from fusion.training.dataset import class_dataset, instance_dataset, prepare

CONCEPTS = sorted((Path(__file__).parent.parent.parent / "assets/concepts").iterdir())


def paint(path: Path, size=(48, 40), colour=(200, 60, 20), mode="RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def mask(path: Path, size=(48, 40)) -> Path:
    paint(path, size, 0, "L")
    Image.linear_gradient("L").resize(size).save(path)
    return path


def config(folder: Path, **values) -> TrainingConfig:
    return TrainingConfig(token="<dog>", instance_data_dir=folder, **values)


def read(folder: Path, **values):
    return instance_dataset(config(folder, **values))


def problems(folder: Path, **values) -> str:
    with pytest.raises(DatasetError) as caught:
        read(folder, **values)
    return str(caught.value)


def metadata(folder: Path, *entries: dict | str) -> None:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def told(folder: Path, **values) -> dict[str, tuple[str, int]]:
    return {e.image_path.name: (e.caption, e.repeats) for e in read(folder, **values).examples}


# layouts


def test_a_folder_of_pictures_takes_the_instance_prompt(tmp_path):
    for name in ("b.jpg", "a.png", "c.webp", "d.JPEG"):
        paint(tmp_path / name)
    assert list(told(tmp_path)) == ["a.png", "b.jpg", "c.webp", "d.JPEG"]
    assert told(tmp_path, repeats=3)["a.png"] == ("a <dog>", 3)
    assert told(tmp_path, instance_prompt="photo of [trigger]")["a.png"] == ("photo of <dog>", 1)
    assert read(tmp_path).warnings == ()


def test_captions_lie_beside_their_pictures(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("\ufeffa {token}\n on  a beach \n", encoding="utf-8")
    assert told(tmp_path) == {"a.png": ("a <dog> on a beach", 1)}


def test_names_of_any_script_match_in_either_spelling_of_accents(tmp_path):
    paint(tmp_path / (unicodedata.normalize("NFC", "häschen 犬") + ".png"))
    (tmp_path / (unicodedata.normalize("NFD", "häschen 犬") + ".txt")).write_text("<dog> im Grünen", encoding="utf-8")
    assert [e.caption for e in read(tmp_path).examples] == ["<dog> im Grünen"]


def test_metadata_says_the_same_as_caption_files(tmp_path):
    for name in ("a.png", "b.png", "inner/c.png"):
        paint(tmp_path / name)
    metadata(
        tmp_path,
        {"file_name": "a.png", "text": "a <dog>\u2028asleep", "extra": 1},
        "",
        {"file_name": "inner/c.png", "text": "a [trigger]"},
        {"file_name": "./b.png"},
    )
    assert told(tmp_path) == {"a.png": ("a <dog> asleep", 1), "b.png": ("a <dog>", 1), "c.png": ("a <dog>", 1)}


def test_kohya_folders_repeat_and_name_the_concept(tmp_path):
    paint(tmp_path / "10_sks dog" / "a.png")
    paint(tmp_path / "10_sks dog" / "b.png")
    paint(tmp_path / "2_rex" / "c.png")
    (tmp_path / "10_sks dog" / "a.txt").write_text("sks dog on a beach, sksy")
    (tmp_path / "10_sks dog" / "b.txt").write_text("portrait of sks, a dog")
    assert told(tmp_path, repeats=2) == {
        "a.png": ("<dog> on a beach, sksy", 20),
        "b.png": ("portrait of <dog>, a dog", 20),
        "c.png": ("a <dog>", 4),
    }


def test_masks_are_found_under_all_their_names(tmp_path):
    for name in ("a.png", "b.jpg", "c.webp"):
        paint(tmp_path / name)
    found = [mask(tmp_path / "masks" / "a.png"), mask(tmp_path / "b-masklabel.png"), mask(tmp_path / "c.mask.png")]
    assert [e.mask_path for e in read(tmp_path).examples] == found
    assert [e.mask_path for e in read(tmp_path, use_masks=False).examples] == [None] * 3
    assert read(tmp_path).warnings == ()


@pytest.mark.parametrize("folder", CONCEPTS, ids=lambda path: path.name)
def test_the_example_concepts_are_read_without_a_note(folder):
    made = TrainingConfig(token=f"<{folder.name}>", instance_data_dir=folder)
    data = instance_dataset(made)
    assert len(data) >= 4
    assert data.warnings == ()
    assert all(made.token in example.caption for example in data.examples)
    assert prepare(data.examples[0], 64, made).pixels.shape == (3, 64, 64)


# problems


def test_all_problems_of_all_files_are_told_together(tmp_path):
    paint(tmp_path / "good.png")
    paint(tmp_path / "tiny.png", (4, 4))
    (tmp_path / "text.png").write_text("no picture")
    paint(tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "bad.txt").write_text("")
    paint(tmp_path / "wide.png")
    mask(tmp_path / "masks" / "wide.png", (40, 48))
    metadata(tmp_path, "not json")
    said = problems(tmp_path)
    assert said.splitlines()[0] == f"'{tmp_path.name}': 6 problems:"
    for name in ("tiny.png", "text.png", "bad.png", "bad.txt", "masks/wide.png", "metadata.jsonl, line 1"):
        assert name in said
    assert "good.png" not in said


def test_many_problems_are_counted(tmp_path):
    for i in range(15):
        paint(tmp_path / f"{i:02}.png", (4, 4))
    assert "15 problems" in problems(tmp_path)
    assert problems(tmp_path).endswith("and 5 more")


def test_one_problem_is_one_line(tmp_path):
    paint(tmp_path / "4.png", (4, 4))
    assert problems(tmp_path) == f"'{tmp_path.name}': 4.png is 4x4 pixels; both sides need at least 32."


def test_a_folder_without_pictures_or_none_at_all(tmp_path):
    assert "no pictures" in problems(tmp_path)
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    assert "no pictures" in problems(tmp_path)
    assert "is no folder" in problems(tmp_path / "gone")
    assert "is no folder" in problems(tmp_path / "a.gif")


def test_two_pictures_of_one_stem_are_refused(tmp_path):
    paint(tmp_path / "a.png")
    paint(tmp_path / "a.jpg")
    assert "a.jpg and a.png share" in problems(tmp_path)


def test_two_masks_of_one_picture_are_refused(tmp_path):
    paint(tmp_path / "a.png")
    mask(tmp_path / "masks" / "a.png")
    mask(tmp_path / "a.mask.png")
    assert "a.png has 2 masks" in problems(tmp_path)


def test_a_caption_without_the_token_teaches_nothing_under_gating(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dog on a beach")
    assert "a.txt: 'a dog on a beach' does not name <dog>" in problems(tmp_path)
    data = read(tmp_path, gating="none")
    assert data.examples[0].caption == "a dog on a beach"
    assert "a.txt" in data.warnings[0]


def test_captions_that_cannot_be_read_are_named(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"a <dog> \xff\xfe")
    assert "a.txt is not UTF-8 text (byte 8)" in problems(tmp_path)
    (tmp_path / "a.txt").write_text("   \n")
    assert "a.txt has an empty caption" in problems(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "it needs the form"),
        ({"text": "a <dog>"}, "it needs the form"),
        ({"file_name": 3, "text": "a <dog>"}, "it needs the form"),
        ({"file_name": "a.png", "text": 3}, "it needs the form"),
        ({"file_name": "a.png", "caption": ["a <dog>"]}, "it needs the form"),
        ({"file_name": "a.png", "caption": "a <dog>", "prompt": "b"}, "it has 'caption' and 'prompt', which differ"),
        ({"file_name": "gone.png"}, "'gone.png' is no picture"),
        ({"file_name": "notes.md"}, "'notes.md' is no picture"),
        ({"file_name": "."}, "is no picture"),
        ({"file_name": "x" * 5000 + ".png"}, "is no picture"),
        ({"file_name": "a\0.png"}, "is no picture"),
        ({"file_name": "\ud800.png"}, "is no picture"),
        ({"file_name": "../outside.png"}, "is no picture in this folder"),
        ({"file_name": "inner/../a.png"}, "is no picture in this folder"),
        ({"file_name": "/etc/passwd"}, "is no picture in this folder"),
        ({"file_name": "link.png"}, "is no picture in this folder"),
        ({"file_name": "away/outside.png"}, "is no picture in this folder"),
        ({"file_name": "loop/a.png"}, "is no picture in this folder"),
        ({"file_name": "a.png", "text": "a <dog> \ud83d"}, "half of a surrogate pair"),
        ({"file_name": "b.png"}, "'b.png' stands in an earlier line"),
        ({"file_name": "masks/b.png"}, "is no picture"),
    ],
)
def test_metadata_problems_name_their_line(tmp_path, line, said):
    folder = tmp_path / "data"
    paint(tmp_path / "outside.png")
    for name in ("a.png", "b.png", "inner/c.png"):
        paint(folder / name)
    mask(folder / "masks/b.png")
    (folder / "notes.md").write_text("hello")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "away").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    metadata(folder, {"file_name": "b.png"}, line)
    text = problems(folder)
    assert said in text and len(text) < 1000
    assert "metadata.jsonl, line 2" in text


def test_captions_in_metadata_under_another_key_are_taken_or_told(tmp_path):
    for name in "abcd":
        paint(tmp_path / f"{name}.png")
    metadata(
        tmp_path,
        {"file_name": "a.png", "caption": "a <dog> asleep"},
        {"file_name": "b.png", "prompt": "a <dog> awake", "caption": "a <dog> awake"},
        {"file_name": "c.png", "text": "a <dog> in snow", "caption": "a walk", "label": 3},
        {"file_name": "d.png", "description": "a <dog> on sand"},
    )
    assert {name: caption for name, (caption, _) in told(tmp_path).items()} == {
        "a.png": "a <dog> asleep", "b.png": "a <dog> awake", "c.png": "a <dog> in snow", "d.png": "a <dog>",
    }  # fmt: skip
    assert "Not used: 'description' in metadata.jsonl." in read(tmp_path).warnings
    metadata(tmp_path)
    assert "Not used: metadata.jsonl, which is empty." in read(tmp_path).warnings


def test_a_snapshot_in_the_hubs_cache_is_read_with_and_without_metadata(tmp_path):
    snapshot, blobs = tmp_path / "datasets--me--dogs" / "snapshots" / "0f", tmp_path / "datasets--me--dogs" / "blobs"
    snapshot.mkdir(parents=True)
    paint(blobs / "x.png").rename(blobs / "12ab")
    (snapshot / "a.png").symlink_to(blobs / "12ab")
    assert told(snapshot) == {"a.png": ("a <dog>", 1)}
    metadata(snapshot, {"file_name": "a.png", "text": "a <dog> asleep"})
    assert told(snapshot) == {"a.png": ("a <dog> asleep", 1)}


def test_masks_that_mask_nothing_are_told(tmp_path):
    paint(tmp_path / "a.png")
    paint(tmp_path / "masks" / "a.png", colour=255, mode="L")
    assert read(tmp_path).warnings == ("Masks that are white everywhere, so nothing is masked: masks/a.png.",)
    Image.new("L", (48, 40)).save(tmp_path / "masks" / "a.png")
    assert "masks/a.png is all black" in problems(tmp_path)
    (tmp_path / "masks" / "a.png").unlink()
    told_of = "Not used: the setting unmasked_weight, as no masks are."
    assert told_of in read(tmp_path, unmasked_weight=0.5).warnings and read(tmp_path).warnings == ()


@pytest.mark.parametrize("name", ["20000_rex", "9" * 60 + "_rex"])
def test_more_repeats_than_a_machine_can_bear_are_refused(tmp_path, name):
    paint(tmp_path / name / "a.png")
    assert f"{name}/: folders repeat their pictures at most 10000 times" in problems(tmp_path)


def test_metadata_may_not_contradict_a_caption_file(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a <dog>")
    metadata(tmp_path, {"file_name": "a.png", "text": "a <dog>"})
    assert told(tmp_path) == {"a.png": ("a <dog>", 1)}
    metadata(tmp_path, {"file_name": "a.png", "text": "the <dog>"})
    assert "different captions" in problems(tmp_path)


def test_metadata_may_not_name_what_is_not_read(tmp_path):
    paint(tmp_path / "a.png")
    paint(tmp_path / ".hidden.png")
    metadata(tmp_path, {"file_name": ".hidden.png", "text": "a <dog>"})
    assert ".hidden.png" in problems(tmp_path)


# notes


def test_nothing_is_left_out_silently(tmp_path, caplog):
    paint(tmp_path / "a.png")
    for name in ("movie.gif", "notes.pdf", "stray.txt", "1_rex/metadata.jsonl", "old/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    mask(tmp_path / "masks" / "gone.png")
    for name in (".DS_Store", "._a.png", "concept.toml", "README.md", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING, "fusion"):
        data = read(tmp_path)
    assert len(data) == 1
    assert data.warnings == ("Not used: 1_rex/metadata.jsonl, masks/gone.png, movie.gif, notes.pdf, old/ and 1 more.",)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert data.warnings[0] in caplog.text


def test_mixed_folders_say_what_is_missing_where(tmp_path):
    paint(tmp_path / "a.png", colour=(0, 0, 0, 0), mode="RGBA")
    paint(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("a <dog> asleep")
    mask(tmp_path / "masks" / "a.png")
    assert read(tmp_path).warnings == (
        "Without a caption, so 'a <dog>' is used: b.png.",
        "Without a mask, so learned whole: b.png.",
        "With transparent parts, which are filled with white: a.png.",
    )


def test_pictures_that_must_be_enlarged_are_known(tmp_path):
    paint(tmp_path / "a.png", (48, 40))
    paint(tmp_path / "b.png", (400, 500))
    assert [e.image_path.name for e in read(tmp_path).enlarged([(64, 64)])] == ["a.png"]
    assert read(tmp_path).enlarged([(40, 40)]) == ()


# class pictures


def test_class_pictures_take_the_class_prompt_and_may_be_missing(tmp_path):
    paint(tmp_path / "dogs" / "a.png")
    values = {"with_prior_preservation": True, "class_prompt": "a dog"}
    made = config(tmp_path, **values, class_data_dir=tmp_path / "dogs")
    assert [e.caption for e in class_dataset(made).examples] == ["a dog"]
    assert len(class_dataset(config(tmp_path, **values, class_data_dir=tmp_path / "none"))) == 0
    assert len(class_dataset(config(tmp_path))) == 0
    paint(tmp_path / "dogs" / "b.png", (4, 4))
    with pytest.raises(DatasetError, match=r"b\.png"):
        class_dataset(made)


# captions


@pytest.mark.parametrize(
    ("text", "trigger", "made"),
    [
        ("a {token} and [trigger]", "", "a <dog> and <dog>"),
        ("sks dog runs", "sks dog", "<dog> runs"),
        ("sks runs", "sks dog", "<dog> runs"),
        ("a <dog> and sks dog", "sks dog", "a <dog> and sks dog"),
        ("a dog, hotdog", "dog", "a <dog>, hotdog"),
        ("a.b c", "a.b c", "<dog>"),
        ("nothing", "sks dog", "nothing"),
        ("a photo of rex on a table", "a rex", "a photo of <dog> on a table"),
        ("a photo of a rex", "the rex", "a photo of a <dog>"),
        ("a big tree and a big rex", "big dog", "a big tree and a big rex"),  # which of the two it is, nobody says
        ("Sks Dog runs", "sks dog", "<dog> runs"),
        ("a <Dog> asleep", "", "a <dog> asleep"),
        ("a photo", "a", "a photo"),
    ],
)
def test_captions_name_the_token(text, trigger, made):
    assert caption_for(text, "<dog>", trigger) == made


# preparing


def test_prepared_examples_are_what_the_config_asks_for(tmp_path):
    paint(tmp_path / "a.png", (96, 40))
    Image.linear_gradient("L").resize((96, 40)).save(tmp_path / "a.mask.png")
    made = config(tmp_path, center_crop=False, random_flip=True)
    example = read(tmp_path).examples[0]
    cuts = [prepare(example, 32, made, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert cuts[0].crop_top_left == cuts[1].crop_top_left != cuts[2].crop_top_left
    assert cuts[0].original_size == (40, 96)
    assert cuts[0].mask.shape == (1, 32, 32)
    assert prepare(example, 32, config(tmp_path, use_masks=False)).pixels.shape == (3, 32, 32)


def test_a_dataset_deals_its_own_examples(tmp_path):
    for i in range(3):
        paint(tmp_path / f"{i}.png")
    data = read(tmp_path, repeats=2)
    assert sorted(data.order(6, seed=0).batch(0)) == [0, 0, 1, 1, 2, 2]
