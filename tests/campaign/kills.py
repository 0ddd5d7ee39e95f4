"""Commands killed at random moments: what is there is whole, the next command finishes the work and cleans up."""

import os
import random
import shutil
import signal
import tempfile
from collections import Counter as Tally
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from campaign import laws, materials, processes, studio
from campaign.processes import Action, Child, Counter, Ending
from fusion.base_models import opening

PREVIEW = "out/samples/dog-00003-0.png"
SPACE = ["space", "--wheel", "wheel/spectral_fusion-0-py3-none-any.whl"]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Workload:
    """A command, and what a person types after it was killed."""

    name: str
    words: Action
    again: list[Action] = field(default_factory=list)  # the first that succeeds finishes; by default the same command
    optional: tuple[str, ...] = ()  # files that may remain from a command killed after it had succeeded
    interim: tuple[str, ...] = ()  # files that a signal may leave as they were at an earlier step
    lossy: tuple[str, ...] = ()  # files that an interrupted command may leave out for good

    def finish(self, folder: Path, prepare: Callable[[], object]) -> Ending:
        for words in self.again or [self.words]:
            ending = processes.run(words, folder, prepare)
            if ending.code == 0:
                break
        return ending


def workloads(base: Path) -> list[Workload]:
    on = ["--base", str(base), "--device", "cpu"]
    train = ["train", "--token", "<dog>", "--noun", "dog", "--instance_data_dir", "data", *on]
    train += ["--checkpointing_steps", "2", "--checkpoints_total_limit", "2", "--max_train_steps", "5"]
    train += ["--targets", "unet.attn2.to_k", "unet.attn2.to_v", "--text_encoder_lr", "0"]
    previews = ["--validation_prompt", "a {token}", "--num_validation_images", "1", "--validation_steps", "3"]
    prior = ["--gating", "none", "--with_prior_preservation", "--class_prompt", "a dog"]
    prior += ["--num_class_images", "2", "--sample_batch_size", "1"]
    trainings = {"train": [*train, *previews], "train with class pictures": [*train, *prior]}
    rex, tom, resume = "lib/rex.safetensors", "lib/tom.safetensors", ["--resume_from_checkpoint", "latest"]
    distill = [*distillation(base), "-o", "out/d.safetensors"]
    bake = ["bake", rex, "-o", "out/baked", "--gating", "none", *on]
    fused = ["fuse", rex, tom, "-o", "out/both.safetensors"]
    return [
        # A preview that was being drawn when its training was interrupted is not drawn again.
        *(Workload(name, words, [[*words, *resume], words], lossy=(PREVIEW,)) for name, words in trainings.items()),
        Workload("fuse", fused),
        Workload("export", ["export", rex, "--to", "kohya", "-o", "out/k.safetensors"]),
        Workload("generate", ["generate", rex, "--prompt", "a <rex>", "--num_images", "2", "-o", "out/a.png", *on]),
        Workload("compare", ["compare", rex, "--prompt", "a <rex>", "--strengths", "1", "-o", "out/s.png", *on]),
        Workload("bake", bake, [bake, [*bake, "--overwrite"]]),
        Workload("inspect", ["inspect", rex, tom, "--plot", "out/p.png"]),
        Workload("comfyui", ["comfyui", "-o", "out/nodes"]),
        Workload("space", [*SPACE, "--output_dir", "out/space"]),
        Workload("library add", ["library", "lib", "--add", "lora/kohya.safetensors"], optional=("lib/kohya-2",)),
        Workload(
            "library rename",
            ["library", "lib", "--rename", "rex", "max"],
            [["library", "lib", "--rename", "rex", "max"], ["library", "lib"]],
        ),
        Workload("distill", distill, [[*distill, *resume], distill]),
        Workload(
            "studio",
            partial(studio.teach, base),
            [partial(studio.resume, base)],
            interim=("out/dog.safetensors", "out/dog.png"),
        ),
        Workload(
            "library delete",
            ["library", "lib", "--delete", "rex"],
            [["library", "lib", "--delete", "rex"], ["library", "lib"]],
        ),
    ]


