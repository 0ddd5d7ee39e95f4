"""Draw pictures of a prompt. Every PNG carries its whole recipe, and --from draws it again.

Settings that are not given come from the recipe of --from, then from the base's own fusion.toml, then from the defaults
below.
"""

import hashlib
import logging
import os
import re
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.cli.console import (
    UsageError,
    add_base_arguments,
    add_overwrite,
    add_settings,
    add_strengths,
    base_flags,
    example,
    flags_of,
    open_base,
)
from fusion.cli.progress_bar import progress
from fusion.config import MAX_SEED, TOKEN
from fusion.errors import ConfigError, FormatError, closest
from fusion.generation.config import GenerationConfig, Region
from fusion.output_files import check_output, create_folder, expanded, folder_lock, output_group
from fusion.prompt_syntax import split_loras

if TYPE_CHECKING:  # help must be immediate
    from fusion.adapters.adapter import Adapter
    from fusion.generation.recipe import Picture, Recipe, UsedAdapter

logger = logging.getLogger(__name__)
WEIGHTING = "a1111"  # what people paste is written for
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf)", re.IGNORECASE)


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = 'fusion generate [ADAPTER ...] --prompt "..." [options]'
    parser.epilog = 'example: fusion generate pets.safetensors --prompt "a <dog> beside a <cat>" --num_images 4 -o out'
    add = parser.add_argument
    add("adapters", nargs="*", type=Path, metavar="ADAPTER", help="adapter files; none draws what the base knows")
    add("--from", dest="source", type=Path, metavar="PNG", help="repeat the recipe in this picture; flags override it")
    add("-o", "--output", type=Path, default=Path("out"), metavar="PATH", help="folder, or .png file (default: out)")
    add("--image", type=Path, metavar="FILE", help="start from this picture instead of noise")
    text = "draw the picture of --image anew where this one is white; --image_strength 1 forgets what was there"
    add("--mask", "--mask_image", dest="mask", type=Path, metavar="FILE", help=text)
    add_bind(parser)
    add_strengths(parser)
    where = '"<dog>: 0 0 0.5 1" (left top right bottom, shares of the picture) or "a <dog>: mask.png"; repeatable'
    where += "; or auto: each concept where the base would draw it"
    names = ("--region", "--regions")
    add(*names, dest="regions", action="append", metavar="PROMPT: REGION", help=f"what a part of it shows: {where}")
    text = "write the regions of each picture there, also those that were found: masks for --region, and all in colour"
    add("--save_regions", type=Path, metavar="FOLDER", help=text)
    text = "where <lora:NAME:0.8> in a prompt is looked up before the library out, also in its folders"
    add("--lora_dir", type=Path, metavar="DIR", help=text)
    add_settings(parser, GenerationConfig, leave=("regions",), defaults={"prompt_weighting": WEIGHTING})
    add_overwrite(parser)
    add_base_arguments(parser, draws=True)
    text = "compile the UNet with torch.compile: worth it for many pictures, as the first takes longer"
    parser.add_argument("--compile", action="store_true", help=text)


def run(args: Namespace) -> None:
    from fusion.formats.adapter_file import load
    from fusion.generation.drawing import generate
    from fusion.generation.recipe import recipe_of
    from fusion.models.binding import bind
    from fusion.models.compilation import compile_unet

    recipe = recipe_of(args.source) if args.source else None
    config, loras = with_loras(configure(args, recipe), args.lora_dir)
    again = bool(recipe) and not another_batch(args, recipe)
    outputs = list(zip(config.picture_prompts(), config.seeds(), strict=True))
    check_outputs(args, config, [outputs[recipe.index]] if recipe and again else outputs)
    adapters, files, strengths = choose_adapters(args, recipe)
    words = [used.word for used in recipe.adapters] if recipe and not (args.adapters or args.bind) else []
    words = words or [*(None for _ in args.adapters), *(word for word, _ in bindings(args.bind))]
    image = picture_to_start_from(args.image, args.source, recipe, "image")
    mask = picture_to_start_from(args.mask, args.source, recipe, "mask")
    if recipe and recipe.base != "pocket" and not args.base:
        raise UsageError(f"This picture was drawn on '{recipe.base}'; say where that is with --base.")
    pipe = open_base(args.base, args, args.dtype)
    pairs = zip(adapters, words, strict=True)
    adapters = [bind(pipe, adapter, word) if word else adapter for adapter, word in pairs]
    if recipe and not (args.adapters or args.bind):
        for used, adapter in zip(recipe.adapters, adapters, strict=True):
            check_digest(used, adapter)
    strengths = [*(strengths or [1.0] * len(adapters)), *loras.values()]
    adapters += [load(path) for path in loras]
    files += map(str, loras)
    if args.compile:
        compile_unet(pipe)
    parts = [] if config.regions == "auto" else [part.prompt for part in config.regions]
    check_words(" ".join([*config.prompts, *parts]), adapters)
    with progress() as advance:
        advance(0, config.num_inference_steps, note="preparing the first step")
        pictures = generate(
            pipe, config, adapters, strengths=strengths, image=image, mask=mask, on_step=partial(show_step, advance)
        )
    if recipe and again:
        pictures = pictures[recipe.index : recipe.index + 1]  # its neighbours were drawn too: batches change last bits
    paths = write(pictures, files, args)
    if args.save_regions:
        write_regions(pictures, args.save_regions)
    on, another = base_flags(args.base, args), (config.seeds()[-1] + 1) % (MAX_SEED + 1)
    print(f"next: {example('generate', '--from', paths[0], *on, '--seed', another)}  # another seed")


