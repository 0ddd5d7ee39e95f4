"""What a mistake at the keyboard gets: one line, a suggestion, an exit code."""

import pytest
import torch
from PIL import Image

from fusion.cli import main
from fusion.errors import FusionError

WHITE = Image.new("L", (8, 8), 255)


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


BOUNDED = {
    "evaluate a --seeds": "0 -1 10001 nan 1e3",
    "evaluate a --seed": f"-1 {2**63} nan inf x",
    "compare a --prompt x -o x.png --steps": "0 1001 nan",
    "compare a --prompt x -o x.png --seed": f"-1 {2**63}",
    "compare a --prompt x -o x.png --strengths": "nan inf 1e9",
    "fuse a -o b.safetensors --rank": "0 -1 1000000 nan",
    "fuse a -o b.safetensors --energy": "0 2 nan",
    "export a --to kohya -o b.safetensors --energy": "-1 nan",
    "generate a --prompt x --strength": "nan inf 1e30",
    "generate --prompt x --steps": "0 1001 nan",
    "generate --prompt x --seed": f"-1 {2**63}",
    "generate --prompt x --width": "0 -8 8193 nan",
    "generate --prompt x --num_images": "0 257",
    "generate --prompt x --image_strength": "0 1.1 nan",
    "train --token <a> --instance_data_dir . --max_train_steps": "0 nan 100000000",
    "train --token <a> --instance_data_dir . --resolution": "0 80000",
}


def test_messages_of_numbers_name_the_flag_that_was_typed(capsys):
    messages = {
        "--steps 0": "--steps must be between 1 and 1000, got 0",
        "--seed=x": "--seed must be a whole number, got 'x'",
    }
    for words, message in messages.items():
        assert main(["compare", "a", "--prompt", "x", "-o", "x.png", *words.split()]) == 2
        assert said(capsys) == f"error: {message}"


@pytest.mark.parametrize("command", BOUNDED)
def test_a_number_out_of_bounds_is_one_line_before_anything_is_read(command, capsys):
    for value in BOUNDED[command].split():
        assert main([*command.split(), value]) == 2
        line = said(capsys)
        assert command.split("-")[-1] in line and value[:5].lower() in line.lower(), line


@pytest.mark.parametrize(
    ("text", "box", "mask"),
    [
        ("a <dog>: 0 0 .5 1", (0, 0, 0.5, 1), None),
        ("a: b: 0,0, 5e-1 1", (0, 0, 0.5, 1), None),
        ("a <dog>: nan 0 0.5 1", None, "nan 0 0.5 1"),
        ("a <dog>: C:\\masks\\m.png", None, "C:\\masks\\m.png"),
        ("a <dog>:d:/m.png", None, "d:/m.png"),
        ("time 10:30: m.png", None, "m.png"),
    ],
)
def test_a_region_is_a_prompt_with_a_box_or_a_file(text, box, mask, monkeypatch):
    from fusion.cli.generate import region

    files = []
    monkeypatch.setattr("fusion.formats.picture_file.load_mask", lambda path: files.append(path) or WHITE)
    if mask == "nan 0 0.5 1":
        with pytest.raises(FusionError, match=r"has the box nan 0 0\.5 1"):
            region(text)
    else:
        part = region(text)
        assert (part.box, files) == (box, [mask] * (mask is not None))
        assert part.prompt == text[: len(part.prompt)] and part.prompt[-1] not in ": "


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


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (MemoryError(), ""),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), " for another 2.00 GiB"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 512000000000 bytes."),
            "512 GB",
        ),
        (RuntimeError("another error"), None),
    ],
)
def test_too_little_memory_is_one_line_in_every_verb(error, size, monkeypatch, capsys):
    def run(_args):
        raise error

    monkeypatch.setattr("fusion.cli.compare.run", run)
    words = ["compare", "a.safetensors", "--prompt", "x", "-o", "x.png"]
    if size is None:
        with pytest.raises(RuntimeError, match="another"):
            main(words)
        return
    assert main(words) == 1
    line = said(capsys)
    assert line.startswith("error: The memory does not suffice") and size in line and "--dtype bfloat16" in line
