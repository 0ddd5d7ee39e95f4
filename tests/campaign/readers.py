"""Everything that reads a file or a text: how an input is made from a valid one, and what is done with it.

A reader's `read` raises FusionError, or returns what is wrong with what it accepted.
"""

import json
import math
import shutil
import struct
import tomllib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

import fusion
from campaign import materials
from campaign.mutations import NUMBERS, STRINGS, Mutations
from fusion.adapters.adapter import Adapter
from fusion.cli.generate import region
from fusion.config import read_base_defaults
from fusion.errors import FusionError
from fusion.formats.adapter_file import read_info
from fusion.library.spectrum_cache import cached_spectrum
from fusion.training.checkpoint import read_checkpoint
from fusion.training.dataset import instance_dataset, prepare

ORTHONORMAL = 0.05  # how far U and V of an accepted basis may be from it


@dataclass(frozen=True)
class Reader:
    """`write` puts a changed input into a folder; `weight`: how many inputs of each hundred."""

    weight: int
    write: Callable[[Mutations, Path, Path], Path]
    read: Callable[[Path, Any], list[str]]


def one_of(folder: Path, mutations: Mutations) -> Path:
    return mutations.random.choice(sorted(folder.iterdir()))


def safetensors_from(name: str) -> Callable[[Mutations, Path, Path], Path]:
    """Changed files of a folder of valid ones, or of one valid file."""

    def write(mutations: Mutations, inputs: Path, work: Path) -> Path:
        seed = one_of(inputs / name, mutations) if (inputs / name).is_dir() else inputs / name
        path = work / "x.safetensors"
        path.write_bytes(mutations.safetensors(seed.read_bytes()))
        return path

    return write


def use_adapter(path: Path, pipe: Any) -> list[str]:
    """Everything that people do with a file that was accepted. What is refused on the way is refused in one line."""
    adapter, problems = fusion.load(path), list[str]()
    problems += [f"{name} is not finite" for name, values in numbers_of(adapter) if not values.isfinite().all()]
    work, refused = path.parent, False
    steps: dict[str, Callable[[], object]] = {
        "read_info": lambda: read_info(path) if adapter.info.provenance.tool[:6] != "import" else None,
        "digest": adapter.digest,
        "save": lambda: fusion.save(adapter, work / "again.safetensors", "float32"),
        "fuse": lambda: fusion.fuse([adapter]),
        "export": lambda: fusion.export(adapter, work / "out.safetensors", "kohya"),
        "compatibility": lambda: fusion.compatibility([adapter], pipe),
        "library": lambda: fusion.Library(work).slice_map(fusion.base_info(pipe)),
    }
    for name, step in steps.items():
        try:
            step()
        except FusionError as error:
            problems += [f"{name} refuses what load accepts: {error}"] if name in ("read_info", "digest") else []
    try:
        fusion.attach(pipe, adapter).detach()
    except FusionError:
        refused = True
    skew = [name for name, values in bases_of(adapter) if not gap(values) < ORTHONORMAL]
    return problems + ([] if refused else [f"{name} is no basis" for name in skew])


def numbers_of(adapter: Adapter) -> list[tuple[str, Tensor]]:
    parts = [
        (f"{n}.{k}", t) for b in adapter.branches for n, la in b.layers.items() for k, t in la.state_dict().items()
    ]
    parts += [(token, row) for token, rows in adapter.tokens.items() for row in rows.values()]
    parts += [("strength", torch.tensor(branch.strength)) for branch in adapter.branches]
    return parts + [(f"ΔW of {n}", t) for n, delta in adapter.deltas().items() for t in (delta.up, delta.down)]


def bases_of(adapter: Adapter) -> list[tuple[str, Tensor]]:
    return [
        (f"{name}.{key}", values)
        for branch in adapter.branches
        for name, layer in branch.layers.items()
        for key, values in layer.state_dict().items()
        if key in ("basis.U", "basis.V") and values.numel()
    ]


def gap(values: Tensor) -> float:
    """How far the columns of a matrix are from orthonormal."""
    return float((values.float().T @ values.float() - torch.eye(values.shape[1])).abs().max())


def use_moments(path: Path, _: Any) -> list[str]:
    moments = [moment for concept in fusion.load_moments(path) for moment in concept.layers.values()]
    good = [m.own.isfinite().all() and m.free.isfinite().all() and math.isfinite(m.floor) for m in moments]
    problems = [] if all(good) else ["a moment is not finite"]
    return problems + (["a floor is negative"] if any(m.floor < 0 for m in moments) else [])


