"""Draw pictures of a prompt. Every PNG carries its whole recipe, and --from draws it again."""

import hashlib
import logging
import re
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from fusion.cli.console import UsageError, add_base_arguments, add_use_arguments, example, open_base, progress
from fusion.errors import FormatError, closest

logger = logging.getLogger(__name__)

# What a recipe and the flags have in common, by the names `generate` gives them.
SETTINGS = (
    *("prompt", "negative_prompt", "seed", "batch", "steps", "guidance_scale", "guidance_rescale", "scheduler"),
    *("width", "height", "image_strength", "gating", "regions"),
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = 'fusion generate [ADAPTER ...] --prompt "..." [options]'
    parser.epilog = 'example: fusion generate pets.safetensors --prompt "a <dog> beside a <cat>" --num_images 4 -o out'
    add = parser.add_argument
    add("adapters", nargs="*", type=Path, metavar="ADAPTER", help="adapter files; none draws what the base knows")
    add("--prompt", metavar="TEXT", help='what to draw, with the adapters\' tokens: "a <dog> on a beach"')
    add("--negative_prompt", metavar="TEXT", help="what to stay away from")
    add("--from", dest="source", type=Path, metavar="PNG", help="repeat the recipe in this picture; flags override it")
    add("-o", "--output", type=Path, default=Path("out"), metavar="PATH", help="folder, or .png file (default: out)")
    add_use_arguments(parser)
    add = parser.add_argument_group("drawing", "what is not given comes from the base").add_argument
    add("--seed", type=int, metavar="N", help="of the first picture, the next ones count up (default: 0)")
    add("--num_images", dest="batch", type=int, metavar="N", help="how many pictures (default: 1)")
    add("--steps", type=int, metavar="N", help="denoising steps")
    add("--guidance_scale", type=float, metavar="X", help="how closely to follow the prompt")
    add("--guidance_rescale", type=float, metavar="X", help="0 to 1: take back the contrast that guidance adds")
    add("--scheduler", metavar="NAME", help="ddim, ddpm, euler, euler_a, dpmpp_2m, unipc, heun, ...")
    add("--width", type=int, metavar="PIXELS", help="width of the picture")
    add("--height", type=int, metavar="PIXELS", help="height of the picture")
    where = '"<dog>: 0 0 0.5 1" (left top right bottom, shares of the picture) or "a <dog>: mask.png"; repeatable'
    where += "; or auto: each concept where it is found to stand"
    add("--region", dest="regions", action="append", metavar="PROMPT: PLACE", help=f"what a part of it shows: {where}")
    add("--image", type=Path, metavar="FILE", help="start from this picture instead of noise")
    add("--image_strength", type=float, metavar="X", help="0 to 1: how far to leave it (default: 0.6)")
    add_base_arguments(parser)


def run(args: Namespace) -> None:
    from fusion.generation.drawing import generate, recipe_of

    recipe = recipe_of(args.source) if args.source else None
    given = {name: value for name, value in vars(args).items() if value is not None}
    values = {**(vars(recipe) if recipe else {}), **given}
    settings = {name: values[name] for name in SETTINGS if values.get(name) is not None}
    if "prompt" not in settings:
        raise UsageError("Say what to draw with --prompt, or repeat a picture with --from.")
    adapters, files, strengths = choose_adapters(args, recipe)
    if args.regions:
        settings["regions"] = "auto" if args.regions == ["auto"] else [region(text) for text in args.regions]
    image = starting_picture(args.image, args.source, recipe)
    if recipe and recipe.base != "pocket" and not args.base:
        raise UsageError(f"This picture was drawn on '{recipe.base}'; say where that is with --base.")
    pipe = open_base(args.base, args, args.dtype)
    asked = settings.get("regions", ())
    check_words(" ".join([settings["prompt"], *(part.prompt for part in asked if asked != "auto")]), adapters)
    with progress() as advance:
        pictures = generate(pipe, adapters=adapters, strengths=strengths, image=image, on_step=advance, **settings)
    if recipe is not None and args.seed is None and args.batch is None:
        pictures = pictures[recipe.index : recipe.index + 1]  # its neighbours were drawn too: batches change last bits
    paths = [write(picture, files, args.output, several=len(pictures) > 1) for picture in pictures]
    on, another = ["--base", args.base] if args.base else [], settings.get("seed", 0) + settings.get("batch", 1)
    print(f"next: {example('generate', '--from', paths[0], *on, '--seed', another)}  # another seed")


def choose_adapters(args: Namespace, recipe: Any) -> tuple[list[Any], list[Path], list[float] | None]:
    """The adapters given, else the recipe's own, unchanged since."""
    from fusion.formats.adapter_file import load

    before = [used.strength for used in recipe.adapters] if recipe else []
    if args.adapters or recipe is None:
        same = before if len(before) == len(args.adapters) else None
        return [load(path) for path in args.adapters], args.adapters, args.strength or same
    found = [again(used, args.source) for used in recipe.adapters]
    return [adapter for adapter, _ in found], [path for _, path in found], args.strength or before


def again(used: Any, picture: Path) -> tuple[Any, Path]:
    """An adapter of a recipe and its file, where it was or beside the picture."""
    from fusion.formats.adapter_file import load

    file = Path(used.file or "")
    path = next((place for place in (file, picture.parent / file.name) if place.is_file()), None)
    if path is None:
        gone = f"'{used.file or used.name}' is gone, and '{picture}' needs it"
        raise FormatError(f"{gone}; name the adapter's file before --from.")
    adapter = load(path)
    if (digest := adapter.digest()) != used.digest:
        raise FormatError(
            f"'{path}' is not the adapter this picture was drawn with: its contents are {digest[:12]}, the recipe "
            f"says {used.digest[:12]}. To draw with it all the same, name it before --from."
        )
    return adapter, path


def check_words(prompt: str, adapters: list[Any]) -> None:
    """Warn of tokens nobody has taught, and of a prompt in which no gate opens: it would be the base's picture."""
    known = [concept.token for adapter in adapters for concept in adapter.info.concepts]
    named = re.findall(r"<[a-z0-9_-]+>", prompt)
    for token in dict.fromkeys(named):
        if token not in known:
            logger.warning("No adapter given knows %s%s", token, closest(token, known) or ".")
    if any(adapter.gated for adapter in adapters) and not set(named) & set(known):
        logger.warning("The prompt has none of the tokens %s, so no concept will be in the picture.", ", ".join(known))


def region(text: str) -> Any:
    """`PROMPT: 0 0 0.5 1` or `PROMPT: mask.png`."""
    from fusion.errors import DatasetError
    from fusion.generation.config import Region
    from fusion.training.pictures import load_mask

    prompt, colon, place = text.rpartition(":")
    if not (colon and prompt.strip() and place.strip()):
        raise UsageError(f'--region takes "PROMPT: LEFT TOP RIGHT BOTTOM" or "PROMPT: MASK.png", got "{text}".')
    numbers = re.findall(r"[-+.0-9eE]+", place) if re.fullmatch(r"[-+.,0-9eE\s]+", place) else []
    if len(numbers) == 4:
        left, top, right, bottom = map(float, numbers)
        return Region(prompt.strip(), (left, top, right, bottom))
    try:
        return Region(prompt.strip(), mask=load_mask(place.strip()))
    except DatasetError as error:
        raise UsageError(f'--region "{text}" has neither four numbers nor a mask: {error}') from None


def starting_picture(path: Path | None, source: Path | None, recipe: Any) -> Any:
    if path is None:
        if recipe is not None and recipe.image:
            raise UsageError("This picture was drawn from another one; name it with --image.")
        return None
    from PIL import Image

    try:
        with Image.open(path) as picture:
            image = picture.convert("RGB")
    except OSError as error:
        raise FormatError(f"'{path}' cannot be read as a picture: {error}.") from error
    if recipe is not None and recipe.image not in (None, hashlib.sha256(image.tobytes()).hexdigest()):
        logger.warning("'%s' is not the picture that '%s' was drawn from; the result will differ.", path, source)
    return image


def write(picture: Any, files: list[Path], output: Path, *, several: bool) -> Path:
    """Save a picture with its recipe, adapters' files included; nothing is overwritten in a folder."""
    used = zip(picture.recipe.adapters, files, strict=True)
    drawn = replace(picture.recipe, adapters=tuple(replace(adapter, file=str(file)) for adapter, file in used))
    path = replace(picture, recipe=drawn).save(place(output, drawn, several=several))
    how = f"{drawn.width}x{drawn.height}, seed {drawn.seed + drawn.index}, {drawn.steps} steps on {drawn.base}"
    print(f"wrote {path}: {how}")
    return path


def place(output: Path, recipe: Any, *, several: bool) -> Path:
    seed = recipe.seed + recipe.index
    if output.suffix.lower() == ".png":
        return output.with_stem(f"{output.stem}-{seed}") if several else output
    words = re.sub(r"[^a-z0-9]+", "-", recipe.prompt.lower()).strip("-")[:60].rstrip("-") or "picture"
    candidates = (output / f"{words}-{seed}{f'-{n}' if n > 1 else ''}.png" for n in count(1))
    return next(path for path in candidates if not path.exists())
