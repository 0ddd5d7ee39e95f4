"""What of the product holds on a GPU: on the embedded base, in the precision that the device rule chooses."""

import contextlib
import copy
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

from benchmarks.report import Section, bar

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 200  # after them, no further measurement is begun
STEP = 25  # ms of a training step on the embedded base
PROMPTS = ("a dog face on a blue background", "a <robot> on a red background", "a <robot> and an <octopus>")


class Checks:
    """Runs checks, prints a line for each and the tables, keeps both, and counts the checks that fail."""

    def __init__(self) -> None:
        self.start, self.failed = time.monotonic(), 0
        self.rows, self.sections = list[list[str]](), list[Section]()

    @contextlib.contextmanager
    def check(self, name: str) -> Generator[list[object]]:
        """The block appends what is worth printing, and raises where something is wrong."""
        notes: list[object] = []
        result = "ok  "
        try:
            yield notes
        except Exception as error:
            self.failed, result = self.failed + 1, "FAIL"
            notes.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}")
            traceback.print_exc(limit=-3)
        self.rows.append([name, result.strip(), ", ".join(map(str, notes))])
        print(f"{self.seconds():6.1f} s  {result}  {name}: {self.rows[-1][-1]}", flush=True)

    def show(self, section: Section) -> None:
        self.sections.append(section)
        print(section.markdown(), flush=True)

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def has_time(self) -> bool:
        return self.seconds() < SECONDS

    def log(self, line: str) -> None:
        print(f"{self.seconds():6.1f} s  {line}", file=sys.stderr)


def require(condition: object, problem: str) -> None:
    if not condition:
        raise RuntimeError(problem)


def check_product(device: str, checks: Checks, steps: int) -> None:
    """The product on the embedded base: taught, drawn, fused and measured."""
    import fusion

    pipe: Any = None
    with checks.check("the base is opened") as notes:
        pipe = fusion.open_pipeline(device=device)
        notes += [pipe.unet.device, pipe.unet.dtype]
    adapters: list[Any] = []
    for name in ("robot", "octopus"):
        with checks.check(f"a concept is taught, {steps} steps") as notes:
            step, seconds = teach(pipe, name, steps, slice=len(adapters))
            adapters.append(step.adapter)
            each = 1000 * seconds / steps
            notes.append(step.adapter.info.provenance.settings["mixed_precision"])
            notes.append(f"a step {bar(each, STEP, ' ms')}" if pipe.device.type == "cuda" else f"{each:.0f} ms a step")
    with checks.check("gates are exact") as notes:
        base, one = picture(pipe, PROMPTS[0]), picture(pipe, PROMPTS[1], adapters[:1])
        require(equal(base, picture(pipe, PROMPTS[0], adapters)), "adapters change a prompt without their tokens")
        require(equal(one, picture(pipe, PROMPTS[1], adapters)), "an adapter changes another's prompt")
        require(not equal(one, picture(pipe, PROMPTS[1].replace("<robot>", "robot"))), "an adapter does nothing")
        notes.append("0 bits differ")
    for deterministic in (False, True):
        with checks.check("equal trainings" + ", deterministic" * deterministic) as notes:
            one, other = (parameters(teach(pipe, "robot", 3, slice=5, deterministic=deterministic)) for _ in range(2))
            error = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
            require(error == 0 or not deterministic, f"parameters differ by {error:.1e}")
            notes.append(f"parameters differ by {error:.1e} at most")
    if pipe.device.type == "cuda":
        with checks.check("CUDA graphs train as kernel by kernel") as notes:
            _, slow = teach(pipe, "robot", steps, slice=5, cuda_graphs=False)
            notes.append(f"{1000 * slow / steps:.0f} ms a step without")
            notes.append("in {}, gradients differ by {:.1e}, the loss by {:.1e}".format(*captured_errors(pipe)))
            precise = fusion.open_pipeline(device=device, dtype="float32")
            notes.append("in {}, by {:.1e} and {:.1e}".format(*(errors := captured_errors(precise))))
            require(max(errors[1:]) < 1e-5, notes[-1])
    with checks.check("threads draw what one draws"):
        drawn: dict[str, Any] = {}
        with contextlib.ExitStack() as attached:
            for adapter in adapters:
                attached.enter_context(fusion.attach(pipe, adapter))
            expected = [picture(pipe, prompt) for prompt in PROMPTS[:2]]
            clones = [type(pipe)(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}) for _ in range(2)]
            work = [
                threading.Thread(target=lambda c=c, p=p: drawn.update({p: picture(c, p)}))
                for c, p in zip(clones, PROMPTS[:2], strict=True)
            ]
            for thread in work:
                thread.start()
            for thread in work:
                thread.join()
        require(all(equal(e, drawn[p]) for e, p in zip(expected, PROMPTS[:2], strict=True)), "pictures differ")
    with checks.check("fusing, compatibility, evaluation") as notes:
        notes.append(fusion.compatibility(adapters, pipe).verdict)
        fused = fusion.fuse(adapters, name="both")
        require(equal(picture(pipe, PROMPTS[2], [fused]), picture(pipe, PROMPTS[2], adapters)), "a fused one differs")
        require(fusion.evaluate(pipe, adapters).to_markdown(), "the report is empty")
    if pipe.device.type == "cuda":
        with checks.check("offloading to the CPU"):
            other = fusion.open_pipeline(device="cpu", dtype=str(pipe.unet.dtype).removeprefix("torch."))
            other.enable_model_cpu_offload(device=pipe.device)
            require(equal(picture(other, PROMPTS[1], adapters), picture(pipe, PROMPTS[1], adapters)), "pictures differ")


def teach(pipe: Any, name: str, steps: int, **settings: object) -> tuple[Any, float]:
    """A short training by the recipe of an example: its last step, and the seconds of all steps after the first."""
    import fusion

    with tempfile.TemporaryDirectory() as folder:
        config = fusion.TrainingConfig.from_toml(ROOT / "assets" / "recipes" / f"{name}.toml")
        run = {"output_dir": Path(folder), "max_train_steps": steps, "checkpointing_steps": 0}
        seconds, step = [0.0], None
        for step in fusion.train(pipe, config.updated({**run, "num_validation_images": 0, **settings})):
            seconds.append(step.seconds)
    assert step is not None
    return step, (seconds[-1] - seconds[1]) * steps / max(1, steps - 1)


def parameters(training: tuple[Any, float]) -> list[Any]:
    return [parameter.detach() for parameter in training[0].adapter.parameters()]


def captured_errors(pipe: Any) -> tuple[Any, float, float]:
    """Relative errors of a step's gradients and loss where a graph computes them: of the second step, as the first
    batch of a shape is computed without."""
    import torch

    (captured, _), (eager, _) = (
        teach(pipe, "robot", 2, slice=5, deterministic=True, cuda_graphs=on) for on in (True, False)
    )
    one, other = (
        torch.cat([p.grad.flatten() for p in step.adapter.parameters() if p.grad is not None])
        for step in (captured, eager)
    )
    return pipe.unet.dtype, float((one - other).norm() / other.norm()), abs(captured.loss / eager.loss - 1)


def picture(pipe: Any, prompt: str, adapters: Any = ()) -> Any:
    import fusion

    # All that the base's own defaults would set, which a clone of its pipeline does not know.
    config = fusion.GenerationConfig(
        prompt=prompt, seed=1, num_inference_steps=3, guidance_scale=3.0, guidance_rescale=0.0
    )
    return fusion.generate(pipe, config, adapters)[0].image


def equal(one: Any, other: Any) -> bool:
    return one.tobytes() == other.tobytes()
