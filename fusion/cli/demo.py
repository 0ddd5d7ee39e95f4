"""Teach three concepts to the embedded base, fuse them, draw them together, and put all pictures on one sheet.

No picture is selected: every seed is 0. On two CPU cores it takes some ten minutes.
"""

import time
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.cli.console import add_overwrite, open_base
from fusion.cli.progress_bar import progress, with_progress
from fusion.generation.config import GenerationConfig, Region
from fusion.models.embedded_models import embedded
from fusion.output_files import MARK, check_output, write_output
from fusion.training.config import TrainingConfig

if TYPE_CHECKING:  # help must be immediate
    from PIL import Image

    from fusion.adapters.adapter import Adapter

CONCEPTS = ("octopus", "robot", "owl")
PLAIN = "a dog face on a blue background"
SCENES = ("a {} on a yellow background", "a {} on the left and a ghost on the right on a red background")
PAIR = "a {} on the left and a {} on the right on a green background"
HALVES = ((0, 0, 0.5, 1), (0.5, 0, 1, 1))
TRIO = "a {} on the top left, a {} on the top right and a {} on the bottom left on a pink background"
QUARTERS = ((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1))
UNPLACED = "a {}, a {} and a {} on a white background"


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion demo [options]"
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: out/demo")
    parser.add_argument("--device", metavar="NAME", help="cpu, gpu, cuda:1, mps, ... (default: the best there is)")
    add_overwrite(parser)


def run(args: Namespace) -> None:
    from fusion.composition.compatibility_report import compatibility
    from fusion.composition.fusing import fuse
    from fusion.evaluation import plots
    from fusion.evaluation.report import evaluate
    from fusion.formats.adapter_file import check_adapter_output, save
    from fusion.generation.adapter_pictures import save_adapter_picture

    out: Path = args.out
    for name in ("sheet.png", "slices.png", "report.md"):
        check_output(out / name, overwrite=args.overwrite)
    tokens = {name: [f"<{name}>"] for name in CONCEPTS} | {"all": [f"<{name}>" for name in CONCEPTS]}
    for name, names in tokens.items():
        check_adapter_output(out / f"{name}.safetensors", names, overwrite=args.overwrite)
    clock: dict[str, float] = {}
    with timed(clock, "open the base"):
        pipe = open_base(None, args, None)
    with timed(clock, "teach"):
        adapters = [teach(pipe, name, out) for name in CONCEPTS]
    with timed(clock, "check and fuse"):
        verdict = compatibility(adapters, pipe)
        fused = fuse(adapters, name="all")
        save(fused, out / "all.safetensors", overwrite=True)
    with timed(clock, "draw"):
        trio = draw(pipe, TRIO.format(*tokens["all"]), [fused], regions(tokens["all"], QUARTERS))
        save_adapter_picture(out / "all.safetensors", trio)
        sheet(pipe, adapters, fused, out / "sheet.png")
    with timed(clock, "measure"):
        report = evaluate(pipe, adapters)
        write_output(out / "report.md", f"{report.to_markdown()}\n\n<!-- {MARK} -->\n".encode())
        measured = verdict.interference
        slices = [adapter.slices for adapter in adapters]
        plots.write(plots.overview(measured.names, slices, measured.cosine), out / "slices.png", overwrite=True)
    print(f"\n{verdict.verdict}: {verdict.sentence}\n\n{report.to_markdown()}\n")
    print("where the time went: " + ", ".join(f"{what} {seconds:.0f} s" for what, seconds in clock.items()))
    print(f"written to {out}: sheet.png, slices.png, report.md, all.safetensors and an adapter each, with its picture")


@contextmanager
def timed(clock: dict[str, float], what: str) -> Generator[None]:
    """Add the seconds of a block to the account that is printed at the end."""
    start = time.monotonic()
    yield
    clock[what] = clock.get(what, 0.0) + time.monotonic() - start


