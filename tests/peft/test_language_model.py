"""docs/peft.md is true: its code runs, in its order. So does the example that it reports on, at toy size."""

import re
from pathlib import Path

import pytest

from benchmarks import language_model

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "peft.md").read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, "docs/peft.md", "exec"), names)
    assert "{'french': 0, 'legal': 1}" in capsys.readouterr().out
    assert (tmp_path / "lora" / "adapter_config.json").is_file() and (tmp_path / "unet.safetensors").is_file()


def test_a_dialect_is_mostly_the_same_language():
    language = language_model.Language(0)
    dialect = language.dialect(1)
    shared = (language.followers == dialect.followers).all(dim=1).float().mean()
    assert 0.3 < shared < 0.9
    sentences = next(language.sentences(3))
    assert sentences.equal(next(language.sentences(3))) and not sentences.equal(next(language.sentences(4)))
    classes = sentences // (language_model.WORDS // language_model.CLASSES)
    for before, after in zip(classes[:, 1:-1].flatten(), classes[:, 2:].flatten(), strict=True):
        assert after in language.followers[before]


def test_the_example_runs(capsys):
    language_model.main(["--quick"])
    table = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:4]] == ["untrained", "LoRA, rank 4"]