def write_recipe(mutations: Mutations, inputs: Path, work: Path) -> Path:
    """A damaged PNG, one whose header lies, or one with another recipe."""
    raw, path = (inputs / "recipe.png").read_bytes(), work / "x.png"
    with Image.open(inputs / "recipe.png") as picture:
        table, pixels = json.loads(picture.text["fusion"]), picture.convert("RGB")
    kind = mutations.random.random()
    if kind < 0.2:
        path.write_bytes(mutations.damaged(raw))
    elif kind < 0.3:
        path.write_bytes(crafted_png(mutations, json.dumps(table).encode()))
    else:
        info = PngImagePlugin.PngInfo()
        text = mutations.text(mutations.changed(table, mutations.random.choice((0.05, 0.2, 0.6))))
        info.add_itxt("fusion", text.encode("utf-8", "replace").decode(), zip=mutations.chance(0.3))
        pixels.save(path, pnginfo=info)
    return path


def crafted_png(mutations: Mutations, text: bytes) -> bytes:
    """A PNG that claims to be as large as it likes, with much in little."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    sides = ((64, 64), (30_000, 30_000), (10_000, 8000), (2**31 - 1, 1), (0, 0), (13_000, 13_000), (1, 2**30))
    depth, colour = mutations.random.choice((1, 8, 16)), mutations.random.choice((0, 2, 3, 6))
    header = struct.pack(">IIBBBBB", *mutations.random.choice(sides), depth, colour, 0, 0, 0)
    bomb = zlib.compress(text + b" " * mutations.random.choice((0, 10**5, 5 * 10**7)))
    texts = (chunk(b"tEXt", b"fusion\0" + text), chunk(b"zTXt", b"fusion\0\0" + bomb))
    pixels = zlib.compress(bytes(mutations.random.choice((0, 1000, 10**7))))
    chunks = [chunk(b"IHDR", header), mutations.random.choice(texts), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    if mutations.chance(0.3):
        mutations.random.shuffle(chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def use_recipe(path: Path, _: Any) -> list[str]:
    recipe = fusion.recipe_of(path)
    recipe.parameters(), recipe.to_json(), recipe.picture_seed
    return finite(recipe.config.model_dump(mode="json")) + finite([used.strength for used in recipe.adapters])


def finite(data: Any) -> list[str]:
    """What is not finite in JSON values."""
    parts = data.values() if isinstance(data, Mapping) else data if isinstance(data, list | tuple) else ()
    problems = [problem for part in parts for problem in finite(part)]
    return problems + (["a number is not finite"] if isinstance(data, float) and not math.isfinite(data) else [])


def toml(data: Any) -> str:
    """A value as TOML."""
    match data:
        case bool() | int():
            return str(data).lower()
        case float():
            return repr(data)
        case list():
            return f"[{', '.join(map(toml, data))}]"
        case dict():
            return f"{{{', '.join(f'{json.dumps(str(key))} = {toml(part)}' for key, part in data.items())}}}"
    return json.dumps(str(data or ""), ensure_ascii=False)


def changed_toml(mutations: Mutations, text: str, fields: list[str]) -> bytes:
    kind = mutations.random.random()
    if kind < 0.2:
        return mutations.damaged(text.encode())
    if kind < 0.28:
        bombs = ("x = " + "[" * 100_000, "token = " + "9" * 5000, "x = " + "{a=" * 5000, "\ufeff" + text)
        return mutations.random.choice(bombs).encode()
    table = tomllib.loads(text)
    place = table.get("training", table) if mutations.chance(0.5) else table.get("generation", table)
    for _ in range(mutations.random.choice((1, 2, 4))):
        number, string = mutations.random.choice(NUMBERS), mutations.random.choice(STRINGS)
        place[mutations.random.choice(fields)] = mutations.random.choice((mutations.value(), number, string))
    flat = {key: value for key, value in table.items() if not isinstance(value, dict) or key not in TABLES}
    lines = [f"{key} = {toml(value)}" for key, value in flat.items()]
    for name in TABLES & table.keys():
        lines += [f"[{name}]", *(f"{key} = {toml(value)}" for key, value in table[name].items())]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


TABLES = {"training", "generation"}
FIELDS = [*fusion.TrainingConfig.model_fields, *fusion.GenerationConfig.model_fields]


def write_settings(mutations: Mutations, inputs: Path, work: Path) -> Path:
    path = work / "x.toml"
    path.write_bytes(changed_toml(mutations, (inputs / "train.toml").read_text(), FIELDS))
    return path


def use_settings(path: Path, _: Any) -> list[str]:
    config, again = fusion.TrainingConfig.from_toml(path), path.with_name("again.toml")
    again.write_text(config.to_toml(), encoding="utf-8")
    config.lasting_settings(), config.class_folder(), config.validation_prompts()
    problems = [] if fusion.TrainingConfig.from_toml(again) == config else ["to_toml reads back as something else"]
    return problems + finite(config.model_dump(mode="json"))


def write_base_settings(mutations: Mutations, _: Path, work: Path) -> Path:
    (work / "base").mkdir(exist_ok=True)
    path = work / "base" / "fusion.toml"
    path.write_bytes(changed_toml(mutations, materials.DEFAULTS, FIELDS))
    return path


def use_base_settings(path: Path, _: Any) -> list[str]:
    """A base is other people's work: it may set how to train and draw, and nothing else."""
    training = fusion.TrainingConfig(token="<rex>", instance_data_dir=path.parent)
    training = training.with_base_defaults(read_base_defaults(path.parent, "training"))
    drawing = fusion.GenerationConfig(prompt="a <rex>").with_base_defaults(
        read_base_defaults(path.parent, "generation")
    )
    wrong = {"report_to": training.report_to, "output_name": training.output_name, "library": training.library}
    wrong |= {"prompt": drawing.prompt != "a <rex>", "token": training.token != "<rex>", "noun": training.noun}
    problems = [f"a base sets {name}" for name, value in wrong.items() if value]
    return problems + finite(training.model_dump(mode="json")) + finite(drawing.model_dump(mode="json"))


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
    seed = one_of(inputs / "pictures", mutations)
    path = work / f"x{mutations.random.choice((seed.suffix, seed.suffix, '.png', '.jpg'))}"
    crafted = mutations.chance(0.15)
    path.write_bytes(crafted_png(mutations, b"x") if crafted else mutations.damaged(seed.read_bytes()))
    return path


