"""Try a base on this machine: what it is, what it needs, and whether gates are exact and training works on it.

Draws a few pictures and trains a small adapter on a picture of its own, in about two minutes on a GPU; nothing is kept.
What it prints can be pasted into a report. It names no folder of the machine.
"""

import platform
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fusion.cli.console import UsageError, add_base_arguments, number, open_base
from fusion.generation.config import GenerationConfig
from fusion.progress import reporter
from fusion.training.config import MAX_RESOLUTION, TrainingConfig

PACKAGES = ("torch", "diffusers", "transformers", "peft")
TOKENS = ("<doctor-one>", "<doctor-two>")
NOUN = "dog"
DRAWING_STEPS = 4
LEARNING_RATE = 1e-3  # of a LoRA: in 20 steps it should change pictures


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion doctor --base NAME [options]"
    parser.epilog = "example: fusion doctor --base models/myAnimeXL.safetensors > report.txt"
    text = "side of the pictures (default: the base's own); smaller is faster"
    parser.add_argument("--resolution", type=number(int, 8, MAX_RESOLUTION), metavar="N", help=text)
    text = "training steps (default: 20)"
    parser.add_argument("--max_train_steps", type=number(int, 2, 1000), default=20, metavar="N", help=text)
    add_base_arguments(parser)


def run(args: Namespace) -> int:
    report = Report()
    libraries = " ".join(f"{name} {version(name)}" for name in PACKAGES)
    report.line("program", f"{libraries}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    with report.timed("opened in"):
        pipe = open_base(args.base, args, args.dtype)
    side = args.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    if side % (multiple := pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)):
        raise UsageError(f"--resolution {side} does not suit this base; use a multiple of {multiple}.")
    describe(pipe, report)
    first = draw(pipe, f"a photo of a {NOUN}", side)
    with report.timed(f"{DRAWING_STEPS} steps of {side}x{side} drawn in"):
        picture = draw(pipe, f"a photo of a {NOUN}", side)
    report.check("a picture twice", picture, first)
    spread = float(picture.std(axis=(0, 1)).max())
    report.verdict("the picture has content", spread > 1, f"standard deviation {spread:.1f} of 255")
    adapter = train(pipe, args.max_train_steps, side, report)
    check_gates(pipe, adapter, side, picture, report)
    report.line("memory", memory(pipe))
    report.line("result", f"checks failed: {report.failed}" if report.failed else "all checks passed")
    return 1 if report.failed else 0


class Report:
    """Lines for a report, printed as soon as they are known."""

    def __init__(self) -> None:
        self.failed = 0

    def line(self, name: str, text: str) -> None:
        print(f"{name:<36}  {text}", flush=True)

    def verdict(self, name: str, passed: bool, text: str = "") -> None:
        self.failed += not passed
        self.line(name, f"{'yes' if passed else 'NO'}{f', {text}' if text else ''}")

    def check(self, name: str, picture: Any, expected: Any) -> None:
        """Whether two pictures have the same bits."""
        difference = int(abs(picture - expected).max())
        text = f"differs by up to {difference} of 255" if difference else ""
        self.verdict(f"{name}: same bits", not difference, text)

    @contextmanager
    def timed(self, name: str) -> Generator[None]:
        began = time.monotonic()
        yield
        self.line(name, f"{time.monotonic() - began:.1f} s")


def describe(pipe: Any, report: Report) -> None:
    """The base as it was opened."""
    import torch

    from fusion.models.layer_sites import components
    from fusion.models.pipelines import base_info

    info, schedule, vae = base_info(pipe), pipe.scheduler.config, pipe.vae.config
    count = sum(weight.numel() for module in components(pipe).values() for weight in module.parameters())
    name = torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else platform.machine()
    noise = "zero terminal SNR, " if schedule.get("rescale_betas_zero_snr") else ""
    report.line("base", f"{info.name}: {info.family}, {count / 1e6:.0f} million parameters, digest {info.digest}")
    kind = type(pipe.scheduler).__name__
    report.line("predicts", f"{info.prediction}; {noise}{kind}, timesteps {schedule.timestep_spacing}")
    upcast = ", decoded in float32" if pipe.vae.dtype == torch.float16 and vae.force_upcast else ""
    report.line("VAE", f"scaling {vae.scaling_factor:g}, {pipe.vae_scale_factor} pixels a cell{upcast}")
    report.line("device", f"{pipe.device} {name}, {str(pipe.unet.dtype).removeprefix('torch.')}")


