"""Stage `latents`: scenes of the trained subjects, encoded once; the denoiser then never sees a pixel.

Writes shards of 1,000: latents (1000, 4, 16, 16) in float16 and token numbers (1000, 64). A shard depends on its
number alone, so more can be made later.
"""

import random
from pathlib import Path

import torch
from torch import Tensor

from tools.pocket import artwork, subjects
from tools.pocket.autoencoder import SEEN_STYLES, as_tensor, encode
from tools.pocket.autoencoder import load as load_autoencoder
from tools.pocket.captions import caption
from tools.pocket.scenes import Painter, Palette, compose
from tools.pocket.tokenizer import load as load_tokenizer

SHARD = 1000
MIX = {"alone": 38, "placed": 4, "beside": 22, "stacked": 9, "twins": 4, "row": 6, "three": 7, "four": 10}
# With a start, the first subjects are known already: the others are shown more often.
EMPHASIS = dict.fromkeys(subjects.SECOND, 2.0)


def run(work: Path, *, count: int) -> None:
    folder = work / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    sprites, index = artwork.load(work)
    painter, tokenizer = Painter(sprites), load_tokenizer(work)
    palette = Palette(index, subjects.TRAINED, SEEN_STYLES, emphasis=EMPHASIS)
    autoencoder = load_autoencoder(work)
    for number in range(-(-count // SHARD)):
        path = folder / f"{number:04}.pt"
        if path.exists():
            continue
        rng = random.Random(f"latents-{number}")
        scenes = [compose(rng, palette, kind) for kind in rng.choices(list(MIX), list(MIX.values()), k=SHARD)]
        captions = [caption(scene, index, rng) for scene in scenes]
        with torch.no_grad():
            batches = [scenes[k : k + 50] for k in range(0, SHARD, 50)]
            z = [encode(autoencoder, as_tensor([painter.array(scene) for scene in batch])).half() for batch in batches]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        torch.save({"z": torch.cat(z), "ids": ids.short(), "captions": captions}, path)
        print(f"{path.name}: {captions[0]}", flush=True)


def load(work: Path) -> tuple[Tensor, Tensor]:
    """All shards: latents (N, 4, 16, 16) float16 and tokens (N, 64)."""
    shards = [torch.load(path, weights_only=True) for path in sorted((work / "latents").glob("*.pt"))]
    assert shards, "no latents: run that stage first"
    return torch.cat([shard["z"] for shard in shards]), torch.cat([shard["ids"] for shard in shards]).long()
