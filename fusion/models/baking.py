"""Adapters into a base's own weights and vocabulary: one-way."""

import torch

from fusion.adapters.adapter import Adapter
from fusion.errors import FusionError, GatingError
from fusion.models.attachment import effective_gates
from fusion.models.base_check import check_base
from fusion.models.layer_sites import sites
from fusion.models.model_state import attached_state, state_of
from fusion.models.pipeline import Pipeline
from fusion.models.tokens import make_permanent


def bake(pipe: Pipeline, adapter: Adapter, gating: str | None = None) -> None:
    """Add an adapter into the base's own weights and vocabulary. One-way; `pipe.save_pretrained` keeps it.

    Raises GatingError for a gated adapter unless gating="none", since a weight cannot know which token it is given;
    FusionError if this adapter is baked in already, or anything is attached.
    """
    if gates := dict.fromkeys(token for gate in effective_gates(adapter, gating).values() for token in gate):
        raise GatingError(
            f"'{adapter.info.name}' is gated by {', '.join(gates)}; baked weights would act on every token. Attach it "
            "instead, or accept that with gating='none'."
        )
    if attached_state(pipe) is not None:
        raise FusionError("Adapters are attached to this pipeline; detach them before baking.")
    state, digest = state_of(pipe), adapter.digest()
    if digest in state.baked:
        raise FusionError(f"'{adapter.info.name}' is baked into this pipeline already; a second time would double it.")
    check_base(pipe, adapter, state.checks)
    table = sites(pipe)
    make_permanent(pipe, adapter.info.concepts, adapter.tokens)
    with torch.no_grad():
        for name, delta in adapter.deltas().items():
            weight = table[name].module.weight
            assert isinstance(weight, torch.Tensor)
            weight.copy_(weight.float() + delta.to(weight.device).dense().reshape(weight.shape))
    state.baked.add(digest)
