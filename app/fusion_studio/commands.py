"""What a click would be on the command line: every action of the page can be repeated in a terminal, or in a script."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fusion
from fusion_studio.session import Session

PICTURES = "FOLDER_OF_PICTURES"


def command(*words: object) -> str:
    return shlex.join(["fusion", *(f"{word:g}" if isinstance(word, float) else str(word) for word in words)])


def file_of(session: Session, key: str) -> Path:
    return near(session.library / f"{key}.safetensors")


def near(path: Path) -> Path:
    """From where the app was started, as whoever copies the line is likely to be there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def used(session: Session, picked: Mapping[str, float]) -> list[object]:
    """The picked files, and their strengths if they are not all 1."""
    strengths = ["--strength", *picked.values()] if any(value != 1 for value in picked.values()) else []
    return [*(file_of(session, key) for key in picked), *strengths]


def generate(
    session: Session, picked: Mapping[str, float], config: fusion.GenerationConfig,
    regions: Sequence[Mapping[str, Any]] = (), *, from_picture: bool = False,
) -> str:  # fmt: skip
    """`regions` as the page has them; a painted one and a picture to start from stand there by a name to replace."""
    values = {name: value for name, value in config.settings().items() if value != "" and name != "regions"}
    flags = [word for name, value in values.items() for word in (f"--{name}", value)]
    for number, region in enumerate(regions, start=1):
        box = region.get("box")
        where = " ".join(f"{share:g}" for share in box) if box else f"MASK_{number}.png"
        flags += ["--region", f"{region['prompt']}: {where}"]
    flags += ["--region", "auto"] * (config.regions == "auto") + ["--image", "PICTURE.png"] * from_picture
    return command("generate", *used(session, picked), *flags, *session.base_flags)


def distill(
    session: Session, picked: Mapping[str, float], name: str, settings: Mapping[str, object], *, own_prompts: bool
) -> str:
    """One export of one file: several concepts are fused before."""
    first, file = [], file_of(session, next(iter(picked)))
    if len(picked) > 1 or set(picked.values()) != {1}:
        file = Path(f"{name}.safetensors")
        first = [command("fuse", *used(session, picked), "-o", file)]
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    flags += ["--prompts", "PROMPTS.txt"] * own_prompts
    export = command(
        "export", file, "--to", "kohya", "--distill", "-o", f"{name}_lora.safetensors", *flags, *session.base_flags
    )
    return " && ".join([*first, export])


def train(session: Session, token: str, noun: str, preset: str, settings: Mapping[str, str], folder: object) -> str:
    further = [word for name, text in settings.items() for word in (f"--{name}", *text.splitlines())]
    named = ["--token", token, "--noun", noun, "--preset", preset, "--library", session.library]
    return command("train", *session.base_flags, "--instance_data_dir", folder or PICTURES, *named, *further)


def resume(folder: Path) -> str:
    return command("train", "--config", near(folder) / "training.toml", "--resume_from_checkpoint", "latest")
