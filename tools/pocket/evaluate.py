"""Stage `evaluate`: every bar, on prompts and seeds fixed beforehand; results.json keeps the numbers.

Parts run one by one (`--only`), each writes its own entry, so a part can be repeated alone.
"""

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from tools.pocket import artwork, identity, prompts, subjects, teach
from tools.pocket.autoencoder import SEEN_STYLES, as_tensor, psnr, reconstruct
from tools.pocket.captions import caption, plain_caption
from tools.pocket.latents import MIX
from tools.pocket.scenes import Painter, Palette, Scene, compose
from tools.pocket.verdict import Clip, Plain, background, frechet, judge

STEPS, GUIDANCE, RESCALE = 25, 3.0, 0.5
SEED = 1000


class Bench:
    """What all parts share: the artwork, the palettes, and drawing."""

    def __init__(self, work: Path, every: int = 1):
        self.work, self.every = work, every
        sprites, self.index = artwork.load(work)
        self.painter = Painter(sprites)
        self.palette = Palette(self.index, subjects.TRAINED, SEEN_STYLES, emphasis={})

    def pipeline(self) -> StableDiffusionPipeline:
        pipe = StableDiffusionPipeline.from_pretrained(self.work / "denoiser" / "pipeline")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: StableDiffusionPipeline, words: Sequence[str], seed: int = SEED) -> list[Image.Image]:
        """Each picture from a seed of its own, so that it does not depend on its batch."""
        images: list[Image.Image] = []
        for k in range(0, len(words), 16):
            batch = list(words[k : k + 16])
            generators = [torch.Generator().manual_seed(seed + k + n) for n in range(len(batch))]
            images += pipe(
                batch,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                guidance_rescale=RESCALE,
                generator=generators,
            ).images
        return images


