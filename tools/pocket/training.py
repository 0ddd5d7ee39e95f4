"""The loop that every trained stage shares: schedule by steps, moving average, checkpoints, log, sample sheets.

Step k draws all its randomness from seeds made of (seed, k), so a checkpoint needs no generator's state and a run
that was stopped goes on to the same bits as one that was not.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tools.pocket.muon import optimizers

LOG_EVERY = 25


@dataclass(frozen=True)
class Plan:
    """`rate` rises over `warmup` steps, stays, and falls linearly to nothing over the last `decay` of all steps."""

    steps: int
    rate: float
    warmup: int = 30
    decay: float = 0.5
    average: float = 0.998  # of the moving average of the weights, which is what is kept
    weight_decay: float = 0.0
    seed: int = 0
    checkpoint_every: int = 200
    sheet_every: int = 500

    def rate_at(self, step: int) -> float:
        falling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.rate * min(1.0, (step + 1) / self.warmup, max(0.01, falling))


class Threads:
    """How many threads to compute with on a machine that others use, too.

    Two threads that wait for each other are slower than one where another program has one of two cores. So each
    number is tried now and then, for two steps, and the faster used until the next trial. Sums come out in another
    order then: runs are the same to the bit only with a fixed number (`OMP_NUM_THREADS`), where nothing is tried.
    """

    TRIAL = 24

    def __init__(self, choices: Sequence[int]):
        self.choices = choices
        self.seconds = dict.fromkeys(choices, 0.0)

    def choose(self, step: int) -> None:
        if len(self.choices) > 1:
            turn = step % self.TRIAL // 2
            trying = turn < len(self.choices)
            torch.set_num_threads(self.choices[turn] if trying else min(self.choices, key=self.seconds.__getitem__))

    def took(self, seconds: float) -> None:
        self.seconds[torch.get_num_threads()] = seconds


class Draws:
    """The randomness of one step."""

    def __init__(self, seed: int, step: int):
        self.python = random.Random(f"{seed}-{step}")
        self.torch = torch.Generator().manual_seed(self.python.getrandbits(60))


def train(
    folder: Path,
    model: nn.Module,
    plan: Plan,
    loss_of: Callable[[nn.Module, Draws, int], tuple[Tensor, dict[str, float]]],
    sheet: Callable[[nn.Module, int], None] | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Train `model` to `plan.steps`, from the newest checkpoint in `folder`; returns the moving average.

    `loss_of(model, draws, step)` gives the loss and numbers for the log; `sheet(average, step)` draws samples;
    `prepare(model)` is called once, after the checkpoint is read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.requires_grad_(False)
    opts = optimizers(model, plan.rate, weight_decay=plan.weight_decay)
    step = restore(folder, model, average, opts)
    if prepare:
        prepare(model)
    wanted_stop: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: wanted_stop.append(number))
    started, first, window = time.monotonic(), step, []
    threads = Threads([torch.get_num_threads()] if "OMP_NUM_THREADS" in os.environ else [1, torch.get_num_threads()])
    while step < plan.steps and not wanted_stop:
        threads.choose(step)
        begun = time.monotonic()
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = plan.rate_at(step)
            opt.zero_grad(set_to_none=True)
        loss, numbers = loss_of(model, Draws(plan.seed, step), step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        step += 1
        keep = min(plan.average, (1 + step) / (10 + step))  # early on, the average is no older than the run
        with torch.no_grad():
            torch._foreach_lerp_(list(average.module.parameters()), list(model.parameters()), 1 - keep)
        threads.took(time.monotonic() - begun)
        window.append({"loss": loss.item(), **numbers})
        if step % LOG_EVERY == 0:
            report(folder, step, window, (time.monotonic() - started) / (step - first))
            window = []
        if step % plan.checkpoint_every == 0 or step == plan.steps:
            save(folder, step, model, average, opts)
        if sheet and (step % plan.sheet_every == 0 or step == plan.steps):
            sheet(average.module, step)
    signal.signal(signal.SIGTERM, previous)
    if wanted_stop:
        save(folder, step, model, average, opts)
        raise SystemExit(f"stopped at step {step}; the same command goes on from there")
    return average.module


def report(folder: Path, step: int, window: list[dict[str, float]], seconds: float) -> None:
    means = {key: sum(row[key] for row in window) / len(window) for key in window[0]}
    line = " ".join([f"step {step}", *(f"{key} {value:.4f}" for key, value in means.items()), f"{seconds:.2f} s/step"])
    print(line, flush=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        log.write(line + "\n")


def save(folder: Path, step: int, model: nn.Module, average: nn.Module, opts: list[torch.optim.Optimizer]) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizers": [opt.state_dict() for opt in opts],
    }
    torch.save(state, folder / "checkpoint.new")
    (folder / "checkpoint.new").replace(folder / "checkpoint.pt")  # never half a file under the right name


def restore(folder: Path, model: nn.Module, average: nn.Module, opts: list[torch.optim.Optimizer]) -> int:
    if not (folder / "checkpoint.pt").exists():
        return 0
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    for opt, saved in zip(opts, state["optimizers"], strict=True):
        opt.load_state_dict(saved)
    return state["step"]


def copy_matching(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Start from another model's weights: where a shape differs, the part both have is copied. Returns what is new."""
    new = []
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name not in weights or weights[name].ndim != value.ndim:
                new.append(name)
                continue
            both = tuple(slice(0, min(n, m)) for n, m in zip(value.shape, weights[name].shape, strict=True))
            value[both] = weights[name][both].to(value.dtype)
            if value.shape != weights[name].shape:
                new.append(name)
    return new
