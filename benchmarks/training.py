"""A training step and its peak memory: our adapters, PEFT's LoRA and the dense formulation."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.bases import Base
from benchmarks.clock import Timing, interleaved, paired, timed
from benchmarks.memory import peak_bytes, storage_bytes
from benchmarks.report import Section, bar, table
from benchmarks.variants import VARIANTS, Variant
from fusion.models.denoising import encode_batch
from fusion.models.prompt_layout import prepared, prompt_batch
from fusion.training.cuda_graphs import CudaGraph

ROUNDS = 9


class Steps:
    """The training steps of one variant, on the same batch as all others."""

    def __init__(self, base: Base, variant: Variant) -> None:
        generator = torch.Generator().manual_seed(1)
        size = (1, 4, base.latents, base.latents)
        device, dtype = base.device, base.pipe.unet.dtype
        self.noisy, self.noise = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
        self.time = torch.tensor([500], device=device)
        self.pipe, self.variant = base.pipe, variant
        self.autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
        # As in a training: where tokens stand is laid out before the step.
        with variant.installed(), torch.no_grad():
            self.prompts = prompt_batch(self.pipe, [variant.prompt or "a photo of a dog"])
            with prepared(self.pipe, self.prompts):
                self.cached = encode_batch(self.pipe, self.prompts).states  # (1, T, D)
        self.optimizer = torch.optim.AdamW(variant.parameters) if variant.parameters else None

    def step(self) -> None:
        """Forward, backward and update."""
        self.gradients()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradients(self) -> torch.Tensor:
        """Forward and backward; returns the loss."""
        with self.variant.computed(), prepared(self.pipe, self.prompts):
            with self.autocast():
                if self.variant.prompt:
                    text = encode_batch(self.pipe, self.prompts).states
                else:
                    text = self.cached.detach().requires_grad_(self.optimizer is None)
                prediction = self.pipe.unet(self.noisy, self.time, encoder_hidden_states=text).sample
            loss = torch.nn.functional.mse_loss(prediction.float(), self.noise.float())
            loss.backward()
        return loss.detach()

    def captured(self) -> Callable[[], float]:
        """Seconds of a step whose gradients are captured as a CUDA graph, as a training captures them."""
        graph, optimizer = CudaGraph(self.pipe.device, CudaGraph.memory_pool()), self.optimizer
        sums = [torch.zeros_like(parameter) for parameter in self.variant.parameters]

        def attach_sums() -> None:
            for parameter, total in zip(self.variant.parameters, sums, strict=True):
                parameter.grad = total

        def step() -> None:
            attach_sums()
            graph.replay()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)

        attach_sums()
        with self.variant.installed():
            graph.capture(self.gradients)
        return lambda: timed(step)

    def seconds(self) -> float:
        with self.variant.installed():
            return timed(self.step)

    def peak(self) -> int:
        """Bytes beyond the base: the variant's tensors, its optimizer's state, and a step's peak activations."""
        with self.variant.installed():
            return storage_bytes(self.variant.tensors) + peak_bytes(lambda: (self.step(), self.step()))


def measure(base: Base, log: Callable[[str], None]) -> Section:
    variants = {name: build(base) for name, build in VARIANTS.items()}
    # Memory first: an optimizer that has stepped before already has its state.
    memory = {}
    for name, variant in variants.items():
        memory[name] = Steps(base, variant).peak()
        log(f"memory of {name}: {memory[name] / 1e6:.0f} MB")
    steps = {name: Steps(base, variant) for name, variant in variants.items()}
    timing = interleaved({name: s.seconds for name, s in steps.items()}, 2 if base.toy else ROUNDS, log)
    counts = {name: sum(p.numel() for p in variant.parameters) for name, variant in variants.items()}
    return _section(base, timing, memory, counts)


def _section(base: Base, timing: dict[str, Timing], memory: dict[str, int], counts: dict[str, int]) -> Section:
    weights = [*base.pipe.unet.parameters(), *base.pipe.text_encoder.parameters()]
    total = {name: storage_bytes(weights) + extra for name, extra in memory.items()}
    lora, paper = "PEFT LoRA", "dense, the paper's code"
    rows = [
        [
            name,
            f"{counts[name] / 1e6:.2f} M",
            f"{timing[name].median:.2f} s",
            f"{timing[name].least:.2f} s",
            f"{paired(timing[name], timing[lora]):.3f}×",
            f"{memory[name] / 1e6:,.0f} MB",
            f"{memory[name] / memory[lora]:.3f}×",
            f"{total[name] / 1e6:,.0f} MB",
            f"{total[name] / total[lora]:.3f}×",
        ]
        for name in timing
    ]
    memories = ["memory beyond the base", "to LoRA", "with the base", "to LoRA"]
    columns = ["variant", "trained", "median", "least", "to LoRA", *memories]
    bars = [
        ["additive to PEFT LoRA, time", bar(paired(timing["additive"], timing[lora]), 1.03)],
        ["additive to dense as the paper's code has it, time", bar(paired(timing["additive"], timing[paper]), 0.4)],
        ["rotational to PEFT LoRA, time", bar(paired(timing["rotational"], timing[lora]), 1.05)],
        ["additive to PEFT LoRA, peak memory", bar(total["additive"] / total[lora], 1.03)],
        ["rotational to PEFT LoRA, peak memory", bar(total["rotational"] / total[lora], 1.03)],
    ]
    text = (
        f"Forward, backward and AdamW at {base.latents}×{base.latents} latents, batch 1, float32, rank {base.rank} on "
        f"the {len(base.layers(gated=False, unet_only=True))} projections of the UNet's attention, text cached. The "
        "token-gated adapter has its own default targets (text encoder, cross-attention keys and values), encodes its "
        "prompt in the step and trains its token too. Ratios of time are medians over rounds, in which all took turns. "
        "Memory is the most bytes of tensors that lived at once over two steps: beyond the base, what the variant and "
        "its optimizer keep, and activations."
    )
    tables = [table(columns, rows)] if base.toy else [table(columns, rows), table(["bar", "measured"], bars)]
    return Section("Training step", text, tables)
