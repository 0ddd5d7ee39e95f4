"""Data sets, pictures and masks: how they are changed, and what is done with what was accepted."""

import json
import shutil
from pathlib import Path
from typing import Any

import fusion
from campaign.mutations import STRINGS, Mutations
from campaign.text_inputs import crafted_png
from fusion.formats.picture_file import load_mask
from fusion.training.dataset import instance_dataset, prepare


def write_dataset(mutations: Mutations, inputs: Path, work: Path) -> Path:
    folder, pick = work / "data", mutations.random
    shutil.copytree(inputs / "data", folder)
    listing = folder / "metadata.jsonl"
    lines = listing.read_text().splitlines()
    match pick.randrange(6):
        case 0 | 1 | 2:
            lines = [mutations.text(mutations.changed(json.loads(line), pick.choice((0.2, 0.6)))) for line in lines]
        case 3:
            lines += [pick.choice(STRINGS) for _ in range(3)]
        case 4:
            names = (*STRINGS, "01.png", "masks/00.png", ".hidden.png", "./01.png", "sub/../01.png", "loop/x.png")
            texts = ("a {token}", "\ud800 {token}", "{token}" * 10_000, "{token}\0", "{token}\u2028x")
            lines = [json.dumps({"file_name": pick.choice(names), "text": pick.choice(texts)})]
    listing.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    for share, change in ((0.15, _link_loop), (0.1, _link_outside), (0.4, _damage_picture), (0.15, _strange_folder)):
        if mutations.chance(share):
            change(mutations, folder)
    if mutations.chance(0.2):
        texts = (b"\xff\xfe", b"", b"a {token}", b"\0", b"a" * 10**6, b"{token} " * 10**5, b"rex on a rex")
        (folder / pick.choice(("01.txt", "3_rex dog/00.txt"))).write_bytes(pick.choice(texts))
    return folder


def _link_loop(_: Mutations, folder: Path) -> None:
    (folder / "loop").symlink_to("loop")


def _link_outside(_: Mutations, folder: Path) -> None:
    (folder / "outside.png").symlink_to("/etc/passwd")


def _damage_picture(mutations: Mutations, folder: Path) -> None:
    file = folder / mutations.random.choice(("00.png", "01.png", "masks/00.png", "3_rex dog/00.png"))
    file.write_bytes(mutations.damaged(file.read_bytes()))


def _strange_folder(mutations: Mutations, folder: Path) -> None:
    names = ("99999999999999999999_x", "4_x", "10_" + "é" * 20, "0_a", "3_rex", "1000000_rex", "2_<rex>", "5_a rex")
    name = mutations.random.choice(names)
    shutil.copytree(folder / "3_rex dog", folder / name)


def use_dataset(path: Path, _: Any) -> list[str]:
    config = fusion.TrainingConfig(token="<rex>", instance_data_dir=path, resolution=32)
    dataset, problems = instance_dataset(config), list[str]()
    dataset.order(2, 0).batch(0)
    for example in dataset.examples:
        f"{example.caption} {example.repeats}".encode()
        cut = prepare(example, 32, config)
        inside = example.image_path.resolve().is_relative_to(path.resolve())
        conditions = {"a picture outside the folder": inside, "a caption without the token": "<rex>" in example.caption}
        conditions |= {"pixels out of range": float(cut.pixels.abs().max()) <= 1, "0 repeats": example.repeats > 0}
        problems += [problem for problem, holds in conditions.items() if not holds]
    return problems


def write_picture(mutations: Mutations, inputs: Path, work: Path) -> Path:
    seed = mutations.random.choice(sorted((inputs / "pictures").iterdir()))
    path = work / f"x{mutations.random.choice((seed.suffix, seed.suffix, '.png', '.jpg'))}"
    crafted = mutations.chance(0.15)
    path.write_bytes(crafted_png(mutations, b"x") if crafted else mutations.damaged(seed.read_bytes()))
    return path


def use_picture(path: Path, _: Any) -> list[str]:
    picture = fusion.load_picture(path)
    return [] if picture.mode == "RGB" and min(picture.size) > 0 else [f"a picture of {picture.mode} {picture.size}"]


def use_mask(path: Path, _: Any) -> list[str]:
    mask = load_mask(path)
    return [] if mask.mode == "L" and mask.getextrema() != (0, 0) else ["a mask that hides everything"]
