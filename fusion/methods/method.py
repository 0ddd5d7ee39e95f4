"""The contract of all fusion methods: the changes several adapters make to one weight become one change.

Shapes: N adapters, O out_features, I in_features.
"""

from __future__ import annotations  # the table of methods loads no torch

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

from fusion.config import MAX_SEED
from fusion.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.spectral.delta import Delta
    from fusion.spectral.moments import Moment


@dataclass(frozen=True)
class MethodOptions:
    """The options of all methods; each reads its own."""

    density: float = field(default=0.2, metadata={"help": "ties, dare, magnitude_prune, knots: share of numbers kept"})
    seed: int = field(default=0, metadata={"help": "dare: which numbers are kept; distill: prompts and start"})
    neutral: float = field(default=1.0, metadata={"help": "regression, gradient: weight of inputs to be left alone"})
    ridge: float = field(
        default=1e-4, metadata={"help": "regression, gradient: pull to no change, in mean squares of inputs"}
    )
    iterations: int = field(default=500, metadata={"help": "gradient: of LBFGS"})

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError(f"density is a share, above 0 and at most 1; got {self.density}.")
        if not (0 <= self.neutral <= 1e6 and 0 < self.ridge <= 1e6 and 1 <= self.iterations <= 1_000_000):
            raise ConfigError(
                f"neutral is 0 to 1e6, ridge above 0 and at most 1e6, iterations 1 to 1000000; got {self.neutral}, "
                f"{self.ridge} and {self.iterations}."
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed is 0 to {MAX_SEED}; got {self.seed}.")


@dataclass(frozen=True)
class MergeContext:
    """What a merge may use beside the changes and their strengths."""

    layer: str
    moments: Sequence[Moment | None] = ()  # one for each adapter, for methods that need them; None: no inputs here
    options: MethodOptions = MethodOptions()


@dataclass(frozen=True)
class Method:
    """A row of METHODS: the function of the method, and what holds for it.

    Contract, tested for every row: the order of adapters does not matter, equal inputs give equal bits, the shape of
    ΔW is kept, strengths of zero give no change, inputs are left alone; and what the fields below say.
    """

    function: Callable[..., Any]
    about: str  # half a line for help
    linear: bool = False  # in the strengths, and in the changes
    moments: bool = False  # needs the second moments of the inputs, so a base to record them on
    idle_counts: bool = False  # an adapter of strength 0 still changes the result

    @property
    def needs_base(self) -> bool:
        """Whether the base has to be run."""
        return self.moments

    def __call__(
        self,
        layer: str,
        deltas: Sequence[Delta],
        strengths: Sequence[float],
        *,
        moments: Sequence[Moment | None] = (),
        options: MethodOptions = MethodOptions(),
    ) -> Delta:
        """The changes of one layer, and their strengths in the same order, as one change."""
        return self.merge(deltas, strengths, MergeContext(layer, moments, options))

    def merge(self, deltas: Sequence[Delta], strengths: Sequence[float], context: MergeContext) -> Delta:
        raise NotImplementedError


class LayerMerge(Method):
    """Any method that works layer by layer: `function(deltas, strengths, context) -> Delta`."""

    def merge(self, deltas: Sequence[Delta], strengths: Sequence[float], context: MergeContext) -> Delta:
        return self.function(deltas, strengths, context)


class WeightedSum(Method):
    """ΔW = Σ weightᵢ ΔWᵢ with the same weights in all layers: `function(strengths, gram) -> weights`.

    It can be carried out on whole adapters, branch by branch: types, bases and gates stay as they are, exactly.
    """

    def weights(self, strengths: Sequence[float], gram: Callable[[], Tensor]) -> Sequence[float]:
        """`gram()`: inner products of the changes (N, N), summed over all layers, computed when a method needs them."""
        return self.function(strengths, gram)

    def merge(self, deltas: Sequence[Delta], strengths: Sequence[float], context: MergeContext) -> Delta:
        from fusion.spectral.interference import gram

        weights = self.weights(strengths, lambda: gram(deltas))
        return reduce(add, (delta * weight for delta, weight in zip(deltas, weights, strict=True)))


class AdapterMerge(Method):
    """A method that works on whole gated adapters and their base, as `fusion.distillation` carries it out.

    `function(errors, scales)` is the loss that it minimises.
    """

    @property
    def needs_base(self) -> bool:
        return True

    def merge(self, deltas: Sequence[Delta], strengths: Sequence[float], context: MergeContext) -> Delta:
        raise ConfigError("This method works on whole adapters, not on the changes of one layer: call fuse().")
