"""Guarded additive: the additive type, projected off the directions that other concepts own or may own."""

from typing import Any, Self

import torch
from torch import Tensor

from fusion.adapters.additive import AdditiveLayer, additive_delta
from fusion.adapters.layer import LayerOptions
from fusion.spectral.delta import Delta
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import Spectrum, decompose, take


class GuardedAdditiveLayer(AdditiveLayer):
    """The additive type with dU projected off guarded left directions G_U, dV off guarded right ones G_V.

        dU ← dU − G_U G_Uᵀ dU,   dV ← dV − G_V G_Vᵀ dV

    The guard is the head of the base's spectrum without the layer's slice. This removes the first-order overlap
    tr(dU₁ᵀ U₂ …) between concepts on disjoint slices; about 1e-4 of cosine is left, of second order.
    A projection is idempotent, so the state dict has the projected tensors and needs no guard.
    """

    guard_U: Tensor
    guard_V: Tensor

    def __init__(self, basis: Spectrum) -> None:
        super().__init__(basis)
        self.register_buffer("guard_U", basis.U[:, :0], persistent=False)  # (O, G)
        self.register_buffer("guard_V", basis.V[:, :0], persistent=False)  # (I, G)
        self.register_state_dict_post_hook(_save_projected)

    @classmethod
    def fresh(
        cls,
        weight: Tensor,
        directions: SpectralSlice,
        *,
        spectrum: Spectrum | None = None,
        options: LayerOptions = LayerOptions(),
    ) -> Self:
        whole = spectrum or decompose(weight)
        layer = cls(take(whole, directions))
        guarded = [i for i in range(min(options.guard, whole.S.shape[0])) if i not in directions.indices]
        index = torch.tensor(guarded, dtype=torch.long, device=whole.S.device)
        layer.guard_U, layer.guard_V = whole.U.index_select(1, index), whole.V.index_select(1, index)
        return layer

    def projected(self) -> tuple[Tensor, Tensor]:
        """dU (O, R) and dV (I, R) as they act."""
        dU = self.dU - self.guard_U @ (self.guard_U.mT @ self.dU)
        dV = self.dV - self.guard_V @ (self.guard_V.mT @ self.dV)
        return dU, dV

    def delta(self) -> Delta:
        dU, dV = self.projected()
        return additive_delta(self.basis.spectrum(), dU, self.dS, dV)


def _save_projected(layer: GuardedAdditiveLayer, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    if layer.guard_U.shape[1]:
        dU, dV = layer.projected()
        state[f"{prefix}dU"], state[f"{prefix}dV"] = dU.detach(), dV.detach()