def use_picture(path: Path, _: Any) -> list[str]:
    picture = fusion.load_picture(path)
    return [] if picture.mode == "RGB" and min(picture.size) > 0 else [f"a picture of {picture.mode} {picture.size}"]


def use_mask(path: Path, _: Any) -> list[str]:
    from fusion.training.pictures import load_mask

    mask = load_mask(path)
    return [] if mask.mode == "L" and mask.getextrema() != (0, 0) else ["a mask that hides everything"]


def write_checkpoint(mutations: Mutations, inputs: Path, work: Path) -> Path:
    """Of today's form, or of the form before, whose settings are in a file beside the tensors."""
    folder = work / "checkpoint-2"
    shutil.copytree(inputs / mutations.random.choice(("checkpoint-2", "earlier/checkpoint-2")), folder)
    tensors, state = folder / "state.safetensors", folder / "state.json"
    if state.exists() and mutations.chance(0.6):
        state.write_bytes(mutations.encoded(mutations.changed(json.loads(state.read_text()), 0.2)))
    else:
        tensors.write_bytes(mutations.safetensors(tensors.read_bytes()))
    return folder


def use_checkpoint(path: Path, valid: Mapping[str, Tensor]) -> list[str]:
    """Restored as a training does, and one step taken with it."""
    checkpoint = read_checkpoint(path, {"max_train_steps": 2})
    start = "parameter."
    parameters = {n.removeprefix(start): nn.Parameter(torch.zeros_like(t)) for n, t in valid.items() if start in n}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-3)
    checkpoint.restore(parameters, optimizer, None)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return [f"{name} is not finite" for name, parameter in parameters.items() if not parameter.isfinite().all()]


def write_spectrum(mutations: Mutations, inputs: Path, work: Path) -> Path:
    (seed,) = (inputs / "spectra").iterdir()
    (work / "spectra").mkdir()
    path = work / "spectra" / seed.name
    path.write_bytes(mutations.safetensors(seed.read_bytes()))
    return path


def use_spectrum(path: Path, _: Any) -> list[str]:
    """A damaged one is computed again: whatever the file holds, the directions are those of the weight."""
    U, S, V = cached_spectrum(materials.WEIGHT, 8, path.parent)
    difference = (materials.WEIGHT @ V - U * S).abs().max()
    return [] if difference < 1e-2 and max(gap(U), gap(V)) < ORTHONORMAL else ["directions of another weight"]