def draw(pipe: Any, prompt: str, side: int, *adapters: Any) -> Any:
    """The pixels (side, side, 3) of a prompt, as numbers with a sign."""
    import numpy as np

    from fusion.generation.drawing import generate

    config = GenerationConfig(prompt=prompt, num_inference_steps=DRAWING_STEPS, width=side, height=side)
    report = reporter("drawing")
    (picture,) = generate(pipe, config, adapters, on_step=lambda step, total, _: report(step, total))
    return np.asarray(picture.image, dtype=np.int16)


def train(pipe: Any, steps: int, side: int, report: Report) -> Any:
    """A LoRA for the first token, learned from one picture."""
    from PIL import Image, ImageDraw

    from fusion.training.loop import train as train_adapter

    with tempfile.TemporaryDirectory(prefix="fusion-doctor-") as folder:
        size = max(side, 64)  # smaller ones are refused as pictures
        picture = Image.new("RGB", (size, size), "orange")
        ImageDraw.Draw(picture).ellipse([size // 4, size // 4, size * 3 // 4, size * 3 // 4], fill="blue")
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        picture.save(pictures / "picture.png")
        settings: dict[str, Any] = {
            "token": TOKENS[0], "noun": NOUN, "instance_data_dir": pictures, "output_dir": Path(folder),
            "adapter_type": "lora", "max_train_steps": steps, "train_batch_size": 1, "resolution": side,
            "learning_rate": LEARNING_RATE, "lr_scheduler": "constant", "checkpointing_steps": 0,
            "num_validation_images": 0,
        }  # fmt: skip
        config = TrainingConfig.model_validate(settings)
        losses, began, adapter = list[float](), time.monotonic(), None
        report_step = reporter("training")
        for step in train_adapter(pipe, config, on_progress=lambda phase, *units: reporter(phase)(*units)):
            report_step(step.step, step.total)
            losses.append(step.loss)
            adapter = step.adapter
            began = time.monotonic() if len(losses) == 1 else began  # the first one prepares
        seconds = (time.monotonic() - began) / (steps - 1)
    finite = all(abs(loss) < float("inf") for loss in losses)
    first, second = (sum(part) / len(part) for part in (losses[: steps // 2], losses[steps // 2 :]))
    text = f"{steps} steps of {side} px, {seconds:.2f} s each, mean loss {first:.3f}, then {second:.3f}"
    report.verdict("training is finite", finite, text)
    return adapter


def check_gates(pipe: Any, adapter: Any, side: int, picture: Any, report: Report) -> None:
    """With two adapters attached: the base's prompt and that of one concept are drawn as without the others."""
    other = adapter.renamed({TOKENS[0]: TOKENS[1]})
    prompt = f"a photo of a {TOKENS[0]}"
    alone = draw(pipe, prompt, side, adapter)
    report.verdict("the concept changes pictures", bool((alone != picture).any()))
    report.check("a prompt without concepts", draw(pipe, f"a photo of a {NOUN}", side, adapter, other), picture)
    report.check("one concept of two", draw(pipe, prompt, side, adapter, other), alone)


def memory(pipe: Any) -> str:
    """The most that was taken so far."""
    import torch

    try:
        import resource
    except ImportError:  # Windows
        import psutil

        peak = psutil.Process().memory_info().peak_wset  # pyright: ignore[reportAttributeAccessIssue]
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = f"{peak / 1e9:.1f} GB at most"
    if pipe.device.type == "cuda":
        text += f", on the GPU {torch.cuda.max_memory_allocated(pipe.device) / 1e9:.1f} GB"
    return text
