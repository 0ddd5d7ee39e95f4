"""Fine-tuning a small language model with spectral adapters, LoRA and DoRA of about equally many parameters.

    python -m benchmarks.language_model            # under five minutes on one thread

A GPT-2 of two layers learns a made-up language from a random start. Then adapters alone learn a dialect of it, in which
a part of the rules is another. Each method takes the learning rate that is best on a dialect of its own; the table is
of five other dialects, the same for all methods. Losses are in nats per word, of sentences nobody trained on.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.report import machine, table
from fusion.peft import SpectralConfig, parameter_groups

WORDS, CLASSES, LENGTH, BATCH = 64, 16, 32, 16
TARGETS = ["c_attn", "c_proj", "c_fc"]
_WARMUP = 10  # steps
RATES = (3e-3, 1e-2, 3e-2)


class Language:
    """Words in classes. A class is followed by one of three others, and its word depends on the last word but one.

    A dialect has other followers for some classes and other words for others.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.followers = torch.rand(CLASSES, CLASSES, generator=generator).argsort(dim=1)[:, :3]
        self.words = torch.rand(CLASSES, WORDS, WORDS // CLASSES, generator=generator).argsort(dim=2)[..., :2]

    def dialect(self, seed: int, share: float = 0.4) -> "Language":
        other, changed = Language(seed), deepcopy(self)
        generator = torch.Generator().manual_seed(seed)
        for rules, new in ((changed.followers, other.followers), (changed.words, other.words)):
            rows = torch.rand(CLASSES, generator=generator) < share
            rules[rows] = new[rows]
        return changed

    def sentences(self, seed: int) -> Iterator[Tensor]:
        """Batches of words, (B, T). Each follower has probability 0.6, 0.3 or 0.1; of two words, 0.8 or 0.2."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            word = torch.randint(0, WORDS, (2, BATCH), generator=generator)
            sentence = [*word]
            for _ in range(LENGTH - 2):
                kind = sentence[-1] // (WORDS // CLASSES)
                choice = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), BATCH, replacement=True, generator=generator)
                kind = self.followers[kind, choice]
                choice = (torch.rand(BATCH, generator=generator) < 0.2).long()
                sentence.append(kind * (WORDS // CLASSES) + self.words[kind, sentence[-2], choice])
            yield torch.stack(sentence, dim=1)


@dataclass(frozen=True)
class Method:
    name: str
    config: Callable[[], PeftConfig]


METHODS = [
    Method("LoRA, rank 4", lambda: LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, fan_in_fan_out=True)),
    Method(
        "DoRA, rank 4",
        lambda: LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=TARGETS, fan_in_fan_out=True),
    ),
    Method("spectral additive, slice 0", lambda: SpectralConfig(r=4, slice=0, target_modules=TARGETS)),
    Method("spectral additive, slice 4", lambda: SpectralConfig(r=4, slice=4, target_modules=TARGETS)),
    Method(
        "spectral rotational, slice 0",
        lambda: SpectralConfig(r=22, slice=0, adapter_type="rotational", target_modules=TARGETS),
    ),
]


def train(model: nn.Module, language: Language, seed: int, steps: int, rate: float) -> None:
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, rate), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARMUP, (steps - step) / max(1, steps - _WARMUP))
    )
    for _, batch in zip(range(steps), language.sentences(seed), strict=False):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def loss_on(model: nn.Module, language: Language, batches: int) -> float:
    model.eval()
    held_out = zip(range(batches), language.sentences(10_000), strict=False)
    return mean(float(model(input_ids=batch, labels=batch).loss) for _, batch in held_out)


@dataclass(frozen=True)
class Result:
    parameters: int
    loss: float  # on the dialect
    original: float  # on the language before


class Experiment:
    def __init__(self, pretraining_steps: int, steps: int, batches: int) -> None:
        torch.manual_seed(0)
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
        no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        config = GPT2Config(vocab_size=WORDS, bos_token_id=None, eos_token_id=None, **sizes, **no_dropout)
        self.language, self.base = Language(0), GPT2LMHeadModel(config)
        self.steps, self.batches = steps, batches  # of fine-tuning; of sentences nobody trained on
        train(self.base, self.language, 1, pretraining_steps, 3e-3)

    def run(self, method: Method, seed: int, rate: float) -> Result:
        torch.manual_seed(seed)
        dialect, model = self.language.dialect(seed), deepcopy(self.base)
        adapted = get_peft_model(model, method.config())
        train(adapted, dialect, seed, self.steps, rate)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        return Result(trained, self.loss(adapted, dialect), self.loss(adapted, self.language))

    def loss(self, model: nn.Module, language: Language) -> float:
        return loss_on(model, language, self.batches)

    def rows(self, methods: list[Method], seeds: int, rates: tuple[float, ...]) -> Iterator[list[str]]:
        """The table's rows, each as soon as it is known. Seed 100 chooses the rate, 101 and on are reported."""
        dialects = [self.language.dialect(101 + number) for number in range(seeds)]
        untrained = [self.loss(self.base, dialect) for dialect in dialects]
        yield ["untrained", "0", "", _of(untrained), "", f"{self.loss(self.base, self.language):.3f}"]
        lora: list[float] = []
        for method in methods:
            tried = {rate: self.run(method, 100, rate).loss for rate in rates}
            best = min(tried, key=tried.__getitem__)
            results = [self.run(method, 101 + number, best) for number in range(seeds)]
            losses = [result.loss for result in results]
            lora = lora or losses
            difference = _of([ours - theirs for ours, theirs in zip(losses, lora, strict=True)])
            parameters, original = results[0].parameters, _of([result.original for result in results])
            yield [method.name, f"{parameters:,}", f"{best:g}", _of(losses), difference, original]


def _of(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language_model", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.process_time()
    if options.quick:
        rows = Experiment(2, 2, batches=1).rows(METHODS[:3], 1, RATES[:1])
    else:
        rows = Experiment(1000, 80, batches=16).rows(METHODS, options.seeds, RATES)
    columns = ["", "parameters", "learning rate", "loss on the dialect", "minus LoRA's", "on the first language"]
    lines: list[list[str]] = []
    for row in rows:
        print(*row, sep="  ", file=sys.stderr, flush=True)
        lines.append(row)
    print(table(columns, lines))
    print(f"\n{machine()} {time.process_time() - start:.0f} s of processor time.")


if __name__ == "__main__":
    main()
