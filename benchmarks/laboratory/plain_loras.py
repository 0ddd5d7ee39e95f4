"""Plain LoRAs as people share them: trained by PEFT on the attention layers, on ordinary words, without a token.

A concept's LoRA learns its pictures under its noun. In the cell of its adapter the noun is written as the concept's
token, with the base's own embeddings of the noun, so that the prompts of the other arms fit: drawn without a gate, it
is the plain LoRA. The style learns pictures of the base without their colours, and acts on every prompt.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps

import fusion
from benchmarks.laboratory.concepts import Concept
from fusion.adapters.adapter import Adapter
from fusion.models.denoising import encode_prompts, predict
from fusion.models.tokens import embedding_of

STYLE_PROMPTS = tuple(
    f"a {thing} on a {colour} background"
    for thing, colour in zip(
        ("dog face", "rocket", "rose", "guitar", "house", "fish", "banana", "bell"),
        ("red", "blue", "yellow", "green", "pink", "purple", "teal", "orange"),
        strict=True,
    )
)
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def train_concept(pipe: Any, concept: Concept, folder: Path, **settings: Any) -> None:
    """Write `adapter.safetensors` into `folder`; `pipe` is used up."""
    pictures = [Image.open(path).convert("RGB") for path in sorted(concept.folder.glob("*.png"))]
    captions = [path.read_text(encoding="utf-8").strip() for path in sorted(concept.folder.glob("*.txt"))]
    captions = [caption.replace(concept.token, concept.noun) for caption in captions]
    rows = embedding_of(pipe.text_encoder).weight.detach().clone()
    ids = pipe.tokenizer(concept.noun, add_special_tokens=False).input_ids
    lora = train(pipe, pictures, captions, folder, **settings)
    word = fusion.Concept(concept.token, concept.noun, len(ids))
    named = replace(lora, info=replace(lora.info, name=concept.name, concepts=(word,)))
    fusion.save(replace(named, tokens={concept.token: {"text_encoder": rows[ids]}}), folder / "adapter.safetensors")


def train_style(pipe: Any, folder: Path, **settings: Any) -> None:
    """Write `adapter.safetensors` into `folder`; `pipe` is used up."""
    drawings = [fusion.generate(pipe, fusion.GenerationConfig(prompt=prompt))[0].image for prompt in STYLE_PROMPTS]
    grey = [ImageOps.grayscale(drawing).convert("RGB") for drawing in drawings]
    fusion.save(train(pipe, grey, STYLE_PROMPTS, folder, **settings), folder / "adapter.safetensors")


def train(
    pipe: Any, pictures: Sequence[Image.Image], captions: Sequence[str], folder: Path,
    *, rank: int, steps: int, batch: int, rate: float,
) -> Adapter:  # fmt: skip
    """A LoRA by PEFT, as diffusers' scripts train and save it, loaded from its file."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        pixels = pipe.image_processor.preprocess(list(pictures), side, side).to(pipe.device)
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    schedule = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    torch.manual_seed(0)  # PEFT's initial factors
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=UNET_LAYERS))
    pipe.text_encoder.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TEXT_LAYERS))
    trained = [p for model in (pipe.unet, pipe.text_encoder) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    for step in range(steps):
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        times = torch.randint(schedule.config.num_train_timesteps, (batch,), generator=generator).to(clean.device)
        velocity = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(clean, noise, times) if velocity else noise
        prompts = encode_prompts(pipe, [captions[i] for i in chosen.tolist()])
        loss = (predict(pipe, schedule.add_noise(clean, noise, times), times, prompts) - target).square().mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    layers = [convert_state_dict_to_diffusers(get_peft_model_state_dict(m)) for m in (pipe.unet, pipe.text_encoder)]
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, *layers)
    return fusion.load(folder / "pytorch_lora_weights.safetensors")
