"""Law 15, first half: help is immediate and imports nothing heavy."""

import subprocess
import sys

import pytest

from fusion.cli import VERBS, main
from fusion.config import settings_of
from fusion.generation.config import GenerationConfig
from fusion.training.config import TrainingConfig

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib", "PIL", "numpy"}


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_imports_no_torch(verb):
    code = (
        "import sys; from fusion.cli import main; code = main(sys.argv[1:]); "
        f"print(*sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr); sys.exit(code)"
    )
    words = [sys.executable, "-c", code, *([verb] if verb else []), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: fusion {verb or '<command>'}")
    assert done.stderr.split() == []


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown and what in shown for verb, what in VERBS.items())


def test_train_help_explains_every_setting(capsys):
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in TrainingConfig.model_fields.items():
        assert f"--{name} " in shown
        assert field.description and " ".join(field.description.split()) in shown


def test_generate_help_explains_every_setting(capsys):
    assert main(["generate", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for setting in settings_of(GenerationConfig):
        assert f"--{setting.name} " in shown
        assert setting.name == "regions" or " ".join(setting.help.split()) in shown


def test_fuse_help_names_every_method(capsys):
    from fusion.methods import METHODS

    assert main(["fuse", "--help"]) == 0
    shown = capsys.readouterr().out
    assert [method for method in METHODS if method not in shown] == []


def test_generate_help_names_schedulers_that_exist(capsys):
    from fusion.generation.schedulers import SCHEDULERS

    assert main(["generate", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    listed = shown.partition("--scheduler TEXT ")[2].partition(", ... ")[0].split(", ")
    assert len(listed) > 3 and set(listed) <= SCHEDULERS.keys()


def test_python_m_fusion_is_the_same_command_line():
    done = subprocess.run([sys.executable, "-m", "fusion", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("spectral-fusion ")
