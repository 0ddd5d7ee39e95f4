"""What a mistake at the keyboard gets: one line, a suggestion, an exit code."""

import pytest

from fusion.cli import main
from fusion.errors import FusionError


def said(capsys) -> str:
    """The one line of an error; a pointer to --help may follow."""
    first, *rest = capsys.readouterr().err.strip().splitlines()
    assert len(rest) <= 1 and all(line.startswith("See fusion") for line in rest)
    return first


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["fuze"], "did you mean 'fuse'?"),
        (["fuse", "a.safetensors", "-o", "b.safetensors", "--methd", "x"], "did you mean '--method'?"),
        (["train", "--rnak", "4"], "did you mean '--rank'?"),
        (["train", "--learning_rat=1"], "did you mean '--learning_rate'?"),
        (["generate", "--prompt", "x", "--sed", "1"], "did you mean '--seed'?"),
    ],
)
def test_unknown_words_are_usage_errors_with_a_suggestion(words, suggestion, capsys):
    assert main(words) == 2
    assert said(capsys).endswith(suggestion)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fuse", "a.safetensors"],
        ["fuse", "a.safetensors", "-o", "b.safetensors", "--rank", "many"],
        ["export", "a.safetensors", "-o", "b.safetensors", "--to", "onnx"],
        ["generate"],
        ["train", "--rank", "0", "--token", "<dog>", "--instance_data_dir", "."],
        ["train", "--token", "<dog>"],
        ["train", "--random_flip", "perhaps"],
    ],
)
def test_incomplete_or_impossible_commands_are_usage_errors(words, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err


def test_abbreviations_are_not_guessed(capsys):
    assert main(["generate", "--promp", "x"]) == 2
    assert "did you mean '--prompt'?" in said(capsys)


def test_an_error_of_the_user_is_one_line_and_1(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "missing.safetensors")]) == 1
    line = said(capsys)
    assert line.startswith("error: ") and "missing.safetensors" in line


def test_an_error_of_several_lines_is_printed_as_one(monkeypatch, capsys):
    fail(monkeypatch, FusionError("two\n- problems"))
    assert main(["inspect", "x"]) == 1
    assert said(capsys) == "error: two - problems"


def test_an_interrupt_is_130(monkeypatch, capsys):
    fail(monkeypatch, KeyboardInterrupt())
    assert main(["inspect", "x"]) == 130
    assert said(capsys) == "interrupted"


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    fail(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "x"])


def test_warnings_of_the_library_are_shown_once_and_on_stderr(monkeypatch, capsys):
    import logging

    def run(_args):
        logging.getLogger("fusion.models").warning("the base is a relative")

    monkeypatch.setattr("fusion.cli.inspect.run", run)
    assert main(["inspect", "x"]) == 0
    assert main(["inspect", "x"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "warning: the base is a relative\n" * 2
    assert shown.out == ""


def fail(monkeypatch, error: BaseException) -> None:
    def run(_args):
        raise error

    monkeypatch.setattr("fusion.cli.inspect.run", run)
