"""Ways to train one concept. All adapt the same layers, with the same rank, pictures, steps and number of vectors.

An adapter of rank R has R (I + O) parameters a layer in every row but the orthogonal one, which has R · O.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TARGETS = ["text_encoder", "unet.attn2.to_k", "unet.attn2.to_v"]  # the default targets of token gating


@dataclass(frozen=True)
class Recipe:
    """Settings of the training, and which slice the k-th concept gets."""

    about: str
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    slice_of: Callable[[int], int | None] = lambda k: k
    rate_of: str = ""  # the recipe whose searched learning rate it takes; its own if empty


STYLE = "without colours"  # the plain LoRA of a style
PLAIN_VERSION = 1  # of plain LoRAs; a larger number trains, draws and scores again
PLAIN = "plain-lora"  # trained by PEFT as people share them, on more layers: plain_loras.py

RECIPES: dict[str, Recipe] = {
    "spectral": Recipe("additive, own slices, gated by tokens", {"gating": "tokens"}),
    "lora": Recipe("plain LoRA", {"adapter_type": "lora", "gating": "none"}, lambda k: None),
    "spectral-open": Recipe("additive, own slices, not gated", {"gating": "none"}),
    "spectral-same": Recipe(
        "additive, all on slice 0, not gated", {"gating": "none"}, lambda k: 0, rate_of="spectral-open"
    ),
    "spectral-shuffled": Recipe(
        "additive, own slices in another order, not gated", {"gating": "none"}, lambda k: k ^ 3, rate_of="spectral-open"
    ),
    "orthogonal": Recipe("blocks of one shared basis, not gated", {"adapter_type": "orthogonal", "gating": "none"}),
    "lora-gated": Recipe("LoRA gated by tokens", {"adapter_type": "lora", "gating": "tokens"}, lambda k: None),
    "spectral-quiet": Recipe(
        "additive, own slices, not gated, quiet loss",
        {"gating": "none", "quiet_loss_weight": 10.0},
        rate_of="spectral-open",
    ),
    "spectral-gated-quiet": Recipe(
        "additive, own slices, gated by tokens, quiet loss: pocket's default",
        {"gating": "tokens", "quiet_loss_weight": 10.0},
        rate_of="spectral",
    ),
    "lora-quiet": Recipe(
        "plain LoRA, quiet loss",
        {"adapter_type": "lora", "gating": "none", "quiet_loss_weight": 10.0},
        lambda k: None,
        rate_of="lora",
    ),
    PLAIN: Recipe("plain LoRA by PEFT on all attention layers and ordinary words", slice_of=lambda k: None),
}
