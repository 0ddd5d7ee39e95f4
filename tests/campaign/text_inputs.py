"""Settings, recipes, prompts and regions: how they are changed, and what is done with what was accepted.

What uses an input raises FusionError, or returns what is wrong.
"""

import json
import math
import struct
import tomllib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

import fusion
from campaign import materials
from campaign.mutations import NUMBERS, STRINGS, Mutations
from fusion.cli.generate import region
from fusion.config import read_base_defaults
from fusion.errors import FusionError

TABLES = {"training", "distillation", "generation"}
MODELS = (fusion.TrainingConfig, fusion.GenerationConfig, fusion.DistillationConfig)
FIELDS = [name for model in MODELS for name in model.model_fields]


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
    place = table.get(mutations.random.choice(sorted(TABLES)), table)
    for _ in range(mutations.random.choice((1, 2, 4))):
        number, string = mutations.random.choice(NUMBERS), mutations.random.choice(STRINGS)
        place[mutations.random.choice(fields)] = mutations.random.choice((mutations.value(), number, string))
    flat = {key: value for key, value in table.items() if not isinstance(value, dict) or key not in TABLES}
    lines = [f"{key} = {toml(value)}" for key, value in flat.items()]
    for name in TABLES & table.keys():
        lines += [f"[{name}]", *(f"{key} = {toml(value)}" for key, value in table[name].items())]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


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
    learning = fusion.DistillationConfig().with_base_defaults(read_base_defaults(path.parent, "distillation"))
    wrong = {"report_to": training.report_to, "output_name": training.output_name, "library": training.library}
    wrong |= {"prompt": drawing.prompt != "a <rex>", "token": training.token != "<rex>", "noun": training.noun}
    wrong |= {"prompts": learning.prompts, "output_dir": learning.output_dir != fusion.DistillationConfig().output_dir}
    problems = [f"a base sets {name}" for name, value in wrong.items() if value]
    return problems + [line for one in (training, drawing, learning) for line in finite(one.model_dump(mode="json"))]


def finite(data: Any) -> list[str]:
    """What is not finite in JSON values."""
    parts = data.values() if isinstance(data, Mapping) else data if isinstance(data, list | tuple) else ()
    problems = [problem for part in parts for problem in finite(part)]
    return problems + (["a number is not finite"] if isinstance(data, float) and not math.isfinite(data) else [])


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
