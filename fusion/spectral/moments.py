"""Second moments of a layer's inputs: all that least squares and measures on inputs need of them.

They add up, so that no input is stored, and concepts can be added later without the inputs of earlier ones.

Shapes: O out_features, I in_features, Q rank of a delta.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fusion.spectral.delta import Delta


@dataclass(frozen=True)
class Moment:
    """The inputs of one layer under the prompts of one concept, in float64.

    `own` is (1/n) Σ x xᵀ over the n inputs x at which the concept's change acts, `free` the same over inputs it should
    leave alone, `floor` the mean square of all of them, the unit of the ridge.
    """

    own: Tensor  # (I, I)
    free: Tensor  # (I, I)
    floor: float

    def normal(self, neutral: float, ridge: float) -> Tensor:
        """own + neutral · free + ridge · floor · 1, (I, I): this concept's part of the normal equations."""
        whole = self.own + neutral * self.free
        whole.diagonal().add_(ridge * self.floor)
        return whole


@dataclass(frozen=True)
class Moments:
    """The moments of one concept, layer by layer. `everywhere`: it has no token, so no input is to be left alone."""

    layers: Mapping[str, Moment]
    everywhere: bool = field(default=False, kw_only=True)


def response(delta: Delta, moment: Tensor) -> Tensor:
    """‖ΔW X‖ / √n over the n inputs of `moment` C (I, I): tr(down C downᵀ · upᵀ up)^½, in float64."""
    up, down = delta.up.double(), delta.down.double()
    return ((down @ moment @ down.T) * (up.T @ up)).sum().clamp(min=0).sqrt()
