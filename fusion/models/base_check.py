"""Whether an adapter fits a base: its layers, their shapes, and the stored basis held against the weights."""

import logging

import torch

from fusion.adapters.adapter import Adapter
from fusion.adapters.layer import SpectralLayer
from fusion.errors import BaseMismatch
from fusion.models.layer_sites import matrix, sites
from fusion.models.pipeline import Pipeline
from fusion.spectral.spectrum import Spectrum, residual

logger = logging.getLogger(__name__)

FINE_TUNE_RESIDUAL = 0.02  # above it, the base is taken for a fine-tune of the adapter's own
FOREIGN_RESIDUAL = 0.3  # above it, for another base


def check_base(pipe: Pipeline, adapter: Adapter) -> None:
    """Compare every layer's stored basis with the pipeline's weights.

    Silent below a residual of 0.02, a warning below 0.3, BaseMismatch above, or where layers are missing or differ in
    shape. Types without a basis are checked by shape.
    """
    found, worst, where = sites(pipe), 0.0, ""
    trained_on = f"It was trained on {adapter.info.base.name}." if adapter.info.base else "Its base is not known."
    for branch in adapter.branches:
        for name, layer in branch.layers.items():
            if name not in found:
                raise BaseMismatch(f"'{adapter.info.name}' changes {name}, which this base does not have. {trained_on}")
            weight = matrix(found[name])
            if weight.is_meta:
                raise BaseMismatch(
                    f"{name} has no weight here now, as under sequential offloading; load the pipeline without it, or "
                    "use enable_model_cpu_offload()."
                )
            basis = layer.basis.spectrum() if isinstance(layer, SpectralLayer) else None
            with torch.no_grad():
                shape = (len(basis.U), len(basis.V)) if basis else layer.delta().shape
            if tuple(weight.shape) != shape:
                raise BaseMismatch(
                    f"'{adapter.info.name}' does not fit this base: {name} is {tuple(weight.shape)} here and {shape} "
                    f"in the adapter. {trained_on}"
                )
            if basis:
                distance = residual(weight, Spectrum(*(t.float() for t in basis)))
                worst, where = max((worst, where), (distance, name))
    if worst > FOREIGN_RESIDUAL:
        raise BaseMismatch(
            f"'{adapter.info.name}' does not fit this base: residual {worst:.2f} at {where}, limit {FOREIGN_RESIDUAL}. "
            f"{trained_on}"
        )
    if worst > FINE_TUNE_RESIDUAL:
        logger.warning(
            "'%s' was trained on a relative of this base (residual %.3f at %s, same base < %s); results may differ. %s",
            adapter.info.name, worst, where, FINE_TUNE_RESIDUAL, trained_on,
        )  # fmt: skip
