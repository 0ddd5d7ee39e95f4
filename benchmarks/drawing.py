"""What attached adapters cost a denoising step, and what attaching them costs."""

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bases import Base
from benchmarks.clock import Timing, interleaved, paired, timed
from benchmarks.report import Section, bar, table
from fusion.adapters.adapter import Adapter
from fusion.models import layer_sites
from fusion.models.attachment import Attachment, attach
from fusion.models.base_check import PassedChecks
from fusion.models.layer_sites import components
from fusion.models.model_state import state_of

ROUNDS = 7
LIMIT = 1.05  # a step with gated adapters attached, to one of the base
ATTACHING = {"at first": 0.3, "base known": 0.06}  # seconds for ten
LORAS = "{} of diffusers' LoRA"
PLAIN, ONE = "a photo of a dog", "a photo of a <concept-0>"
Log = Callable[[str], None]


class Denoising:
    """The UNet's calls of one picture, as the ordinary pipeline makes them."""

    def __init__(self, base: Base, prompt: str) -> None:
        self.unet, device = base.pipe.unet, base.pipe.device
        generator = torch.Generator().manual_seed(1)
        noisy = torch.randn(2, 4, base.latents, base.latents, generator=generator)
        self.noisy, self.time = noisy.to(device, self.unet.dtype), torch.tensor(500, device=device)
        tokens = base.pipe.tokenizer([PLAIN, prompt], padding="max_length", return_tensors="pt")
        with torch.no_grad():
            self.text = base.pipe.text_encoder(tokens.input_ids.to(device))[0]  # (2, T, D)

    @torch.no_grad()
    def call(self) -> torch.Tensor:
        return self.unet(self.noisy, self.time, encoder_hidden_states=self.text).sample


@contextmanager
def all_attached(base: Base, adapters: Sequence[Adapter]) -> Generator[None]:
    with ExitStack() as attached:
        for adapter in adapters:
            attached.enter_context(attach(base.pipe, adapter))
        yield


def seconds(base: Base, adapters: Sequence[Adapter], prompt: str) -> float:
    """Of a UNet call that is not a picture's first."""
    with all_attached(base, adapters):
        denoising = Denoising(base, prompt)
        denoising.call()
        return timed(denoising.call)


def lora_calls(
    base: Base, suffix: str = "", compile_unet: Callable[[Any], object] = lambda _: None
) -> dict[str, Callable[[], float]]:
    """Seconds of UNet calls with LoRAs as diffusers attaches them, 1 and 10 (of a toy 2), on a copy of the base."""
    counts = (1, 2) if base.toy else (1, 10)
    denoising, names = Denoising(base.copy(), PLAIN), [f"lora-{k}" for k in range(counts[-1])]
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=base.rank, init_lora_weights=False, target_modules=targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
        for name in names:
            denoising.unet.add_adapter(config, name)
    compile_unet(denoising.unet)

    def seconds(count: int) -> float:
        denoising.unet.set_adapters(names[:count])
        denoising.call()
        return timed(denoising.call)

    return {LORAS.format(count) + suffix: partial(seconds, count) for count in counts}


class _Operators(TorchDispatchMode):
    """Counts the operators that reach the device, and those of them that project the prompt."""

    def __init__(self, text: torch.Tensor) -> None:
        super().__init__()
        self.count, self.of_prompt, self._length = 0, 0, text.shape[:-1].numel()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not str(func).startswith(("aten.view", "aten.detach", "aten.t.", "aten.transpose"))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        multiplies = any(name in str(func) for name in ("aten.mm", "aten.addmm", "aten.linear"))
        self.of_prompt += multiplies and any(t.shape[:-1].numel() == self._length for t in tensors)
        return func(*args, **(kwargs or {}))


def operators(base: Base, adapters: Sequence[Adapter], prompt: str) -> tuple[int, int]:
    """Operators of a UNet call that is not a picture's first: all, and the projections of the prompt among them."""
    with all_attached(base, adapters):
        denoising = Denoising(base, prompt)
        denoising.call()
        with _Operators(denoising.text) as counted:
            denoising.call()
    return counted.count, counted.of_prompt


def time_attaching(base: Base, adapters: Sequence[Adapter], *, known: bool) -> float:
    """Seconds of attaching adapters, to a base that they have been compared with before or not."""
    if not known:
        state_of(base.pipe).checks = PassedChecks()
        for component in components(base.pipe).values():
            component.__dict__.pop(layer_sites._TABLE, None)
    handles: list[Attachment] = []
    duration = timed(lambda: handles.extend(attach(base.pipe, adapter) for adapter in adapters))
    for handle in handles:
        handle.detach()
    return duration


def measure(base: Base, log: Log, others: Mapping[str, Callable[[], float]] | None = None) -> Section:
    """`others` are further UNet calls, in seconds, to compare with."""
    one, ten, most = (1, 2, 3) if base.toy else (1, 10, 50)
    gated = [base.adapter("additive", k, gated=True) for k in range(most)]
    ungated = [base.adapter("additive", k) for k in range(ten)]
    log("adapters made")
    alternatives = {
        "base": ([], PLAIN),
        **{f"{n} gated, a prompt with one token": (gated[:n], ONE) for n in (one, ten, most)},
        f"{most} gated, a prompt without tokens": (gated, PLAIN),
        f"{ten} ungated": (ungated, PLAIN),
    }
    counts = {name: operators(base, *alternative) for name, alternative in alternatives.items()}
    log(f"operators, those that project the prompt: {counts}")
    rounds = 2 if base.toy else ROUNDS
    calls = {name: partial(seconds, base, *alternative) for name, alternative in alternatives.items()}
    timing = interleaved({**calls, **(others or {})}, rounds, log)
    attaching = {
        "at first": Timing(tuple(time_attaching(base, gated[:ten], known=False) for _ in range(rounds))),
        "base known": Timing(tuple(time_attaching(base, gated[:ten], known=True) for _ in range(rounds))),
    }
    rows = [
        [name, *t.milliseconds(), _ratio(base, name, paired(t, timing["base"]))]
        + [str(count) for count in counts.get(name, ("", ""))]
        for name, t in timing.items()
    ]
    text = (
        f"A UNet call at {base.latents}×{base.latents} latents with guidance, not a picture's first; "
        f"float32 unless the device computes in less. Gated adapters have {len(gated[0].layers)} layers, on which "
        f"keys and values of the prompt are kept; all are additive, rank {base.rank}. Ratios are medians over rounds, "
        "in which all took turns. Operators are counted as the device gets them."
    )
    columns = ["attached", "median", "least", "most", "to the base", "operators", "that project the prompt"]
    limits = [
        [f"attach {ten} gated, {name}", f"{t.median * 1000:.0f} ms", bar(t.median, ATTACHING[name], " s")]
        for name, t in attaching.items()
    ]
    return Section("Drawing", text, [table(columns, rows), table(["", "median", "bar"], limits)])


def _ratio(base: Base, name: str, value: float) -> str:
    return bar(value, LIMIT) if "gated" in name and "ungated" not in name and not base.toy else f"{value:.3f}×"
