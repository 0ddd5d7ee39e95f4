"""Pools of prompts with the teacher's answers, within a bound of memory, and the batches that are taken from them.

A batch is a function of the settings and the number of its step. In the first round through a pool the prompts are
answered as they are needed, always in the same groups, so that a resumed distillation gets the same bits.

Shapes: P prompts of a pool, B of a batch.
"""

import random
from collections.abc import Callable, Sequence

import torch

from fusion.distillation.config import DistillationConfig
from fusion.distillation.prompt_distribution import PromptDistribution
from fusion.distillation.teacher import Answers, Teacher

AHEAD = 8  # batches of prompts that are answered at once in the first round: attaching the teacher takes its time


class PromptPools:
    """Several pools in turn, as many as it takes to hold `num_prompts`, each used for its part of the steps."""

    def __init__(
        self, teacher: Teacher, distribution: PromptDistribution, config: DistillationConfig, steps: int,
        bytes_per_prompt: float,
    ) -> None:  # fmt: skip
        self.teacher, self.distribution, self.config = teacher, distribution, config
        batch, wanted = config.train_batch_size, steps * config.train_batch_size
        most = max(batch, int(config.teacher_memory * 2**20 / bytes_per_prompt))
        total = max(batch, min(config.num_prompts, wanted))
        self.count = -(-total // most)
        self.size = -(-total // (self.count * batch)) * batch
        self.steps = -(-steps // self.count)  # of each pool
        self._number = -1
        self._prompts: Sequence[str] = ()
        self._groups: list[Answers | None] = []

    def batch(self, step: int) -> Answers:
        """The batch of a step, counted from 1."""
        number, within = divmod(step - 1, self.steps)
        self._open(number)
        batch = self.config.train_batch_size
        round_, position = divmod(within, len(self._groups))
        if round_ == 0:
            start = position // AHEAD * AHEAD
            return self._answered(range(start, min(start + AHEAD, len(self._groups))))[position - start]
        generator = torch.Generator().manual_seed(hash_of(self.config.seed, number, round_))
        order = torch.randperm(self.size, generator=generator)[position * batch : (position + 1) * batch]
        groups = (order // batch).tolist()
        members = dict(zip(sorted({*groups}), self._answered(sorted({*groups})), strict=True))
        rows = zip(groups, (order % batch).tolist(), strict=True)
        return Answers.join([members[group].select(slice(row, row + 1)) for group, row in rows])

    def _open(self, number: int) -> None:
        """The prompts of a pool, unless they are there."""
        if number != self._number:
            self._number = number
            self._groups = [None for _ in range(self.size // self.config.train_batch_size)]
            rng = random.Random(f"{self.config.seed} pool {number}")
            self._prompts = self.distribution.draw(rng, self.size)

    def answer_first(
        self, prompts: int, answer: Callable[[Sequence[str]], Answers], on_progress: Callable[[int, int], None]
    ) -> None:
        """Have the first prompts of the first pool answered, by `answer`, before the steps need them.

        `on_progress(done, total)` counts batches.
        """
        self._open(0)
        count = min(len(self._groups), -(-prompts // self.config.train_batch_size))
        with self.teacher.attached():
            for group in range(count):
                on_progress(group, count)
                self._groups[group] = answer(self._prompts_of(group))

    def _prompts_of(self, group: int) -> Sequence[str]:
        batch = self.config.train_batch_size
        return self._prompts[group * batch : (group + 1) * batch]

    def _answered(self, groups: Sequence[int]) -> list[Answers]:
        """The answers of these groups of prompts; what is missing is asked of the teacher."""
        missing = [group for group in groups if self._groups[group] is None]
        if missing:
            with self.teacher.attached():
                for group in missing:
                    self._groups[group] = self.teacher.answer(self._prompts_of(group))
        return [answers for group in groups if (answers := self._groups[group]) is not None]


def hash_of(*numbers: int) -> int:
    """A seed from several numbers."""
    return random.Random(" ".join(map(str, numbers))).getrandbits(62)
