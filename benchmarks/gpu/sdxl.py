"""Training and drawing at SDXL's shape: memory on a card of 12 GB, and a training's steps."""

from functools import partial

from torch.utils.checkpoint import checkpoint

import fusion
from benchmarks.bases import Base
from benchmarks.gpu.checks import Checks
from benchmarks.gpu.numbers import CARD, LORA, OURS, gigabytes, peak_of_training, setting, step_rows, step_table
from benchmarks.memory import card_memory
from benchmarks.report import Section
from benchmarks.variants import VARIANTS
from fusion.adapters.adapter import Adapter
from fusion.models.low_memory import enable_low_memory
from fusion.training.accelerator import CHECKPOINTING

TRAINING, DRAWING, OFFLOADED = 10.5, 9.0, 8.0  # GB
LIMITS = (1.1, 0.9)  # eager and captured steps to PEFT LoRA's eager ones
PROMPT = "a <concept-0> and a <concept-1>"


def measure(device: str, checks: Checks, *, toy: bool) -> None:
    """Memory first, then the table of steps. Offloading moves the base away, so it comes last."""
    base = Base(toy=toy, device=device, latents=128, family="sdxl")
    pixels = base.latents * base.pipe.vae_scale_factor
    adapters = list[Adapter]()
    with checks.check(f"training at {pixels} px with gradient checkpointing") as notes:
        notes += [setting(base), peak_of_training(base, TRAINING, gradient_checkpointing=True)]
    with checks.check(f"drawing at {pixels} px with two concepts") as notes:
        adapters += [base.adapter("additive", k, gated=True) for k in range(2)]
        notes.append(peak_of_drawing(base, adapters, DRAWING))
    with checks.check("training steps of two sizes"):
        side = base.latents
        sizes = [(side, side), (side * 3 // 4, side * 5 // 4)]
        base.pipe.unet.enable_gradient_checkpointing(partial(checkpoint, **CHECKPOINTING))
        variants = {name: VARIANTS[name](base) for name in (LORA, *OURS)}
        rows = step_rows(base, variants, checks, limits=LIMITS, sizes=sizes)
        shapes = " and ".join(f"{height}×{width}" for height, width in sizes)
        text = f"{setting(base)}, {shapes} latents, batch 1, rank {base.rank}, gradient checkpointing. A step's mean."
        checks.show(Section("GPU: SDXL's training step", text, [step_table(rows)]))
        base.pipe.unet.disable_gradient_checkpointing()
    with checks.check(f"drawing at {pixels} px with low_memory") as notes:
        enable_low_memory(base.pipe, base.device)
        notes.append(peak_of_drawing(base, adapters, OFFLOADED))


def peak_of_drawing(base: Base, adapters: list[Adapter], limit: float) -> str:
    config = fusion.GenerationConfig(prompt=PROMPT, num_inference_steps=2)
    with card_memory(base.device, CARD) as peaks:
        fusion.generate(base.pipe, config, adapters)
    return gigabytes(peaks, limit)