def show_step(advance: Callable[..., None], step: int, total: int, _preview: object) -> None:
    """A step on the bar; after the last, pictures are decoded, which takes a while where they are large."""
    advance(step, total, note="decoding" if step == total else "")


def add_bind(parser: ArgumentParser) -> None:
    """Adapters of any program for words: `bindings` reads them."""
    text = 'use a LoRA or adapter of any program at a word: "<alice>=my_lora.safetensors", or at words of the prompt, '
    text += '"the knight=knight.safetensors"; repeatable'
    parser.add_argument("--bind", action="append", default=[], metavar="WORD=FILE", help=text)


def configure(args: Namespace, recipe: "Recipe | None") -> GenerationConfig:
    """Flags over the recipe. Raises UsageError: a wrong setting is a wrong command."""
    flags = flags_of(args, GenerationConfig)
    if regions := flags.pop("regions", None):
        flags["regions"] = "auto" if regions == ["auto"] else tuple(region(text) for text in regions)
    values: dict[str, Any] = recipe.config.settings() if recipe else {"prompt_weighting": WEIGHTING}
    if recipe and len(recipe.config.prompts) > 1 and another_batch(args, recipe):
        values |= {"prompt": recipe.picture_prompt, "seed": recipe.picture_seed, "num_images": 1}
    values |= flags
    if len(flags.get("prompt", ())) == 1:
        (values["prompt"],) = flags["prompt"]
    if "prompt" not in values:
        raise UsageError("Say what to draw with --prompt, or repeat a picture with --from.")
    try:
        return GenerationConfig.model_validate(values)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def another_batch(args: Namespace, recipe: "Recipe | None") -> bool:
    """Whether flags ask for other pictures than the one of the recipe, with the same settings."""
    names = {"seed", "num_images"}
    if recipe and len(recipe.config.prompts) > 1:
        names |= {"prompt", "regions"}
    return any(name in vars(args) and vars(args)[name] is not None for name in names)


def with_loras(config: GenerationConfig, folder: Path | None) -> tuple[GenerationConfig, dict[Path, float]]:
    """Settings without the <lora:NAME:0.8> of their prompts, and the files of these with their strengths.

    Raises UsageError for a file that is not there, or two strengths of one.
    """
    if config.prompt_weighting != "a1111":
        return config, {}
    split = [split_loras(prompt) for prompt in config.prompts]
    files: dict[Path, float] = {}
    for name, strength in (lora for _, loras in split for lora in loras):
        path = lora_file(name, [*([folder] if folder else []), Path("out")])
        if files.setdefault(path, strength) != strength:
            raise UsageError(
                f"<lora:{name}> is given two strengths, {files[path]:g} and {strength:g}; draw them apart."
            )
    if files:
        texts = [text for text, _ in split]
        config = config.updated({"prompt": texts[0] if isinstance(config.prompt, str) else texts})
    return config, files


def lora_file(name: str, folders: list[Path]) -> Path:
    """`name`.safetensors in the first folder that has it, or in a folder below; raises UsageError."""
    stems: list[str] = []
    for folder in folders:
        for path in sorted(folder.rglob("*.safetensors")) if folder.is_dir() else ():
            if name in (path.stem, path.relative_to(folder).with_suffix("").as_posix()):
                return path
            stems.append(path.stem)
    if "did you mean" in (near := closest(name, stems)):
        raise UsageError(f"<lora:{name}>: there is no {name}.safetensors{near}")
    where = " and ".join(f"'{folder}'" for folder in folders)
    raise UsageError(f"<lora:{name}>: there is no {name}.safetensors in {where}; name its folder with --lora_dir.")