def write_library(mutations: Mutations, inputs: Path, work: Path) -> Path:
    """A library of damaged files, reservations with strange names, and an unfinished training."""
    folder, pick = work / "library", mutations.random
    shutil.copytree(inputs / "library", folder)
    for file in sorted(folder.rglob("*.safetensors")):
        if mutations.chance(0.4):
            file.write_bytes(mutations.safetensors(file.read_bytes()))
    for file in folder.rglob("training.toml"):
        if mutations.chance(0.5):
            file.write_bytes(changed_toml(mutations, file.read_text(), FIELDS))
    slices = ("0-4-1", "0-0-0", "9" * 30 + "-4-1", "-1-4-1", "a-b-c", "", "0-4", "0-70000-1")
    for _ in range(pick.randrange(3)):
        kind = pick.choice(("0" * 16, "kind", ""))
        (folder / f".00000000.{kind}.{pick.choice(slices)}.{pick.choice(('1', '', 'x'))}.reserved").touch()
    if mutations.chance(0.2):
        (folder / pick.choice(("loop.safetensors", "rex.png", ".unfinished/loop"))).symlink_to("loop")
    if mutations.chance(0.2):
        (folder / pick.choice(("tom.safetensors", ".unfinished/tom", ".x.reserved"))).mkdir(exist_ok=True)
    return folder


def use_library(path: Path, pipe: Any) -> list[str]:
    library, base = fusion.Library(path), fusion.base_info(pipe)
    owned = library.slice_map(base)
    [str(training) for training in fusion.find_unfinished_trainings(library).values()]
    with library.reserve(base, 4, capacity=32) as reservation:
        overlap = [entry.owner for entry in owned if entry.slice.overlap(reservation.slice)]
    [library.find(entry.path.stem) for entry in library.adapters()]
    return [f"a slice that {owner} has" for owner in overlap]


def write_text(mutations: Mutations, _: Path, work: Path) -> Path:
    """A prompt, settings of a drawing, and regions as flags and as JSON have them."""
    pick = mutations.random
    words = ("a", "<rex>", "<REX>", "<rex", "rex>", "(dog:1.5)", "[a|b]", "BREAK", "AND", "\\", "<|endoftext|>", ",")
    prompt = pick.choice(("", " ", "\n")).join(pick.choice((*words, *STRINGS)) for _ in range(pick.choice((1, 3, 40))))
    box = " ".join(str(pick.choice((0, 0.5, 1, *NUMBERS))) for _ in range(pick.choice((4, 4, 4, 3, 5))))
    flag = pick.choice((f"{prompt}:{box}", f"a dog: {box}", f"<rex>: {pick.choice(STRINGS)}", prompt, f":{box}"))
    entry = mutations.changed({"prompt": "a dog", "box": [0, 0, 0.5, 1]}, 0.6)
    settings = mutations.changed({"prompt": prompt, "num_inference_steps": 1, "width": 16, "height": 16}, 0.15)
    path = work / "x.json"
    path.write_text(json.dumps({"prompt": prompt, "flag": flag, "entry": entry, "settings": settings}))
    return path


def use_text(path: Path, pipe: Any) -> list[str]:
    table, problems = json.loads(path.read_text()), list[str]()
    regions = list[fusion.Region]()
    for read in (lambda: region(table["flag"]), lambda: fusion.Region.from_json(table["entry"])):
        try:
            regions.append(read())
        except FusionError:
            continue
    problems += [f"the region {part.box}" for part in regions if part.box and not all(0 <= x <= 1 for x in part.box)]
    config = fusion.GenerationConfig.model_validate(table["settings"])
    problems += finite(config.model_dump(mode="json"))
    sizes = {"width": 16, "height": 16, "num_images": 1, "num_inference_steps": 1, "image_strength": 0.6}
    drawing = config.updated({**sizes, "regions": tuple(regions)})
    if len(config.prompt) < 10_000:  # the toy's tokenizer spells: a second for ten thousand letters
        (picture,) = fusion.generate(pipe, drawing, [pipe.rex])
        problems += [] if picture.image.size == (16, 16) else ["a picture of another size"]
        fusion.Recipe.from_json(json.loads(json.dumps(picture.recipe.to_json())))
    return problems


READERS = {
    "adapters": Reader(25, safetensors_from("adapters"), use_adapter),
    "loras": Reader(15, safetensors_from("loras"), use_adapter),
    "embeddings": Reader(3, safetensors_from("embeddings"), use_adapter),
    "moments": Reader(5, safetensors_from("moments.safetensors"), use_moments),
    "recipes": Reader(10, write_recipe, use_recipe),
    "settings of trainings": Reader(10, write_settings, use_settings),
    "settings of bases": Reader(5, write_base_settings, use_base_settings),
    "data sets": Reader(6, write_dataset, use_dataset),
    "pictures": Reader(5, write_picture, use_picture),
    "masks": Reader(3, write_picture, use_mask),
    "checkpoints": Reader(5, write_checkpoint, use_checkpoint),
    "spectra": Reader(3, write_spectrum, use_spectrum),
    "libraries": Reader(3, write_library, use_library),
    "prompts and regions": Reader(2, write_text, use_text),
}
