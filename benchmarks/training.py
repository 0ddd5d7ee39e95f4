"""A training step and its peak memory: our adapters, PEFT's LoRA and the dense formulation."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.bases import Base
from benchmarks.clock import Timing, interleaved, paired, timed
from benchmarks.memory import peak_bytes, storage_bytes
from benchmarks.report import Section, bar, table
from benchmarks.variants import VARIANTS, Variant
from fusion.models.denoising import encode_batch, predict
from fusion.models.prompt_layout import prepared, prompt_batch
from fusion.training.cuda_graphs import CudaGraph, can_capture

ROUNDS = 9


class Batch(NamedTuple):
    """What a step denoises; all on the device."""

    noisy: torch.Tensor  # (B, 4, H, W)
    noise: torch.Tensor  # (B, 4, H, W)
    time_ids: torch.Tensor  # (B, 6), of SDXL


class Steps:
    """The training steps of one variant, on the same batches as all others: one of each size (H, W) of the latents."""

    def __init__(
        self, base: Base, variant: Variant, *, batch: int = 1, sizes: Sequence[tuple[int, int]] | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        device, dtype = base.device, base.pipe.unet.dtype
        self.batches: list[Batch] = []
        for size in sizes or [(base.latents, base.latents)]:
            noisy, noise = (torch.randn(batch, 4, *size, generator=generator).to(device, dtype) for _ in range(2))
            height, width = (side * base.pipe.vae_scale_factor for side in size)
            time_ids = torch.tensor([(height, width, 0, 0, height, width)] * batch, device=device)
            self.batches.append(Batch(noisy, noise, time_ids))
        self.time = torch.tensor([500] * batch, device=device)
        self.pipe, self.variant = base.pipe, variant
        self.autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
        # As in a training: where tokens stand is laid out before the step.
        with variant.installed(), torch.no_grad():
            self.prompts = prompt_batch(self.pipe, [variant.prompt or "a photo of a dog"] * batch)
            with prepared(self.pipe, self.prompts):
                self.cached = encode_batch(self.pipe, self.prompts)
        self.optimizer = torch.optim.AdamW(variant.parameters) if variant.parameters else None

    def step(self) -> None:
        """Forward, backward and update, with each batch."""
        for batch in self.batches:
            self.gradients(batch)
            if self.optimizer is not None:
                self.optimizer.step()
                self.optimizer.zero_grad()

    def gradients(self, batch: Batch) -> torch.Tensor:
        """Forward and backward; returns the loss."""
        with self.variant.computed(), prepared(self.pipe, self.prompts):
            with self.autocast():
                if self.variant.prompt:
                    text = encode_batch(self.pipe, self.prompts)
                else:
                    states = self.cached.states.detach().requires_grad_(self.optimizer is None)
                    text = self.cached._replace(states=states)
                prediction = predict(self.pipe, batch.noisy, self.time, text, batch.time_ids)
            loss = torch.nn.functional.mse_loss(prediction.float(), batch.noise.float())
            loss.backward()
        return loss.detach()

    def captured(self, pool: object) -> Callable[[], float]:
        """As `seconds`, with gradients that are captured as CUDA graphs, as a training captures them."""
        optimizer, graphs = self.optimizer, list[CudaGraph]()
        sums = [torch.zeros_like(parameter) for parameter in self.variant.parameters]

        def attach_sums() -> None:
            for parameter, total in zip(self.variant.parameters, sums, strict=True):
                parameter.grad = total

        def step() -> None:
            attach_sums()
            for graph in graphs:
                graph.replay()
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=False)

        attach_sums()
        with self.variant.installed():
            for batch in self.batches:
                graphs.append(CudaGraph(self.pipe.device, pool))
                graphs[-1].capture(partial(self.gradients, batch))
        return lambda: timed(step) / len(graphs)

    def seconds(self) -> float:
        """Of a step, the mean over batches."""
        with self.variant.installed():
            return timed(self.step) / len(self.batches)

    def peak(self) -> int:
        """Bytes beyond the base: the variant's tensors, its optimizer's state, and a step's peak activations."""
        with self.variant.installed():
            return storage_bytes(self.variant.tensors) + peak_bytes(lambda: (self.step(), self.step()))


def captured(steps: Mapping[str, Steps], device: torch.device) -> dict[str, Callable[[], float]]:
    """`Steps.captured` of all, which share a pool of memory; of none where a device has no CUDA graphs."""
    pool = CudaGraph.memory_pool() if can_capture(device) else None
    return {name: one.captured(pool) for name, one in steps.items() if can_capture(device)}


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
