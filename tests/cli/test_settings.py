"""`fusion train`: flags over the settings file over the base's defaults."""

import tomllib

import pytest
from PIL import Image

from fusion.cli import arguments, main
from fusion.cli.train import configure
from fusion.training.config import TrainingConfig


@pytest.fixture
def job(tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job/pictures").mkdir()
    path = tmp_path / "job/dog.toml"
    path.write_text('token = "<dog>"\ninstance_data_dir = "pictures"\nrank = 2\nlearning_rate = 0.5\n')
    return path


def settings(*words: object) -> TrainingConfig:
    return configure(arguments("train", [str(word) for word in words]))


def test_flags_override_the_file(job):
    config = settings("--config", job, "--rank", 4)
    assert (config.rank, config.learning_rate, config.token) == (4, 0.5, "<dog>")


def test_what_nobody_set_stays_open_for_the_bases_defaults(job):
    config = settings("--config", job, "--rank", 4)
    assert config.model_fields_set == {"token", "instance_data_dir", "rank", "learning_rate"}
    assert config.with_base_defaults({"rank": 1, "max_train_steps": 7}).max_train_steps == 7
    assert config.with_base_defaults({"rank": 1, "max_train_steps": 7}).rank == 4


def test_a_flag_may_bring_what_the_file_lacks(job):
    job.write_text('instance_data_dir = "pictures"\n')
    assert settings("--config", job, "--token", "<cat>").token == "<cat>"


def test_paths_in_a_file_are_relative_to_it_and_flags_to_the_working_folder(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings("--config", job, "--output_dir", "out", "--pretrained_model_name_or_path", "job")
    assert config.instance_data_dir == job.parent / "pictures"
    assert config.output_dir == tmp_path / "out"
    assert config.pretrained_model_name_or_path == str(tmp_path / "job")


@pytest.mark.parametrize(("words", "value"), [([], True), (["true"], True), (["false"], False)])
def test_switches_are_bare_or_say_true_or_false(job, words, value):
    assert settings("--config", job, "--random_flip", *words).random_flip is value


def test_lists_are_several_words(job):
    config = settings("--config", job, "--targets", "text_encoder", "unet.attn2", "--validation_prompt", "a {token}")
    assert config.targets == ["text_encoder", "unet.attn2"]
    assert config.validation_prompts() == ("a <dog>",)


def test_lists_may_also_be_separated_by_commas(job):
    assert settings("--config", job, "--targets", "text_encoder, unet.attn2").targets == ["text_encoder", "unet.attn2"]
    for words, subjects in ((["dog face, cat", "rose"], ["dog face", "cat", "rose"]), (["dog face"], ["dog face"])):
        assert arguments("fuse", ["a", "--subjects", *words, "-o", "b"]).subjects == subjects


def test_unknown_keys_in_the_file_are_usage_errors_with_a_suggestion(job, capsys):
    job.write_text(job.read_text() + "rnak = 8\n")
    assert main(["train", "--config", str(job)]) == 2
    assert "dog.toml" in (shown := capsys.readouterr().err) and "did you mean 'rank'?" in shown


def test_print_config_round_trips(job, tmp_path, capsys):
    flags = ["--rank", "4", "--random_flip", "--targets", "text_encoder", "--learning_rate", "1e-3"]
    assert main(["train", "--config", str(job), *flags, "--print_config"]) == 0
    printed = capsys.readouterr().out
    again = tmp_path / "again.toml"
    again.write_text(printed)
    assert settings("--config", again) == settings("--config", job, *flags)


def test_print_config_shows_what_applies_to_the_rest(job, capsys):
    base = job.parent / "base"
    base.mkdir()
    (base / "fusion.toml").write_text("[training]\nmax_train_steps = 77\nrank = 1\n")
    words = ["--pretrained_model_name_or_path", str(base), "--print_config"]
    assert main(["train", "--config", str(job), *words]) == 0
    printed = capsys.readouterr().out
    assert "\n# max_train_steps = 77\n" in printed  # the base's
    assert "\n# seed = 0\n" in printed  # ours
    assert "\nrank = 2\n" in printed and "# rank" not in printed  # the user's
    everything = tomllib.loads(printed.replace("\n# Not set, so this applies:", "").replace("\n# ", "\n"))
    assert everything.keys() <= TrainingConfig.model_fields.keys()


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("train", ["--token", "<dog>", "--instance_data_dir", "."]),
        ("generate", ["--prompt", "a dog"]),
        ("fuse", ["a.safetensors", "-o", "b.safetensors"]),
        ("bake", ["a.safetensors", "-o", "b"]),
        ("evaluate", ["a.safetensors"]),
        ("compare", ["a.safetensors", "--prompt", "a dog", "-o", "a.png"]),
        ("library", ["--slices"]),
    ],
)
def test_every_verb_that_opens_a_base_takes_both_names_of_it(verb, words):
    parsed = [vars(arguments(verb, [*words, name, "x"])) for name in ("--base", "--pretrained_model_name_or_path")]
    assert "x" in parsed[0].values()
    assert parsed[0] | {"words": None} == parsed[1] | {"words": None}


def test_a_placeholder_token_is_a_token():
    config = settings("--placeholder_token", "<dog>", "--instance_data_dir", ".", "--base", "runwayml/sd")
    assert (config.token, config.pretrained_model_name_or_path) == ("<dog>", "runwayml/sd")


@pytest.mark.parametrize(
    ("text", "prompt", "place"),
    [
        (r"a <dog>: C:\masks\dog.png", "a <dog>", r"C:\masks\dog.png"),
        ("a <dog>:D:/dog.png", "a <dog>", "D:/dog.png"),
        ("style a: a <dog>: masks/dog.png", "style a: a <dog>", "masks/dog.png"),
    ],
)
def test_a_mask_of_a_region_may_be_on_a_drive(text, prompt, place, monkeypatch):
    from fusion.cli.generate import region
    from fusion.formats import picture_file

    paths = []
    monkeypatch.setattr(picture_file, "load_mask", lambda path: paths.append(path) or Image.new("L", (8, 8), 255))
    assert region(text).prompt == prompt and paths == [place]
    assert region("a dog: 0 0 .5 1").box == (0, 0, 0.5, 1)
