"""The cost of ten attached adapters on a prompt without their tokens: only the check whether a gate opens."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from benchmarks.bases import Base
from benchmarks.clock import interleaved, paired, timed
from benchmarks.report import Section, table
from fusion.adapters.adapter import Adapter
from fusion.models.attachment import attach

ROUNDS = 7
PLAIN = "a photo of a dog"


def measure(base: Base, log: Callable[[str], None]) -> Section:
    gated = [base.adapter("additive", k, gated=True) for k in range(10)]
    ungated = [base.adapter("additive", k) for k in range(10)]
    noisy = torch.randn(1, 4, base.latents, base.latents, generator=torch.Generator().manual_seed(1))

    def forward(adapters: Sequence[Adapter], prompt: str) -> float:
        """Seconds of a UNet forward, without encoding the prompt."""
        with ExitStack() as attached, torch.inference_mode():
            for adapter in adapters:
                attached.enter_context(attach(base.pipe, adapter))
            tokens = base.pipe.tokenizer(prompt, padding="max_length", return_tensors="pt")
            text = base.pipe.text_encoder(tokens.input_ids)[0]  # (1, T, D)
            return timed(lambda: base.pipe.unet(noisy, torch.tensor(500), encoder_hidden_states=text))

    work = {
        "base": lambda: forward([], PLAIN),
        "ten gated, a prompt without their tokens": lambda: forward(gated, PLAIN),
        "ten gated, a prompt with one token": lambda: forward(gated, "a photo of a <concept-3>"),
        "ten ungated": lambda: forward(ungated, PLAIN),
    }
    timing = interleaved(work, 2 if base.toy else ROUNDS, log)
    rows = [
        [name, f"{t.median:.2f} s", f"{t.least:.2f} s", f"{paired(t, timing['base']):.2f}×"]
        for name, t in timing.items()
    ]
    text = (
        f"A UNet forward at {base.latents}×{base.latents} latents, batch 1. Gated adapters have {len(gated[0].layers)} "
        f"layers, ungated ones {len(ungated[0].layers)}; all additive, rank {base.rank}."
    )
    return Section("Gating", text, [table(["attached", "median", "least", "to the base"], rows)])