def distillation(base: Path) -> list[str]:
    """The words of a distillation, without the output."""
    settings = {"rank": 2, "max_train_steps": 4, "checkpointing_steps": 2, "num_prompts": 16, "train_batch_size": 2}
    settings |= {"decoys": 2, "lr_warmup_steps": 0}
    words = ["export", "lib/rex.safetensors", "--to", "kohya", "--distill", "--base", str(base), "--device", "cpu"]
    return [*words, *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


class Campaign:
    """Kills of one workload after the other, and what came out."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.tally = folder, random.Random(seed), Tally[str]()
        self.problems: list[str] = []

    def kill(self, workload: Workload, times: int) -> None:
        """Kill the workload `times` times, each in a folder of its own, and check every law after each."""
        before, reference, hidden, shape = self.uninterrupted(workload)
        for number in range(times):
            work = laws.fresh(self.folder / "work", *parts(self.folder))
            way, ending = self.killed(workload, work, shape)
            if ending.code == 0:
                self.tally["ended before the kill"] += 1
                continue
            self.tally[workload.name] += 1
            problems = laws.half_results(work, before, reference, workload.interim)
            problems += ["traceback: " + ending.last_lines] if ending.traceback else []
            again = workload.finish(work, in_folder(work))
            if again.code != 0 or again.traceback:
                problems.append(f"cannot be finished: {again.code} {again.last_lines}")
            left = laws.unfinished_results(work, reference, hidden)
            harmless = (*workload.optional, *(f"{name} is missing" for name in workload.lossy), "\0")
            problems += [line for line in left if not line.startswith(harmless)]
            self.report(workload, f"{way}, number {number}", problems, work)

    def report(self, workload: Workload, way: str, problems: list[str], work: Path) -> None:
        if problems:
            self.problems.append(f"{workload.name}, {way}: {'; '.join(problems)}")
            keep = self.folder / "problems" / f"{workload.name} {way}"
            shutil.copytree(work, keep, symlinks=True, dirs_exist_ok=True)
            (keep / "problems.txt").write_text(self.problems[-1])

    def uninterrupted(self, workload: Workload) -> tuple[laws.Contents, laws.Contents, set[str], tuple]:
        """The folder before and after, what is hidden in it, and how long, busy and large the command is."""
        work = laws.fresh(self.folder / "work", *parts(self.folder))
        before, counter = laws.contents(work), Counter()
        ending = processes.run(workload.words, work, in_folder(work, partial(processes.count_file_events, counter)))
        assert ending.code == 0 and not ending.traceback, f"{ending.code}: {ending.last_lines}"
        sizes = [file.stat().st_size for file in work.rglob("*") if file.is_file() and file.stat().st_mtime_ns]
        return before, laws.contents(work), laws.hidden_files(work), (ending.seconds, counter.value, max(sizes))

    def killed(self, workload: Workload, work: Path, shape: tuple[float, int, int]) -> tuple[str, Ending]:
        """Start the workload and kill it: after a time, at something it does to a file, or in the middle of a write."""
        seconds, events, size = shape
        way, number = self.random.randrange(3), self.random.choice(SIGNALS)
        if way == 0:
            delay = self.random.uniform(0, seconds)
            child = Child(workload.words, work, in_folder(work))
            return f"{number.name} after {delay:.3f} s", child.kill_after(delay, number)
        if way == 1:
            event = self.random.randint(1, max(events, 1))
            kill = partial(processes.count_file_events, Counter(), event, number)
            return f"{number.name} at file event {event}", processes.run(workload.words, work, in_folder(work, kill))
        limit = int(size * self.random.random() ** 2)
        kill = partial(processes.die_when_a_file_reaches, limit)
        return f"killed in a write beyond {limit} bytes", processes.run(workload.words, work, in_folder(work, kill))


def parts(folder: Path) -> list[Path]:
    return [folder / name for name in ("data", "lib", "lora", "wheel")]


def in_folder(work: Path, prepare: Callable[[], object] | None = None) -> Callable[[], None]:
    """In a child: cache and temporary files are in the folder itself, so that they are checked as well."""

    def prepared() -> None:
        os.environ |= {"FUSION_CACHE": str(work / "cache"), "TMPDIR": str(work / laws.TEMPORARY)}
        tempfile.tempdir = None  # read the variable again
        (work / laws.TEMPORARY).mkdir(exist_ok=True)
        if prepare:
            prepare()

    return prepared


def run(folder: Path, seed: int, times: dict[str, int] | int) -> tuple[dict[str, int], list[str]]:
    """Kill every workload so often. Returns the number of kills by workload, and what was wrong."""
    campaign, pipe = Campaign(folder, seed), opening.open_pipeline(folder / materials.BASE, device="cpu")
    opening.open_pipeline = lambda *_, **__: pipe  # once, instead of in every child
    for workload in workloads(folder / materials.BASE):
        count = times if isinstance(times, int) else times.get(workload.name, 0)
        if count:
            try:
                campaign.kill(workload, count)
            except AssertionError as error:  # what was counted until then stays counted
                campaign.report(workload, "uninterrupted", [str(error)], folder / "work")
    return dict(campaign.tally), campaign.problems
