"""Adapters into a base's own weights and vocabulary: one-way."""

import torch

from fusion.adapters.adapter import Adapter
from fusion.errors import FusionError, GatingError
from fusion.models.attachment import _baked, _installations, effective_gates
from fusion.models.base_check import check_base
from fusion.models.layer_sites import components, sites
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import model_of
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
    if any(set(here.parts.values()) & set(components(pipe).values()) for here in _installations.values()):
        raise FusionError("Adapters are attached to this pipeline; detach them before baking.")
    done, digest = _baked.setdefault(model_of(pipe), set()), adapter.digest()
    if digest in done:
        raise FusionError(f"'{adapter.info.name}' is baked into this pipeline already; a second time would double it.")
    check_base(pipe, adapter)
    found = sites(pipe)
    make_permanent(pipe, adapter.info.concepts, adapter.tokens)
    with torch.no_grad():
        for name, delta in adapter.deltas().items():
            weight = found[name].module.weight
            assert isinstance(weight, torch.Tensor)
            changed = weight.float() + delta.to(weight.device).dense().reshape(weight.shape)
            weight.copy_(changed)
    done.add(digest)