def run(work: Path, *, only: list[str], every: int, pictures: int) -> None:
    folder = work / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    bench = Bench(work, every)
    for name in only or PARTS:
        results[name] = PARTS[name](bench) if name != "distance" else distance(bench, pictures)
        print(name, json.dumps(results[name], indent=1), flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


def autoencoder(bench: Bench) -> dict[str, float]:
    """PSNR in dB of unseen scenes: trained subjects, held-out ones, the untouched ones, and the held-out style."""
    model = AutoencoderKL.from_pretrained(bench.work / "autoencoder" / "final").eval()
    held = [subjects.HELD_OUT_STYLE]
    groups = {
        "trained": bench.palette,
        "held_out": Palette(bench.index, subjects.HELD_OUT, SEEN_STYLES, emphasis={}),
        "untouched": Palette(bench.index, subjects.UNTOUCHED, SEEN_STYLES, emphasis={}),
        "outline": Palette(bench.index, subjects.TRAINED, held, emphasis={}),
    }
    numbers = {}
    for name, palette in groups.items():
        rng = random.Random("evaluation-autoencoder")
        kinds = rng.choices(list(MIX), list(MIX.values()), k=160)
        x = as_tensor([bench.painter.array(compose(rng, palette, kind)) for kind in kinds])
        numbers[name] = round(psnr(reconstruct(model, x), x), 2)
    return numbers


def judges(bench: Bench) -> dict[str, object]:
    """The witnesses on real pictures, before they judge anything: one unseen scene of every drawing."""
    rng = random.Random("evaluation-judges")
    rows = [k for style in SEEN_STYLES for k in bench.palette.by_style[style]]
    scenes = [compose(rng, bench.palette, "alone", sprites=[k]) for k in rows]
    images = [bench.painter.draw(scene) for scene in scenes]
    clip, plain = Clip(bench.work, bench.index), Plain(bench.work)
    found = {name: judge(w, scenes, images, bench.index).row() for name, w in (("clip", clip), ("classifier", plain))}
    return {**found, "identity": identity.retrieval(bench.index, bench.painter, clip.images)}


def pocket(bench: Bench) -> dict[str, object]:
    """What pocket draws, and beside it the same witnesses on the real pictures of the same scenes."""
    pipe = bench.pipeline()
    witnesses: dict[str, Clip | Plain] = {"classifier": Plain(bench.work)}
    if (bench.work / "judge" / "final").is_dir():  # not yet trained: a first look by one witness
        witnesses["clip"] = Clip(bench.work, bench.index)
    found: dict[str, object] = {}
    for kind, scenes in {"alone": prompts.alone(bench.palette), **prompts.several(bench.palette)}.items():
        scenes = scenes[:: bench.every]
        words = [plain_caption(scene, bench.index) for scene in scenes]
        drawn = bench.draw(pipe, words)
        save_sheet(bench.work / "evaluation" / f"{kind}.png", drawn)
        real = [bench.painter.draw(scene) for scene in scenes]
        row: dict[str, object] = {"pictures": len(scenes)}
        row["background"] = round(np.mean([background(i) == s.colour for i, s in zip(drawn, scenes, strict=True)]), 4)
        for name, witness in witnesses.items():
            row[name] = judge(witness, scenes, drawn, bench.index).row()
            row[f"{name}_on_real"] = judge(witness, scenes, real, bench.index).row()
        if kind == "alone":  # which ones it misses, for those who go on training
            first = len(subjects.FIRST[:: bench.every])
            row["first"] = judge(witnesses["classifier"], scenes[:first], drawn[:first], bench.index).row()
            row["second"] = judge(witnesses["classifier"], scenes[first:], drawn[first:], bench.index).row()
        found[kind] = row
        print(kind, row, flush=True)
    return found


def speed(bench: Bench) -> dict[str, float]:
    begun = time.perf_counter()
    pipe = bench.pipeline()
    loading = time.perf_counter() - begun
    pipe("a fox", num_inference_steps=2)
    begun = time.perf_counter()
    pipe("a fox", num_inference_steps=STEPS, guidance_scale=GUIDANCE, guidance_rescale=RESCALE)
    drawing = time.perf_counter() - begun
    folders = [bench.work / "denoiser" / "pipeline", bench.work / "judge" / "final"]
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    return {"load_seconds": round(loading, 2), "picture_seconds": round(drawing, 2), "megabytes": round(size / 1e6, 1)}


def distance(bench: Bench, count: int) -> dict[str, float]:
    """Fréchet distance in the judge's features, of `count` drawn pictures and of as many real ones, to real ones."""
    clip = Clip(bench.work, bench.index)
    real = unseen(bench, count, "distance-real")
    again = [bench.painter.array(scene) for scene in unseen(bench, count, "distance-again")]
    rng = random.Random("distance-captions")
    words = [caption(scene, bench.index, rng) for scene in unseen(bench, count, "distance-asked")]
    drawn = [np.asarray(image) for image in bench.draw(bench.pipeline(), words)]
    goal = clip.images([bench.painter.array(scene) for scene in real])
    near, far = frechet(clip.images(again), goal), frechet(clip.images(drawn), goal)
    return {"pictures": count, "drawn": round(far, 4), "real": round(near, 4)}


def unseen(bench: Bench, count: int, seed: str) -> list[Scene]:
    rng = random.Random(seed)
    return [compose(rng, bench.palette, kind) for kind in rng.choices(list(MIX), list(MIX.values()), k=count)]


def teachable(bench: Bench) -> dict[str, object]:
    clip = Clip(bench.work, bench.index)
    return teach.measure(bench.pipeline, bench.index, bench.painter, clip, bench.draw, sheets=bench.work / "evaluation")


def save_sheet(path: Path, images: Sequence[Image.Image], columns: int = 16) -> None:
    sheet = Image.new("RGB", (columns * 130, -(-len(images) // columns) * 130))
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * 130, k // columns * 130))
    sheet.save(path)


PARTS = {
    "autoencoder": autoencoder,
    "judges": judges,
    "pocket": pocket,
    "speed": speed,
    "teachable": teachable,
    "distance": distance,
}
