"""README is true: its tree is the real one, its commands and its Python run in their order (law 18). So is laws.md."""

import re
import shlex
from pathlib import Path

import pytest

from fusion.cli import main
from tools import reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
BLOCKS = CODE.findall(README)
DOCS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
# Their blocks run after README's, with what these have trained.
PAGES = ("first-concept.md", "several-concepts.md", "community-loras.md", "python.md")
QUICK = {
    "train": ["--max_train_steps", "2", "--num_validation_images", "0"],
    "generate": ["--steps", "2"],
    "--distill": ["--max_train_steps", "2"],
}
# How much of the base is recorded, and what a distillation measures.
SMALL = {
    "training.quiet_loss.NOISE_LEVELS": 1,
    "distillation.loop.HELD_OUT": 8,
    "distillation.loop.SCALE_PROMPTS": 4,
    "distillation.loop.START_PROMPTS": 32,
}


@pytest.mark.slow
def test_commands_and_python_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    for name, count in SMALL.items():
        monkeypatch.setattr(f"fusion.{name}", count)
    names: dict[str, object] = {}
    for kind, block in [*BLOCKS, *(block for page in PAGES for block in CODE.findall(DOCS[page]))]:
        if kind == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line)
                assert words[0] == "fusion"
                quick = [option for word in words for option in QUICK.get(word, [])]
                assert main([*words[1:], *quick]) == 0, f"{line}\n{capsys.readouterr().err}"
        elif kind == "python":
            exec(compile(block, "a block of Python", "exec"), names)
    assert {"both.png", "pair.png", "auto.png", "bound.png", "python.png"} <= {p.name for p in Path("out").iterdir()}


def test_tree_is_the_real_one():
    tree = next(block for kind, block in BLOCKS if not kind and block.startswith("assets/"))
    listed: set[str] = set()
    parents: list[str] = []
    for line in tree.splitlines():
        depth, text = (len(line) - len(line.lstrip())) // 2, line.strip().split("  ")[0]
        parents = parents[:depth]
        for name in text.split():
            listed.add("".join([*parents, name]))
        parents.append(text.split()[0])
    for path in listed:
        assert (ROOT / path).exists(), f"README lists {path}, which does not exist"
    for folder in ("fusion", "app"):
        real = {
            f"{folder}/{path.name}{'/' if path.is_dir() else ''}"
            for path in (ROOT / folder).iterdir()
            if not path.name.startswith(("_", ".")) and path.suffix in ("", ".py")
        }
        assert real <= listed, f"README's tree misses {sorted(real - listed)}"


def test_pictures_and_links_exist():
    for name, text in {"README.md": README, **{f"docs/{page}": text for page, text in DOCS.items()}}.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name} points at {target}"


def test_tests_that_the_docs_name_exist():
    for page, text in DOCS.items():
        for file, name in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", text):
            source = ROOT / file
            assert source.is_file(), f"docs/{page} names {file}"
            assert not name or f"def {name}(" in source.read_text(encoding="utf-8"), f"docs/{page} names {name}"


def test_the_reference_is_that_of_the_code():
    assert DOCS["reference.md"] == reference.page(), "write it again: python -m tools.reference"


def test_the_site_has_every_page():
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(DOCS)


def test_every_law_that_is_cited_stands_in_laws_md_and_names_tests_that_exist():
    rows = re.findall(
        r"^\| (\d+) \|.*\| ([^|]+) \|$", (ROOT / "docs/laws.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    numbers = [int(number) for number, _ in rows]
    assert sorted(numbers) == [*range(1, len(numbers) + 1)]
    for _, files in rows:
        for file in files.split(", "):
            assert (ROOT / file).is_file(), f"docs/laws.md names {file}, which does not exist"
    for path in (path for folder in ("fusion", "app", "tests") for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for cited in re.findall(r"(?i)\blaws? ((?:\d+|, | and )+)", text):
            strange = {int(number) for number in re.findall(r"\d+", cited)} - {*numbers}
            assert not strange, f"{path.relative_to(ROOT)} cites law {strange}"