def teach(pipe: Any, name: str, out: Path) -> "Adapter":
    """Train one concept by its recipe and save it; the folder is the library that assigns the slices."""
    from fusion.formats.adapter_file import load, save
    from fusion.generation.adapter_pictures import save_adapter_picture
    from fusion.training.loop import train

    recipe = TrainingConfig.from_toml(embedded("recipes", f"{name}.toml") / f"{name}.toml")
    picture = {
        "validation_prompt": "a {token} on a blue background",
        "num_validation_images": 1,
        "validation_steps": 999,
    }
    config = recipe.updated({"output_dir": out, "checkpointing_steps": 0, **picture})
    print(f"teaching <{name}>", flush=True)
    with progress() as advance:
        last = deque(with_progress(train(pipe, config), advance), maxlen=1)[0]
    path = out / f"{name}.safetensors"
    save(last.adapter, path, overwrite=True)
    save_adapter_picture(path, last.images[0])
    return load(path)


def draw(pipe: Any, prompt: str, adapters: list["Adapter"], regions: Sequence[Region] = ()) -> "Image.Image":
    from fusion.generation.drawing import generate

    return generate(pipe, GenerationConfig(prompt=prompt, seed=0, regions=tuple(regions)), adapters)[0].image


def sheet(pipe: Any, adapters: list["Adapter"], fused: "Adapter", path: Path) -> None:
    """References, each adapter alone, and all of them fused."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    from fusion.evaluation import plots

    rows, columns = len(adapters) + 3, 7
    figure, grid = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.72 * rows), layout="constrained")
    for row, adapter in enumerate(adapters):
        token, name = adapter.info.concepts[0].token, adapter.info.name
        references = sorted(embedded("concepts", f"{name}/concept.toml").glob(f"{name}/*.png"))[:3]
        for axis, reference in zip(grid[row], references, strict=False):
            show(axis, Image.open(reference), f"{name}, reference")
        for axis, scene in zip(grid[row, 3:], SCENES, strict=False):
            show(axis, draw(pipe, scene.format(token), [adapter]), f"{token} alone")
        for axis, scene in zip(grid[row, 5:], SCENES, strict=False):
            show(axis, draw(pipe, scene.format(token), [fused]), f"{token}, fused")
    tokens = [adapter.info.concepts[0].token for adapter in adapters]
    for column, pair in enumerate(permutations(tokens, 2)):
        prompt = PAIR.format(*pair)
        show(grid[-3, column], draw(pipe, prompt, [fused]), " ".join(pair))
        show(grid[-2, column], draw(pipe, prompt, [fused], regions(pair, HALVES)), "the same, in regions")
    for turn in range(len(tokens)):
        trio = tokens[turn:] + tokens[:turn]
        prompt = TRIO.format(*trio)
        show(grid[-1, 2 * turn], draw(pipe, prompt, [fused]), " ".join(trio))
        show(grid[-1, 2 * turn + 1], draw(pipe, prompt, [fused], regions(trio, QUARTERS)), "the same, in regions")
    show(grid[-3, -1], draw(pipe, PLAIN, []), "no concept, base")
    show(grid[-2, -1], draw(pipe, PLAIN, [fused]), "no concept, fused")
    show(grid[-1, -1], draw(pipe, UNPLACED.format(*tokens), [fused]), "no places named")
    figure.suptitle(f"One adapter fused from {', '.join(tokens)}: nothing picked, seed 0", fontsize=11)
    plots.write(figure, path, dpi=110, overwrite=True)
    plt.close(figure)


def regions(tokens: Sequence[str], boxes: Sequence[tuple[float, float, float, float]]) -> list[Region]:
    return [Region(token, box) for token, box in zip(tokens, boxes, strict=True)]


def show(axis: Any, image: "Image.Image", title: str) -> None:
    from PIL import Image

    axis.imshow(image.resize((256, 256), Image.Resampling.LANCZOS))
    axis.set_title(title, fontsize=7.5)
    axis.axis("off")
