"""Whether an adapter fits a base: its layers, their shapes, and the stored basis compared with the weights."""

import logging
import math
import weakref
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fusion.adapters.adapter import Adapter, float32
from fusion.adapters.layer import AdapterLayer, SpectralLayer
from fusion.errors import BaseMismatch
from fusion.models.layer_sites import Site, all_sites, matrix
from fusion.models.pipeline import Pipeline
from fusion.progress import units
from fusion.spectral.spectrum import Spectrum, residual

logger = logging.getLogger(__name__)

FINE_TUNE_RESIDUAL = 0.02  # above it, the base is taken for a fine-tune of the adapter's own
FOREIGN_RESIDUAL = 0.3  # above it, for another base
_OPEN = "Open its own base (--base)."
_OTHER_BASE = "_spectral_fusion_other_base"  # attribute of a pipeline whose user wants adapters of other bases


class PassedChecks:
    """The largest residuals of adapters that fit a base, for as long as its weights are the same."""

    def __init__(self) -> None:
        self._weights: dict[str, tuple[weakref.ref[Tensor], int, torch.dtype, torch.device]] = {}
        self._residuals: dict[str, tuple[float, str]] = {}  # adapter's digest -> residual and layer

    def residual(self, digest: str, weights: Mapping[str, Tensor]) -> tuple[float, str] | None:
        """What is remembered of this adapter; None where one of its weights is another tensor now, or has changed."""
        for name, weight in weights.items():
            if name in self._weights:
                reference, *properties = self._weights[name]
                if reference() is not weight or properties != [weight._version, weight.dtype, weight.device]:
                    self._weights, self._residuals = {}, {}
        return self._residuals.get(digest)

    def remember(self, digest: str, weights: Mapping[str, Tensor], residual: tuple[float, str]) -> None:
        for name, weight in weights.items():
            self._weights[name] = weakref.ref(weight), weight._version, weight.dtype, weight.device
        self._residuals[digest] = residual


def allow_other_bases(pipe: Pipeline) -> None:
    """Let adapters of any base be attached to this pipeline, if their layers have its shapes; a warning names them."""
    setattr(pipe, _OTHER_BASE, True)


def check_base(pipe: Pipeline, adapter: Adapter, passed: PassedChecks | None = None) -> None:
    """Compare every layer's stored basis with the pipeline's weights; once, where `passed` knows that it fits.

    Silent below a residual of 0.02, a warning below 0.3, BaseMismatch above (another warning after
    `allow_other_bases`), or where layers are missing or differ in shape. Types without a basis are checked by shape.
    """
    table, trained_on = all_sites(pipe), _trained_on(adapter)
    for name in adapter.layer_names:
        if name not in table:
            raise BaseMismatch(
                f"'{adapter.info.name}' changes {name}, which this base does not have. {trained_on} {_OPEN}"
            )
    weights: dict[str, Tensor] = {name: table[name].module.weight for name in adapter.layer_names}  # pyright: ignore
    cacheable = passed is not None and not any(weight.is_inference() for weight in weights.values())
    worst = passed.residual(adapter.digest(), weights) if passed and cacheable else None
    if worst is None:
        worst = _largest_residual(adapter, table)
        if passed and cacheable:
            passed.remember(adapter.digest(), weights, worst)
    if worst[0] > FOREIGN_RESIDUAL:
        if math.isinf(worst[0]) or not getattr(pipe, _OTHER_BASE, False):
            raise BaseMismatch(
                f"'{adapter.info.name}' does not fit this base: residual {worst[0]:.2f} at {worst[1]} (limit "
                f"{FOREIGN_RESIDUAL}). {trained_on} --other_base uses it all the same."
            )
        logger.warning(
            "'%s' was trained on another base (residual %.2f at %s, limit %s), which --other_base allows; pictures may "
            "have little of its concept. %s", adapter.info.name, *worst, FOREIGN_RESIDUAL, trained_on,
        )  # fmt: skip
    elif worst[0] > FINE_TUNE_RESIDUAL:
        logger.warning(
            "'%s' was trained on a relative of this base (residual %.3f at %s, same base < %s); results may differ. %s",
            adapter.info.name, *worst, FINE_TUNE_RESIDUAL, trained_on,
        )  # fmt: skip


def with_base_weights(pipe: Pipeline, adapter: Adapter) -> Adapter:
    """The adapter with the pipeline's weights in the layers whose change depends on them (DoRA).

    Raises BaseMismatch where it does not fit.
    """
    if not adapter.needs_base:
        return adapter
    check_base(pipe, adapter)
    table = all_sites(pipe)
    return replace(adapter, branches=tuple(replace(b, layers=_on_weights(b.layers, table)) for b in adapter.branches))


def _on_weights(layers: Mapping[str, AdapterLayer], table: Mapping[str, Site]) -> dict[str, AdapterLayer]:
    return {
        name: float32(layer).on(matrix(table[name]).float()) if layer.needs_base else layer
        for name, layer in layers.items()
    }


def _largest_residual(adapter: Adapter, table: Mapping[str, Site]) -> tuple[float, str]:
    """The largest residual and its layer. Raises BaseMismatch for other shapes."""
    worst = 0.0, ""
    for branch in adapter.branches:
        for name, layer in units("comparing the adapter's layers with the base", list(branch.layers.items())):
            weight = matrix(table[name])
            if weight.is_meta:
                raise BaseMismatch(
                    f"{name} has no weight here now, as under sequential offloading; load the pipeline without it, or "
                    "use enable_model_cpu_offload()."
                )
            basis = layer.basis.spectrum() if isinstance(layer, SpectralLayer) else None
            with torch.no_grad():
                shape = (len(basis.U), len(basis.V)) if basis else layer.shape
            if tuple(weight.shape) != shape:
                raise BaseMismatch(
                    f"'{adapter.info.name}' does not fit this base: {name} is {tuple(weight.shape)} here and {shape} "
                    f"in the adapter. {_trained_on(adapter)} {_OPEN}"
                )
            if basis:
                worst = max(worst, (residual(weight, Spectrum(*(t.float() for t in basis))), name))
    return worst


def _trained_on(adapter: Adapter) -> str:
    base = adapter.info.base
    name = f"{base.name} ({base.family})" if base and base.name != "unnamed" else base and f"a base of {base.family}"
    return f"It was trained on {name}." if name else "Its base is not known."
