"""Drawing with compiled UNets: they predict what the eager one does, are compiled once, and are faster."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from diffusers import UNet2DConditionModel

import fusion
from benchmarks import drawing
from benchmarks.bases import Base
from benchmarks.clock import interleaved, paired
from benchmarks.drawing import ONE, PLAIN, Denoising
from benchmarks.gpu.checks import Checks, require
from benchmarks.gpu.numbers import ROUNDS, setting
from benchmarks.report import Section, bar, table
from fusion.adapters.adapter import Adapter
from fusion.models.attachment import attach

CHANGES = 20  # of concepts, strengths and prompts
SPEED = 1.5  # times the speed of diffusers' eager call
STRENGTHS = (1.0, 0.5, 0.0, -2.0)
PROMPTS = (ONE, PLAIN, "a <concept-1> and a <concept-0>")


def predictions(base: Base, adapters: Sequence[Adapter]) -> Generator[torch.Tensor]:
    """One for each change, in float32: of a call that is not the picture's first."""
    choices = (adapters, adapters[:1], adapters[1:2], adapters[::-1])
    for change in range(CHANGES):
        with ExitStack() as attached:
            for adapter in choices[change % 4]:
                handle = attached.enter_context(attach(base.pipe, adapter))
                handle.strength(adapter.branches[0].name, STRENGTHS[change // 4 % 4])
            denoising = Denoising(base, PROMPTS[change % 3])
            denoising.call()
            yield denoising.call().float().clone()  # before a CUDA graph writes the next one there


def compiled_base(
    eager: Base, adapters: Sequence[Adapter], checks: Checks, way: str, compile_base: Callable[[Base], None]
) -> Base | None:
    """A copy of the base with a compiled UNet, if it predicts as the eager one through all changes."""
    with checks.check(f"compiled by {way}") as notes:
        base, graphs = eager.copy(), list[int]()
        compile_base(base)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for expected, other in zip(predictions(eager, adapters), predictions(base, adapters), strict=True):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
            exact = base.pipe.unet.dtype == torch.float32
            tolerance = 1e-4 if exact else 5e-2 * float(expected.abs().max())
            require(torch.allclose(other, expected, atol=tolerance, rtol=0), "predictions differ")
        require(len(set(graphs)) == 1, f"graphs are compiled anew: {graphs}")
        notes.append(f"{graphs[-1]} graphs over {CHANGES} changes of concepts, strengths and prompts")
        return base
    return None


def compile_blocks(base: Base) -> None:
    fusion.compile_unet(base.pipe)


def compile_whole(base: Base) -> None:
    """What replays CUDA graphs."""
    base.pipe.unet = torch.compile(base.pipe.unet, mode="reduce-overhead")


def check_toy(device: str, checks: Checks) -> None:
    base = Base(toy=True, device=device)
    compiled_base(base, gated(base, 2), checks, "fusion.compile_unet", compile_blocks)


def gated(base: Base, count: int) -> list[Adapter]:
    return [base.adapter("additive", k, gated=True) for k in range(count)]


def measure(device: str, checks: Checks, *, toy: bool) -> None:
    """Print the table of UNet calls, eager and compiled."""
    base, counts = Base(toy=toy, device=device, latents=64), (1, 2, 3) if toy else (1, 10, 50)
    adapters = gated(base, counts[-1])
    bases = {"eager": base}
    ways = {"fusion.compile_unet": compile_blocks}
    if base.device.type == "cuda":
        ways['torch.compile, "reduce-overhead"'] = compile_whole
    for way, compile_base in ways.items():
        if checks.has_time() and (other := compiled_base(base, adapters[: counts[1]], checks, way, compile_base)):
            bases[way] = other
    calls = {"base, eager": partial(drawing.seconds, base, [], PLAIN), **drawing.lora_calls(base, ", eager")}
    for way, each in bases.items():
        calls |= {f"{n} gated, {way}": partial(drawing.seconds, each, adapters[:n], ONE) for n in counts}
    # With and without adapters, layers have graphs of their own; those above torch's limit of 8 would run eagerly.
    with torch._dynamo.config.patch(recompile_limit=64):
        if (other := bases.get("fusion.compile_unet")) and checks.has_time():
            calls["base, fusion.compile_unet"] = partial(drawing.seconds, other, [], PLAIN)
            backend = "eager" if toy else "inductor"  # LoRAs take a C++ compiler minutes
            compile_blocks_of = partial(UNet2DConditionModel.compile_repeated_blocks, backend=backend)
            calls |= drawing.lora_calls(base, ", compiled", compile_blocks_of)
        time_calls(base, {name: call for name, call in calls.items() if first_call(name, call, checks)}, checks)


def first_call(name: str, call: Callable[[], float], checks: Checks) -> bool:
    """Whether there was time for it, and it succeeded."""
    if not checks.has_time():
        return False
    with checks.check(f"{name}, first call") as notes:
        start = checks.seconds()
        call()
        notes.append(f"{checks.seconds() - start:.1f} s")
        return True
    return False


def time_calls(base: Base, calls: Mapping[str, Callable[[], float]], checks: Checks) -> None:
    with checks.check("drawing is measured"):
        timing, rows = interleaved(calls, 2 if base.toy else ROUNDS, checks.log), list[list[str]]()
        for name, t in timing.items():
            ratios = [paired(t, timing[other]) for other in ("base, eager", drawing.LORAS.format(1) + ", eager")]
            has_bar = not base.toy and "gated" in name and not name.endswith("eager")
            to_base = bar(ratios[0], round(1 / SPEED, 3)) if has_bar else f"{ratios[0]:.3f}×"
            rows.append([name, *t.milliseconds(), to_base, f"{ratios[1]:.3f}×"])
        columns = ["UNet call", "median", "least", "most", "to the base, eager", "to 1 LoRA, eager"]
        text = f"{setting(base)}, {base.latents}×{base.latents} latents with guidance, not a picture's first call."
        checks.show(Section("GPU: compiled UNets", text, [table(columns, rows)]))
