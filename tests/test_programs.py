"""Every program answers --help at once and in its own words; the libraries underneath show nothing of theirs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib", "gradio"}
PROGRAMS = {
    "fusion": "run_module('fusion', run_name='__main__')",
    "studio": "run_module('fusion_studio', run_name='__main__')",
    "benchmarks": "run_module('benchmarks', run_name='__main__')",
    "laboratory": "run_module('benchmarks.laboratory', run_name='__main__')",
    "pocket": "run_module('tools.pocket', run_name='__main__')",
}


def output_of(code: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_immediate_and_our_own(program):
    code = (
        "import atexit, runpy, sys; sys.argv = ['program', '--help'];"
        f"atexit.register(lambda: print('loaded:', *{HEAVY!r} & sys.modules.keys())); runpy.{PROGRAMS[program]}"
    )
    stdout, stderr = output_of(code)
    assert stdout.startswith("usage: ") and stdout.endswith("loaded:\n") and stderr == ""


def test_opening_models_shows_nothing_of_the_libraries_underneath_and_leaves_their_settings():
    code = (
        "import fusion; fusion.generate; pipe = fusion.open_pipeline(device='cpu'); fusion.open_judge(device='cpu');"
        "import diffusers, transformers, huggingface_hub; logs = diffusers.utils.logging, transformers.utils.logging;"
        "assert all(log.is_progress_bar_enabled() and log.get_verbosity() == log.WARNING for log in logs);"
        "assert not huggingface_hub.utils.are_progress_bars_disabled()"
    )
    assert output_of(code) == ("", "")


def test_a_file_called_app_beside_a_program_shadows_nothing(tmp_path):
    (tmp_path / "app.py").write_text("raise RuntimeError('this is somebody else')")
    words = [sys.executable, "-m", "fusion_studio", "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m fusion_studio ") and done.stderr == ""
    code = "import fusion_studio.interface, app"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "this is somebody else" in done.stderr  # the name is theirs: no module of ours is called app