def choose_adapters(args: Namespace, recipe: "Recipe | None") -> tuple[list["Adapter"], list[str], list[float] | None]:
    """The adapters given, else the recipe's own, unchanged since; and their files or ids."""
    from fusion.formats.adapter_file import load
    from fusion.formats.hub_file import pinned

    before = [used.strength for used in recipe.adapters] if recipe else []
    if (files := [*args.adapters, *(path for _, path in bindings(args.bind))]) or recipe is None:
        same = before if len(before) == len(files) else None
        return [load(path) for path in files], [pinned(path) for path in files], args.strength or same
    pairs = [load_again(used, args.source) for used in recipe.adapters]
    return [adapter for adapter, _ in pairs], [path for _, path in pairs], args.strength or before


def load_again(used: "UsedAdapter", picture: Path) -> tuple["Adapter", str]:
    """An adapter of a recipe and its file, where it was or beside the picture; or its id on the Hub."""
    from fusion.formats.adapter_file import load
    from fusion.formats.hub_file import hub_id

    file = Path(used.file or "")
    if "@" in str(file) and hub_id(file):  # `pinned` names the commit
        return load(file), str(file)
    candidates = (file, picture.parent / file.name)
    # Path.is_file raises where a name is too long to be one.
    path = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)  # noqa: PTH113
    if path is None:
        gone = f"'{(used.file or used.name)[:200]}' is gone, and '{picture}' needs it"
        raise FormatError(f"{gone}; name the adapter's file before --from.")
    return load(path), str(path)


def check_digest(used: "UsedAdapter", adapter: "Adapter") -> None:
    """Raise FormatError for another adapter than the one of a recipe."""
    if (digest := adapter.digest()) != used.digest:
        raise FormatError(
            f"'{used.file or used.name}' is not the adapter this picture was drawn with: its contents are "
            f"{digest[:12]}, the recipe says {used.digest[:12]}. To draw with it all the same, name it before --from."
        )


def bindings(texts: list[str]) -> list[tuple[str, Path]]:
    """`WORD=FILE` of each text. Raises UsageError."""
    pairs = [text.partition("=") for text in texts]
    for text, (word, _, file) in zip(texts, pairs, strict=True):
        if not (word.strip() and file.strip()):
            raise UsageError(f'--bind takes "<alice>=FILE" or "words of the prompt=FILE", got "{text}".')
    return [(word.strip(), Path(file.strip())) for word, _, file in pairs]


def check_words(prompt: str, adapters: list["Adapter"]) -> None:
    """Warn of tokens that no adapter knows, and of concepts that are not named, so that their gates stay shut."""
    from fusion.models.binding import bound_words, with_bound_words

    prompt = with_bound_words(prompt, adapters)
    bound = {token for adapter in adapters for token in bound_words(adapter)}  # `generate` warns of these
    known = [concept.token for adapter in adapters for concept in adapter.info.concepts]
    named = [token.lower() for token in re.findall(TOKEN.pattern, prompt, re.IGNORECASE)]
    for token in dict.fromkeys(named):
        if token not in known:
            logger.warning("No adapter given knows %s%s", token, closest(token, known) or ".")
    gated = [concept.token for adapter in adapters if adapter.gated for concept in adapter.info.concepts]
    gated = [token for token in gated if token not in bound]
    if gated and not set(named) & set(known):
        logger.warning("The prompt has none of the tokens %s, so no concept will be in the picture.", ", ".join(known))
    elif unnamed := [token for token in gated if token not in named]:
        logger.warning("The prompt does not name %s, so nothing of that will be in the picture.", ", ".join(unnamed))


def region(text: str) -> Region:
    """`PROMPT: 0 0 0.5 1` or `PROMPT: mask.png`."""
    from fusion.errors import DatasetError
    from fusion.formats.picture_file import load_mask

    drive = re.fullmatch(r"(.*?)(:)(\s*[A-Za-z]:[\\/].*)", text)  # C:\mask.png has a colon of its own
    prompt, colon, where = drive.groups() if drive else text.rpartition(":")
    if not (colon and prompt.strip() and where.strip()):
        raise UsageError(f'--region takes "PROMPT: LEFT TOP RIGHT BOTTOM" or "PROMPT: MASK.png", got "{text}".')
    numbers = re.split(r"[,\s]+", where.strip())
    if len(numbers) == 4 and all(map(_NUMBER.fullmatch, numbers)):
        left, top, right, bottom = map(float, numbers)
        return Region(prompt.strip(), (left, top, right, bottom))
    try:
        return Region(prompt.strip(), mask=load_mask(where.strip()))
    except DatasetError as error:
        raise UsageError(f'--region "{text}" has neither four numbers nor a mask: {error}') from None


