"""Whether a concept is learned as fast on slice 7 as on slice 0, and whether `balance_slices` helps.

On the embedded pocket base, with one of the example concepts. Noise, timesteps and order depend on the seed alone, so
the losses of two slices are paired step by step.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fusion
from benchmarks.bases import Base
from benchmarks.report import Section, table

CONCEPT = Path(__file__).parent.parent / "assets/concepts/octopus"
STEPS, WINDOWS, SEEDS, SLICES = 200, 4, (0, 1), (0, 7)


def losses(pipe: Any, seed: int, number: int, *, balanced: bool, steps: int) -> list[float]:
    """The loss of every training step on slice `number`."""
    with tempfile.TemporaryDirectory() as folder:
        config = fusion.TrainingConfig(
            token="<octopus>",
            noun="octopus",
            instance_data_dir=CONCEPT,
            output_dir=Path(folder),
            max_train_steps=steps,
            slice=number,
            balance_slices=balanced,
            quiet_loss_weight=0.0,
            seed=seed,
            checkpointing_steps=0,
        )
        return [step.loss for step in fusion.train(pipe, config)]


def measure(base: Base, log: Callable[[str], None]) -> Section:
    steps, seeds = (WINDOWS, SEEDS[:1]) if base.toy else (STEPS, SEEDS)
    pipe = base.pipe if base.toy else fusion.open_pipeline()
    rows: list[list[str]] = []
    for balanced in (False, True):
        means: dict[int, list[float]] = {}  # slice -> mean loss per window, over all seeds
        for number in SLICES:
            runs = [losses(pipe, seed, number, balanced=balanced, steps=steps) for seed in seeds]
            means[number] = [statistics.fmean(x for run in runs for x in _window(run, w)) for w in range(WINDOWS)]
            log(f"balanced {balanced}, slice {number}: {means[number]}")
            rows.append([str(number), "yes" if balanced else "no", *(f"{mean:.4f}" for mean in means[number])])
        first, last = (means[number] for number in SLICES)
        rows.append([f"{SLICES[1]} to {SLICES[0]}", "", *(f"{b / a:.3f}×" for a, b in zip(first, last, strict=True))])
    ends = [round((w + 1) * steps / WINDOWS) for w in range(WINDOWS)]
    starts = [1, *(end + 1 for end in ends[:-1])]
    columns = ["slice", "balanced", *(f"steps {a}-{b}" for a, b in zip(starts, ends, strict=True))]
    text = (
        f"Training loss on pocket, additive adapter with pocket's own settings, {steps} steps, mean over {len(seeds)} "
        "seeds: a slice far down the spectrum has small singular values, and its gradients scale with them."
    )
    return Section("Slice balance", text, [table(columns, rows)])


def _window(run: list[float], number: int) -> list[float]:
    size = len(run) // WINDOWS
    return run[number * size : (number + 1) * size]
