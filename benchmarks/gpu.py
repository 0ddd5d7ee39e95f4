"""`python -m benchmarks.gpu`: what of the toolkit holds on a GPU, then what it costs there. Under four minutes.

Checks come first, a line each, on the embedded base in the precision that the device rule chooses; then the table "GPU"
at Stable Diffusion 1.5's shape. `--device cpu` runs the same at toy size. Exits with 1 if a check fails.
"""

import argparse
import contextlib
import copy
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 200  # after them, no further measurement is begun
ROUNDS = 5
PROMPTS = ("a dog face on a blue background", "a <robot> on a red background", "a <robot> and an <octopus>")


class Checks:
    """Runs checks, prints a line for each, and counts those that fail."""

    def __init__(self) -> None:
        self.start, self.failed = time.monotonic(), 0

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
        print(f"{self.seconds():6.1f} s  {result}  {name}: {', '.join(map(str, notes))}", flush=True)

    def seconds(self) -> float:
        return time.monotonic() - self.start


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
            notes += [
                step.adapter.info.provenance.settings["mixed_precision"],
                f"{1000 * seconds / steps:.0f} ms a step",
            ]
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


def trained(pipe: Any, **settings: object) -> Any:
    """The parameters after three steps."""
    return list(teach(pipe, "robot", 3, slice=5, **settings)[0].parameters())


def difference(one: Any, other: Any) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(one, other, strict=True))


def captured_difference(pipe: Any, **settings: object) -> float:
    return difference(*(trained(pipe, cuda_graphs=on, **settings) for on in (True, False)))


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


def check_compilation(device: str, checks: Checks) -> None:
    """Compiled, the UNet predicts what it predicts eagerly, whatever is attached, and is compiled once."""
    import torch

    import fusion
    from benchmarks.bases import Base
    from benchmarks.drawing import ONE, PLAIN, Denoising, all_attached

    with checks.check("torch.compile") as notes:
        base = Base(toy=True, device=device)
        gated = [base.adapter("additive", k, gated=True) for k in range(2)]
        cases = [(gated, ONE), (gated, PLAIN), (gated[1:], PLAIN), (gated[::-1], ONE)]

        def predictions() -> Generator[torch.Tensor]:
            for adapters, prompt in cases:
                with all_attached(base, adapters):
                    yield Denoising(base, prompt).call().float()

        eager, graphs = list(predictions()), list[int]()
        fusion.compile_unet(base.pipe)
        for expected, compiled in zip(eager, predictions(), strict=True):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            tolerance = 1e-4 if compiled.dtype == base.pipe.unet.dtype else 5e-2 * float(expected.abs().max())
            require(torch.allclose(compiled, expected, atol=tolerance, rtol=0), "compiled predictions differ")
        require(len(set(graphs)) == 1, f"graphs were compiled anew: {graphs}")
        notes.append(f"{graphs[-1]} graphs")


def measure(device: str, checks: Checks, *, toy: bool) -> None:
    """Print the table of training steps, then that of drawing."""
    import torch

    from benchmarks import drawing
    from benchmarks.bases import Base
    from benchmarks.clock import interleaved, paired
    from benchmarks.report import Section, machine, table
    from benchmarks.training import Steps
    from benchmarks.variants import VARIANTS

    log: Callable[[str], None] = lambda line: print(f"{checks.seconds():6.1f} s  {line}", file=sys.stderr)  # noqa: E731
    base = Base(toy=toy, device=device, latents=64)
    names = [name for name in VARIANTS if not name.startswith("dense")]
    steps, memory = {}, {}
    with checks.check("training steps are measured") as notes:
        for name in names:
            steps[name] = Steps(base, VARIANTS[name](base))
            if base.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                steps[name].seconds()
                memory[name] = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        functions = {name: s.seconds for name, s in steps.items()}
        if base.device.type == "cuda":
            functions |= {f"{name}, captured": s.captured() for name, s in steps.items()}
        timing = interleaved(functions, 2 if toy else ROUNDS, log)
        to_lora = {name: f"{paired(t, timing['PEFT LoRA']):.2f}×" for name, t in timing.items()}
        rows = [
            [name, f"{t.median * 1000:.1f} ms", f"{t.least * 1000:.1f} ms", memory.get(name, ""), to_lora[name]]
            for name, t in timing.items()
        ]
        card = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else machine()
        text = f"{card}, {base.pipe.unet.dtype}, {base.latents}×{base.latents} latents, batch 1, rank {base.rank}."
        print(Section("GPU", text, [table(["step", "median", "least", "memory", "to LoRA"], rows)]).markdown())
        notes.append(f"{len(rows)} variants")
    if checks.seconds() < SECONDS:
        with checks.check("drawing is measured"):
            print(drawing.measure(base, log).markdown())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda, cuda:1, mps; cpu: toy size")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of each training among the checks")
    parser.add_argument("--only", choices=("checks", "numbers"))
    options = parser.parse_args()
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # read at import: advice for their own users
        os.environ.setdefault(name, "error")
    checks, toy = Checks(), options.device == "cpu"
    if options.only != "numbers":
        check_product(options.device, checks, options.steps)
        check_compilation(options.device, checks)
    if options.only != "checks":
        measure(options.device, checks, toy=toy)
    print(f"{checks.failed} failed, {checks.seconds():.0f} s")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
