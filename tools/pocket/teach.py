"""Is pocket teachable? A plain LoRA of rank 8 on six pictures of a concept it was never shown, by diffusers and peft.

Most of each batch are pictures that the base has drawn of its own subjects, so that it keeps them (prior preservation,
Ruiz et al. 2023, arXiv 2208.12242); drawing those counts as time. Measured: identity, the mean cosine in pocket-clip
between what is drawn and the references, as a share of that among the references themselves; and how many of the
base's own subjects, all others than those, it still draws with the LoRA on.
"""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image

from tools.pocket import subjects
from tools.pocket.artwork import Sprite
from tools.pocket.autoencoder import as_tensor, encode
from tools.pocket.captions import article
from tools.pocket.scenes import Painter, compose
from tools.pocket.verdict import Clip

CONCEPTS = (("octopus", "glossy"), ("robot", "noto"), ("jack-o-lantern", "outline"))
TOKEN = "<it>"
RANK, STEPS = 8, 300
RATE, WORD_RATE = 2e-3, 1e-2
OWN, KEPT = 4, 6  # pictures in a batch: of the concept, and of what the base has drawn
KNOWN = 40  # of the base's own subjects, evenly chosen
PRIOR = 48  # of the others
Draw = Callable[[StableDiffusionPipeline, Sequence[str], int], list[Image.Image]]


def measure(
    load: Callable[[], StableDiffusionPipeline],
    index: Sequence[Sprite],
    painter: Painter,
    clip: Clip,
    draw: Draw,
    sheets: Path,
) -> dict[str, object]:
    known = subjects.TRAINED[:: len(subjects.TRAINED) // KNOWN][:KNOWN]
    others = [name for name in subjects.TRAINED if name not in known]
    prior = others[:: len(others) // PRIOR][:PRIOR]
    words, kept = (
        [f"{article(clip.labels[name])} on a {c} background" for name, c in zip(names, cycle(), strict=False)]
        for names in (known, prior)
    )
    found: dict[str, object] = {"known_before": keeps(clip, draw(load(), words, 5000), known)}
    for name, style in CONCEPTS:
        fresh = load()
        k = next(k for k, sprite in enumerate(index) if (sprite.subject, sprite.style) == (name, style))
        rng = random.Random(f"teach-{name}")
        scenes = [compose(rng, None, "alone", sprites=[k], colour=c) for c, _ in zip(cycle(), range(6), strict=False)]
        pictures = [painter.array(scene) for scene in scenes]
        references = clip.images(pictures)
        level = (references @ references.T).fill_diagonal_(0).sum().item() / 30
        asked = [f"on a {colour} background" for colour in ("blue", "green", "white", "red", "pink", "grey")]
        base = draw(fresh, [f"{article(clip.labels[name])} {a}" for a in asked], 6000)
        begun = time.perf_counter()
        drawn = [np.asarray(image) for image in draw(fresh, kept, 7000)]
        own = [f"a {TOKEN} on a {scene.colour} background" for scene in scenes]
        teach(fresh, pictures, own, drawn, kept)
        seconds = time.perf_counter() - begun
        taught = draw(fresh, [f"a {TOKEN} {a}" for a in asked], 6000)
        sheet = Image.new("RGB", (6 * 130, 3 * 130))
        for row, images in enumerate((map(Image.fromarray, pictures), base, taught)):
            for column, image in enumerate(images):
                sheet.paste(image, (column * 130, row * 130))
        identity = [(clip.images([np.asarray(i) for i in row]) @ references.T).mean().item() for row in (base, taught)]
        found[f"{style} {name}"] = {
            "references": round(level, 3),
            "base": round(identity[0] / level, 3),
            "taught": round(identity[1] / level, 3),
            "known_after": keeps(clip, draw(fresh, words, 5000), known),
            "seconds": round(seconds),
        }
        sheet.save(sheets / f"teach-{name}.png")
        print(name, found[f"{style} {name}"], flush=True)
    return found


def cycle() -> list[str]:
    """Colours in an order that mixes them, as many as are ever needed."""
    colours = list(subjects.COLOURS)
    return [colours[(5 * k + 1) % 12] for k in range(KNOWN)]


def keeps(clip: Clip, images: Sequence[Image.Image], known: Sequence[str]) -> float:
    seen = (clip.images([np.asarray(image) for image in images]) @ clip.names.T).argmax(1)
    return round(float(np.mean([subjects.TRAINED[n] == name for n, name in zip(seen, known, strict=True)])), 4)


def teach(
    pipe: StableDiffusionPipeline,
    pictures: Sequence[np.ndarray],
    captions: Sequence[str],
    prior: Sequence[np.ndarray],
    prior_captions: Sequence[str],
) -> None:
    """Train in place: `pictures` of the concept beside `prior` pictures of what the base knows."""
    tokenizer, text, unet = pipe.tokenizer, pipe.text_encoder, pipe.unet
    tokenizer.add_tokens([TOKEN])
    text.resize_token_embeddings(len(tokenizer))
    number = tokenizer.convert_tokens_to_ids(TOKEN)
    embeddings = text.get_input_embeddings()
    for module in (unet, text, pipe.vae):
        module.requires_grad_(False)
    with torch.no_grad():
        embeddings.weight[number] = embeddings.weight[:number].mean(0)
        Z = encode(pipe.vae, as_tensor([*pictures, *prior])) * pipe.vae.config.scaling_factor  # (N, 4, 16, 16)
    lora = {"r": RANK, "lora_alpha": RANK, "init_lora_weights": "gaussian"}
    unet.add_adapter(LoraConfig(**lora, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    text.add_adapter(LoraConfig(**lora, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]))
    word = torch.zeros(embeddings.weight.shape[1], requires_grad=True)
    embeddings.register_forward_hook(lambda module, args, out: out + (args[0] == number).unsqueeze(-1) * word)
    trained = [p for module in (unet, text) for p in module.parameters() if p.requires_grad]
    opt = torch.optim.AdamW([{"params": trained, "lr": RATE}, {"params": [word], "lr": WORD_RATE}])
    falling = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: max(0.05, 1 - step / STEPS))
    ids = tokenizer([*captions, *prior_captions], padding="max_length", return_tensors="pt").input_ids
    rng = torch.Generator().manual_seed(0)
    count = OWN + KEPT
    for _ in range(STEPS):
        own = torch.randperm(len(pictures), generator=rng)[:OWN]
        kept = len(pictures) + torch.randperm(len(prior), generator=rng)[:KEPT]
        rows = torch.cat([own, kept])
        z = Z[rows]
        t = ((torch.randperm(count, generator=rng) + torch.rand(count, generator=rng)) * 1000 / count).long()
        noise = torch.randn(z.shape, generator=rng)
        noisy, goal = pipe.scheduler.add_noise(z, noise, t), pipe.scheduler.get_velocity(z, noise, t)
        loss = F.mse_loss(unet(noisy, t, text(ids[rows])[0]).sample, goal)
        opt.zero_grad()
        loss.backward()
        opt.step()
        falling.step()
