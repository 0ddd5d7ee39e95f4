"""Where a distillation starts: at the least-squares answer of every layer by itself, on the teacher's inputs.

Gradient descent then fits the layers to each other. It would find the same directions, but slowly: the inputs of a text
encoder are much alike, and what tells a concept's token from other words is a small part of them.

Shapes: P prompts, T text positions, I in_features, N rows, Q rank of the branches together.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import count, groupby
from typing import Any

import torch
from torch import Tensor

from fusion.distillation.student import Student
from fusion.distillation.teacher import Answers, Teacher
from fusion.layer_names import component_of
from fusion.methods.distill import least_squares_delta, ridge_factor
from fusion.models.layer_sites import sites
from fusion.progress import OnProgress


class LeastSquares:
    """The sums over inputs that least squares needs, for every layer that a branch of the teacher changes."""

    def __init__(self, teacher: Teacher, student: Student, free_weight: float) -> None:
        self.teacher, self.student, self.free_weight = teacher, student, free_weight
        self._moments: dict[str, Tensor] = {}  # Σ w x xᵀ (I, I), of the first layer that has these inputs
        self._first: dict[str, str] = {}  # layer -> the first layer with the same inputs
        self._cross: dict[str, Tensor] = {}  # Σ w x (a ⊙ down x)ᵀ (I, Q)

    @torch.no_grad()
    def answer(self, prompts: Sequence[str]) -> Answers:
        """The teacher's answers, with the inputs of its layers counted. The teacher has to be attached."""
        inputs: dict[str, Tensor] = {}
        with self._recording(inputs):
            answers = self.teacher.answer(prompts)
        part = answers.cut(self.teacher.length(answers.ids))
        states = part.states.float()
        inputs |= dict.fromkeys(self.student.weights, states)
        encoders = list(part.ids)
        for layer, x in inputs.items():
            component = component_of(layer)
            owners = part.owners[:, [encoders.index(component)]] if component in encoders else part.owners
            self._count(layer, inputs, x[:, : owners.shape[-1]], owners)
        return answers

    @contextmanager
    def _recording(self, inputs: dict[str, Tensor]) -> Generator[None]:
        """The inputs (P, T, I) of the text encoders' layers, while prompts are encoded."""

        def recorder(layer: str) -> Any:
            return lambda _module, args: inputs.update({layer: args[0]})

        table = sites(self.teacher.pipe)
        layers = [name for name in self.student.loras if name not in self.student.weights]
        changed = [name for name in layers if name in table and self.teacher.changes(name)]
        hooks = [table[name].module.register_forward_pre_hook(recorder(name)) for name in changed]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, layer: str, inputs: dict[str, Tensor], x: Tensor, owners: Tensor) -> None:
        """Add the inputs `x` (P, T, I) of one layer."""
        first = self._first.setdefault(layer, next(name for name in inputs if inputs[name] is inputs[layer]))
        free = (owners < 0).flatten(1).all(dim=1)  # (P,)
        weights = torch.where(free, self.free_weight, 1.0)[:, None].expand(x.shape[:2]).flatten()  # (P·T,)
        flat = x.float().flatten(0, 1)
        if first == layer:
            self._moments[layer] = (flat * weights[:, None]).T @ flat + self._moments.get(layer, 0)
        rows, acts = self.teacher.rows(owners)
        branches, numbers = self.teacher.branches(layer, self.shape(layer))
        at_rows = flat[rows] * weights[rows, None]
        self._cross[layer] = at_rows.T @ ((flat[rows] @ branches.down.T) * acts[:, numbers]) + self._cross.get(layer, 0)

    def shape(self, layer: str) -> tuple[int, int]:
        lora = self.student.loras[layer]
        return lora.up.shape[0], lora.down.shape[1]

    @torch.no_grad()
    def solve(self, loss: Callable[[], float], on_progress: OnProgress) -> None:
        """Set the student's factors, as many of its ranks as the answer has; the others start as without it.

        Layers that are solved apart may not fit together: where `loss` is not lower than without, all start as
        without. `on_progress(done, total)` counts layers, and the two losses.
        """
        parameters, total = self.student.parameters(), len(self._cross) + 2
        on_progress(0, total)
        before, fresh = loss(), {name: parameter.clone() for name, parameter in parameters.items()}
        numbers = count(1)
        for first, layers in groupby(self._cross, self._first.__getitem__):
            factor = ridge_factor(self._moments[first])  # of inputs that these layers share, as all keys and values do
            for layer in layers:
                on_progress(next(numbers), total)
                lora, (branches, _) = self.student.loras[layer], self.teacher.branches(layer, self.shape(layer))
                best = least_squares_delta(branches.up, self._cross[layer], factor, lora.up.shape[1])
                # `down` as large as a fresh one, so that learning rates mean the same to both.
                sizes = (best.down.norm(dim=1) / lora.down.norm(dim=1).mean()).clamp(min=1e-12)  # (rank,)
                lora.down[: best.rank] = best.down / sizes[:, None]
                lora.up[:, : best.rank] = best.up * sizes
        on_progress(total - 1, total)
        if loss() >= before:
            for name, parameter in parameters.items():
                parameter.copy_(fresh[name])
