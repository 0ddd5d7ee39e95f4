"""What training, drawing, attaching and the SVD cost on a GPU at Stable Diffusion 1.5's shape."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from benchmarks import drawing
from benchmarks.bases import Base
from benchmarks.clock import interleaved, paired, timed
from benchmarks.gpu.checks import Checks, teach
from benchmarks.memory import card_memory
from benchmarks.report import Section, bar, machine, table
from benchmarks.training import Steps, captured
from benchmarks.variants import VARIANTS, Variant
from fusion.spectral.spectrum import decompose

ROUNDS = 5
CARD = 12.0  # GB that a training may take where its memory is measured
MEMORY = 6.0  # GB, of a training at 512 px
CAPTURED = {1: 0.35, 4: 0.45}  # a captured step to PEFT LoRA's eager one, by batch size
EAGER = 1.1  # an eager step to that
LORA, SUFFIX = "PEFT LoRA", ", captured"
OURS = ("additive", "rotational", "additive, token-gated")


def measure(device: str, checks: Checks, *, toy: bool) -> None:
    """Print the tables of training steps, then that of drawing."""
    base = Base(toy=toy, device=device, latents=64)
    pixels = base.latents * base.pipe.vae_scale_factor
    with checks.check(f"memory of a training at {pixels} px") as notes:
        notes.append(peak_of_training(base, MEMORY))
    variants = {name: build(base) for name, build in VARIANTS.items() if not name.startswith("dense")}
    for batch, limit in CAPTURED.items():
        if checks.has_time():
            with checks.check(f"training steps, batch {batch}"):
                rows = step_rows(base, variants, checks, limits=(EAGER, limit), batch=batch)
                text = f"{setting(base)}, {base.latents}×{base.latents} latents, batch {batch}, rank {base.rank}."
                checks.show(Section(f"GPU: training step, batch {batch}", text, [step_table(rows)]))
    if checks.has_time():
        with checks.check("drawing is measured"):
            section = drawing.measure(base, checks.log, drawing.lora_calls(base))
            section.title, section.text = "GPU: drawing", f"{setting(base)}. {section.text}"
            checks.show(section)
    if checks.has_time():
        with checks.check("singular directions") as notes:
            notes.append(time_svd(base))


def setting(base: Base) -> str:
    """The card, or the CPU, and the precision."""
    return f"{card(base.device)}, {base.pipe.unet.dtype}"


def card(device: torch.device) -> str:
    if device.type != "cuda":
        return machine().rstrip(".")
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"


def peak_of_training(base: Base, limit: float, **settings: object) -> str:
    """The memory of a training from pictures to its last step, of a type that needs no SVD of the base."""
    with card_memory(base.device, CARD) as peaks:
        teach(base.pipe, "robot", 4, adapter_type="lora", **settings)
    return gigabytes(peaks, limit)


def gigabytes(peaks: Sequence[float], limit: float) -> str:
    """What `card_memory` measured, as a line."""
    return f"{bar(peaks[0], limit, ' GB')}, {peaks[1]:.1f} GB reserved" if peaks else "memory is measured on CUDA alone"


def step_rows(
    base: Base, variants: Mapping[str, Variant], checks: Checks, *, limits: tuple[float, float], batch: int = 1,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> list[list[str]]:  # fmt: skip
    """A row for each variant's step, eager and captured; `limits` are for the ratios of our eager and captured ones."""
    steps, memory = dict[str, Steps](), dict[str, str]()
    for name, variant in variants.items():
        steps[name] = Steps(base, variant, batch=batch, sizes=sizes)
        with card_memory(base.device) as peaks:
            steps[name].seconds()
        memory[name] = f"{peaks[0]:.1f} GB" if peaks else ""
    functions = {name: each.seconds for name, each in steps.items()}
    functions |= {name + SUFFIX: call for name, call in captured(steps, base.device).items()}
    timing = interleaved(functions, 2 if base.toy else ROUNDS, checks.log)
    rows: list[list[str]] = []
    for name, t in timing.items():
        ratio, kind = paired(t, timing[LORA]), name.removesuffix(SUFFIX)
        to_lora = f"{ratio:.2f}×" if base.toy or kind not in OURS else bar(ratio, limits[kind != name])
        to_captured = f"{paired(t, timing[LORA + SUFFIX]):.2f}×" if LORA + SUFFIX in timing else ""
        rows.append([name, *t.milliseconds(), memory.get(name, ""), to_lora, to_captured])
    return rows


def step_table(rows: list[list[str]]) -> str:
    return table(["step", "median", "least", "most", "memory", "to LoRA", "to LoRA captured"], rows)


def time_svd(base: Base) -> str:
    """Seconds of the singular directions of all layers, from one layer of each shape."""
    weights = {weight.shape: weight for weight in base.weights.values()}
    decompose(min(weights.values(), key=torch.Tensor.numel))  # the library is loaded
    counts = Counter(weight.shape for weight in base.weights.values())
    seconds = sum(counts[shape] * timed(lambda w=weight: decompose(w)) for shape, weight in weights.items())
    return f"{seconds:.1f} s for {len(base.weights)} layers, from one of each of {len(weights)} shapes"