def picture_to_start_from(path: Path | None, source: Path | None, recipe: "Recipe | None", kind: str) -> Any:
    """The "image" at `path`, or the "mask". Raises UsageError where `recipe`, of the picture `source`, needs one."""
    digest = None if recipe is None else recipe.image if kind == "image" else recipe.mask
    if path is None:
        if digest:
            what = "from another one" if kind == "image" else "in a mask"
            raise UsageError(f"This picture was drawn {what}; name it with --{kind}.")
        return None
    from fusion.formats.picture_file import load_mask, load_picture

    picture = load_picture(path) if kind == "image" else load_mask(path)
    if digest not in (None, hashlib.sha256(picture.tobytes()).hexdigest()):
        logger.warning("'%s' is not the %s that '%s' was drawn with; the result will differ.", path, kind, source)
    return picture


def check_outputs(args: Namespace, config: GenerationConfig, pictures: list[tuple[str, int]]) -> None:
    """Refuse now where pictures could not be written after they are drawn."""
    if args.output.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise UsageError(f"Pictures are PNGs, which carry their recipe; '{args.output}' should end in .png.")
    size = 3 * len(pictures) * (config.width or 0) * (config.height or 0)
    for _, seed in pictures if args.save_regions else ():
        check_output(args.save_regions / f"{seed}-regions.png", overwrite=args.overwrite)
    for prompt, seed in pictures:
        path = path_for(args.output, prompt, seed, several=len(pictures) > 1)
        check_output(path, size=size, overwrite=args.overwrite)


def write(pictures: list["Picture"], files: list[str], args: Namespace) -> list[Path]:
    """Save pictures with their recipes, adapters' files included, all or none; in a folder nothing is overwritten."""
    several, recipes = len(pictures) > 1, [picture.recipe for picture in pictures]
    folder = args.output.parent if args.output.suffix.lower() == ".png" else args.output
    create_folder(expanded(folder))
    with folder_lock(expanded(folder)):  # or another program could choose the same names
        paths = [path_for(args.output, r.picture_prompt, r.picture_seed, several=several) for r in recipes]
        paths = [check_output(path, overwrite=args.overwrite) for path in paths]
        with output_group(paths[-1]) as group:
            for path, picture in zip(paths, pictures, strict=True):
                pairs = zip(picture.recipe.adapters, files, strict=True)
                used = [adapter.updated({"file": file}) for adapter, file in pairs]
                replace(picture, recipe=picture.recipe.updated({"adapters": used})).save(group / path.name)
    for path, recipe in zip(paths, recipes, strict=True):
        size, steps = f"{recipe.config.width}x{recipe.config.height}", recipe.config.num_inference_steps
        print(f"wrote {path}: {size}, seed {recipe.picture_seed}, {steps} steps on {recipe.base}")
    return paths


def write_regions(pictures: list["Picture"], folder: Path) -> None:
    """A mask for each region of each picture, all regions in colour, and the flags that give them back."""
    from fusion.formats.png_file import write_png
    from fusion.generation.region_pictures import region_mask, with_regions

    for picture in pictures:
        regions, seed, flags = picture.recipe.config.regions, picture.recipe.picture_seed, list[str]()
        if regions == "auto" or not regions:
            logger.warning("The picture of seed %d has no regions, so --save_regions writes none.", seed)
            continue
        for number, part in enumerate(regions, start=1):
            path = write_png(folder / f"{seed}-region-{number}.png", region_mask(part, picture.image.size))
            flags += ["--region", f"{part.prompt}: {path}"]
        path = write_png(folder / f"{seed}-regions.png", with_regions(picture.image, regions))
        print(f"wrote {path}: {len(regions)} regions; to give them back: {shlex.join(flags)}")


def path_for(output: Path, prompt: str, seed: int, *, several: bool) -> Path:
    if output.suffix.lower() == ".png":
        return output.with_stem(f"{output.stem}-{seed}") if several else output
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "picture"
    candidates = (expanded(output) / f"{words}-{seed}{f'-{n}' if n > 1 else ''}.png" for n in count(1))
    return next(path for path in candidates if not os.path.lexists(path))
