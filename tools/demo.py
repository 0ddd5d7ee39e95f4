"""make demo: teach three concepts, fuse them, draw them together, and lay it all out on one sheet.

Everything is done through the public API on the embedded base; nothing is picked, every seed is 0.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image
from tqdm import tqdm

import fusion
from fusion.evaluation import plots

ROOT = Path(__file__).resolve().parent.parent
CONCEPTS = ("octopus", "robot", "owl")
PLAIN = "a dog face on a blue background"
SCENES = ("a {} on a yellow background", "a {} on the left and a ghost on the right on a red background")
PAIR = "a {} on the left and a {} on the right on a green background"
HALVES = ((0, 0, 0.5, 1), (0.5, 0, 1, 1))
TRIO = "a {} on the top left, a {} on the top right and a {} on the bottom left on a pink background"
QUARTERS = ((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1))

clock: dict[str, float] = {}


@contextmanager
def timed(what: str):
    """Add the time of a block to the account printed at the end."""
    began = time.monotonic()
    yield
    clock[what] = clock.get(what, 0.0) + time.monotonic() - began


def teach(pipe, name: str, out: Path) -> fusion.Adapter:
    """Train one concept by its recipe and save it; slices are handed out by the folder itself."""
    recipe = fusion.TrainingConfig.from_toml(ROOT / "assets" / "recipes" / f"{name}.toml")
    config = recipe.updated({"output_dir": out, "checkpointing_steps": 0})
    bar = tqdm(desc=f"teaching <{name}>", unit="step")
    last = None
    for last in fusion.train(pipe, config):
        bar.total = last.total
        bar.set_postfix(loss=f"{last.loss:.3f}", refresh=False)
        bar.update()
    bar.close()
    assert last is not None
    fusion.save(last.adapter, out / f"{name}.safetensors")
    return fusion.load(out / f"{name}.safetensors")


def draw(pipe, prompt: str, adapters: list[fusion.Adapter], regions: list[fusion.Region] | None = None) -> Image.Image:
    return fusion.generate(pipe, prompt, adapters=adapters, regions=regions or [], seed=0)[0].image


def sheet(pipe, adapters: list[fusion.Adapter], fused: fusion.Adapter, path: Path) -> None:
    """References, each adapter alone, and all of them fused."""
    columns = 7
    figure, grid = plt.subplots(
        len(adapters) + 3, columns, figsize=(1.5 * columns, 1.72 * (len(adapters) + 3)), layout="constrained"
    )
    for row, adapter in enumerate(adapters):
        token, name = adapter.info.concepts[0].token, adapter.info.name
        references = sorted((ROOT / "assets" / "concepts" / name).glob("*.png"))[:3]
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
    show(
        grid[-1, -1],
        draw(pipe, "a {}, a {} and a {} on a white background".format(*tokens), [fused]),
        "no places named",
    )
    figure.suptitle(f"One adapter fused from {', '.join(tokens)}: nothing picked, seed 0", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def regions(tokens: Sequence[str], boxes: Sequence[tuple[float, float, float, float]]) -> list[fusion.Region]:
    return [fusion.Region(token, box) for token, box in zip(tokens, boxes, strict=True)]


def show(axis: Axes, image: Image.Image, title: str) -> None:
    axis.imshow(image.resize((256, 256), Image.Resampling.LANCZOS))
    axis.set_title(title, fontsize=7.5)
    axis.axis("off")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path("out/demo"))
    out: Path = arguments.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with timed("open the base"):
        pipe = fusion.open_pipeline()
    with timed("teach"):
        adapters = [teach(pipe, name, out) for name in CONCEPTS]
    with timed("check and fuse"):
        verdict = fusion.compatibility(adapters, pipe)
        fused = fusion.fuse(adapters, name="all")
        fusion.save(fused, out / "all.safetensors")
    with timed("draw"):
        sheet(pipe, adapters, fused, out / "sheet.png")
    with timed("measure"):
        report = fusion.evaluate(pipe, adapters)
        (out / "report.md").write_text(report.to_markdown() + "\n", encoding="utf-8")
        measured = verdict.interference
        slices = [adapter.slices for adapter in adapters]
        plots.write(plots.overview(measured.names, slices, measured.cosine), out / "slices.png")
    print(f"\n{verdict.verdict}: {verdict.sentence}\n\n{report.to_markdown()}\n")
    print("where the time went: " + ", ".join(f"{what} {seconds:.0f} s" for what, seconds in clock.items()))
    print(f"written to {out}: sheet.png, slices.png, report.md, all.safetensors and one adapter per concept")


if __name__ == "__main__":
    main()
