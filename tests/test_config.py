"""Laws of strict settings: what is written reads back, what is wrong is said plainly and all at once."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from fusion.config import BASE_DEFAULTS, StrictModel, listing, read_base_defaults, read_toml, settings_of, to_toml
from fusion.errors import ConfigError, FormatError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


class Settings(StrictModel):
    names_or_paths: ClassVar[tuple[str, ...]] = ("base",)

    rank: int = Field(8, ge=1)
    rate: float = 1e-4
    balanced: bool = False
    title: str = ""
    precision: Literal["no", "fp16"] = "no"
    targets: list[str] | None = None
    prompts: str | list[str] | None = None
    folder: Path | None = None
    base: str | None = None
    level: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    box: tuple[float, ...] | None = None


def problem(**values) -> str:
    with pytest.raises(ConfigError) as caught:
        Settings(**values)
    return str(caught.value)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "rank": st.integers(1, 2**63 - 1),
            "rate": st.floats(allow_nan=False, allow_infinity=False),
            "balanced": st.booleans(),
            "title": TEXT,
            "precision": st.sampled_from(["no", "fp16"]),
            "targets": st.lists(TEXT),
            "prompts": TEXT | st.lists(TEXT),
            "folder": st.sampled_from(['/data/dög\'s "pics"', "pics", "~/pics"]),
        },
    )
)
def test_settings_to_toml_and_back_are_the_same(values):
    settings = Settings(**values)
    again = Settings.model_validate(tomllib.loads(to_toml(settings)))
    assert again == settings
    assert again.model_fields_set == settings.model_fields_set


def test_defaults_are_not_written_so_they_stay_defaults():
    assert to_toml(Settings(rank=8)) == "rank = 8\n"
    assert to_toml(Settings()) == ""


def test_an_unknown_key_names_file_key_and_suggestion(tmp_path):
    path = tmp_path / "dog.toml"
    path.write_text("rnak = 4\n")
    with pytest.raises(ConfigError) as caught:
        read_toml(path, Settings)
    assert str(caught.value) == "dog.toml: unknown key 'rnak'; did you mean 'rank'?"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": "four"}, "rank must be a whole number, got 'four'."),
        ({"rank": "8"}, "rank must be a whole number, got '8'."),
        ({"rank": True}, "rank must be a whole number, got True."),
        ({"rank": 0}, "rank must be at least 1, got 0."),
        ({"rate": "1e-4"}, "rate must be a number, got '1e-4'."),
        ({"rate": float("nan")}, "rate must be a finite number, got nan."),
        ({"balanced": 1}, "balanced must be a valid boolean, got 1."),
        ({"title": 3}, "title must be a valid string, got 3."),
        ({"precision": "fp8"}, "precision must be 'no' or 'fp16', got 'fp8'."),
        ({"targets": "unet"}, "targets must be a valid list, got 'unet'."),
        ({"targets": ["unet", 3]}, "targets[1] must be a valid string, got 3."),
        ({"prompts": 3}, "prompts must be a valid list, got 3."),
        ({"prompts": ["a", None]}, "prompts[1] must be a valid string, got None."),
        ({"folder": ""}, "folder must be a path, got ''."),
        ({"folder": 3}, "folder must be a path, got 3."),
        ({"zzz": 1}, "unknown key 'zzz'."),
    ],
)
def test_a_wrong_kind_is_said_in_one_sentence(values, said):
    assert problem(**values) == said


def test_all_problems_are_said_at_once():
    said = problem(rnak=4, rank=0, rate="fast", title="x" * 1000)
    assert said.splitlines()[0] == "3 problems:"
    assert "pydantic" not in said
    assert [line.split()[1] for line in said.splitlines()[1:]] == ["rank", "rate", "unknown"]


def test_a_whole_number_is_a_number_and_a_tuple_is_a_list():
    settings = Settings(rate=1, targets=("unet",))
    assert settings.rate == 1.0
    assert settings.targets == ["unet"]


def test_paths_in_a_file_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    path = Path("recipes/dog.toml")
    path.write_text('folder = "pics"\nbase = "../base"\n')
    assert read_toml(path, Settings).folder == tmp_path / "recipes" / "pics"
    assert Path(str(read_toml(path, Settings).base)).samefile(tmp_path / "base")
    path.write_text('base = "stabilityai/sdxl"\n')
    assert read_toml(path, Settings).base == "stabilityai/sdxl"
    (tmp_path / "recipes/stabilityai/sdxl").mkdir(parents=True)
    assert read_toml(path, Settings).base == str(tmp_path / "recipes/stabilityai/sdxl")


def test_values_given_over_a_file_win_and_complete_it(tmp_path):
    path = tmp_path / "dog.toml"
    path.write_text('rank = 4\nfolder = "pics"\n')
    made = read_toml(path, Settings, {"rank": 2, "title": "x", "folder": "/elsewhere"})
    assert made == Settings(rank=2, title="x", folder="/elsewhere")


def test_paths_given_here_do_not_move_when_the_working_folder_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = Settings(folder="pics")
    assert settings.folder == tmp_path / "pics"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/dog.toml").write_text(to_toml(settings))
    assert read_toml("deep/dog.toml", Settings) == settings


@pytest.mark.parametrize("content", [b"rank = = 4", b"\xff\xfe", b"[rank]\nx = 1"])
def test_a_file_that_cannot_be_used_is_named(tmp_path, content):
    path = tmp_path / "dog.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"dog\.toml"):
        read_toml(path, Settings)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"dog\.toml' cannot be read: No such file"):
        read_toml(tmp_path / "dog.toml", Settings)


def test_updating_checks_again_and_takes_back():
    settings = Settings(rank=4, rate=1.0)
    assert settings.updated({"rank": None, "title": "x"}) == Settings(rate=1.0, title="x")
    assert settings.rank == 4
    with pytest.raises(ConfigError, match="rnak"):
        settings.updated({"rnak": 4})


def test_a_base_brings_defaults_in_two_tables(tmp_path):
    assert read_base_defaults(tmp_path, "training") == {}
    assert read_base_defaults(None, "training") == {}
    path = tmp_path / BASE_DEFAULTS
    path.write_text("[training]\nrank = 4\n")
    assert read_base_defaults(tmp_path, "training") == {"rank": 4}
    assert read_base_defaults(tmp_path, "generation") == {}
    path.write_text("[trianing]\nrank = 4\n")
    with pytest.raises(ConfigError, match="did you mean 'training'"):
        read_base_defaults(tmp_path, "training")


def test_one_reflection_says_what_a_setting_is_and_reads_it():
    settings = {setting.name: setting for setting in settings_of(Settings)}
    assert list(settings) == list(Settings.model_fields)
    kinds = {name: setting.kinds for name, setting in settings.items()}
    assert kinds == {
        "rank": {int}, "rate": {float}, "balanced": {bool}, "title": {str}, "precision": set(), "targets": {list},
        "prompts": {str, list}, "folder": {Path}, "base": {str}, "level": {int}, "box": {tuple},
    }  # fmt: skip
    assert settings["precision"].choices == ("no", "fp16") and settings["level"].choices == ()
    texts = {"rank": "4", "rate": "1e-3", "balanced": "False", "title": "4", "targets": "a b", "prompts": "a b"}
    assert Settings.parsed(texts) == {
        "rank": 4, "rate": 1e-3, "balanced": False, "title": "4", "targets": ["a", "b"], "prompts": "a b",
    }  # fmt: skip
    assert Settings.parsed({"prompts": " a\n\nb "}) == {"prompts": ["a", "b"]}
    wrong = {"rank": "four", "rate": "", "balanced": "1", "level": "9" * 5000, "zzz": "1"}
    assert Settings.parsed(wrong) == wrong  # for the model to refuse


def test_two_names_of_one_setting_are_refused_in_one_place_and_merge_in_several(tmp_path):
    class Renamed(Settings):
        aliases: ClassVar = {"dimension": "rank"}

    assert Renamed(dimension=4) == Renamed(rank=4) == Renamed(rank=2).updated({"dimension": 4})
    with pytest.raises(ConfigError, match="'rank' and 'dimension' are two names of one setting"):
        Renamed(rank=4, dimension=4)
    (tmp_path / "dog.toml").write_text("dimension = 4\n")
    assert read_toml(tmp_path / "dog.toml", Renamed, {"rank": 2}).rank == 2
    assert Renamed(rank=2).with_base_defaults({"dimension": 4}).rank == 2
    assert Renamed().with_base_defaults({"dimension": 4}).rank == 4


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a" * 5000, "a\0b"])
def test_senseless_paths_are_no_traceback(name, tmp_path):
    try:
        made = Settings.from_values({"folder": name, "base": name})
        assert name in str(made.folder) and made.base == name
    except ConfigError as error:
        assert "does not exist here" in str(error)


def test_long_lists_of_problems_are_cut_and_counted():
    text = listing([str(i) for i in range(25)])
    assert text.startswith("25 problems:") and text.endswith("and 15 more")
    assert len(text.splitlines()) == 12
    assert listing(["one"]) == "one"


def test_settings_need_no_torch():
    code = "import sys, fusion.config, fusion.training.config; print('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("quoted", ["x" * 5000, "a word " * 1000, "/".join(["folder"] * 1000)])
def test_messages_leave_out_the_middle_of_what_is_long(quoted):
    text = str(FormatError(f"'{quoted}' is not a name; choose another."))
    assert len(text) <= 2400 and text.startswith(f"'{quoted[:100]}") and text.endswith("is not a name; choose another.")
    assert str(FormatError(text)) == text and str(FormatError(f"{'x' * 299} is short")).startswith("x" * 299)
