"""The tuner that PEFT injects: which layers get an adapter, which slice it owns, and what its file holds."""

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers.utils import logging

from fusion.errors import BaseMismatch, ConfigError, FormatError, FusionError, SliceConflict, UnknownName, closest
from fusion.peft.config import SpectralConfig
from fusion.peft.layer import BASE_MODEL, SpectralLinear, check_supported, weight_shape
from fusion.spectral.slices import free_slice

_SILENCE = 2  # seconds until a bar is shown
_LAYERS = "spectral_layers"


class SpectralModel(BaseTuner):
    """Spectral adapters in any model: `get_peft_model(model, SpectralConfig(...))` makes one."""

    prefix = "spectral_"
    tuner_layer_cls = SpectralLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    _bar: Any = None  # counts layers whose directions are computed

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; with a bar where it takes a while, unless transformers' bars are disabled."""
        try:
            super().inject_adapter(model, *args, **kwargs)
        finally:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def _prepare_adapter_config(self, peft_config: SpectralConfig, model_config: dict[str, Any]) -> SpectralConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _prepare_model(self, peft_config: SpectralConfig, model: nn.Module) -> None:
        """Check every targeted layer and find a slice, before the first layer is changed."""
        _maybe_include_all_linear_layers(peft_config, model)
        targets = self._targets(peft_config, model)
        try:
            for name, module in targets.items():
                check_supported(module, name, **get_quantization_kwargs(model))
            if targets and peft_config.layer_class.slice_of is not None:
                self._own_slice(peft_config, {name: weight_shape(module) for name, module in targets.items()})
        except FusionError:
            for name in [name for name, config in self.peft_config.items() if config is peft_config]:
                del self.peft_config[name]  # transformers and diffusers would keep it
            raise
        if peft_config.basis != "file" and peft_config.layer_class.slice_of == "spectrum":
            options: dict[str, Any] = {"total": len(targets), "delay": _SILENCE, "leave": False, "unit": " layers"}
            self._bar = logging.tqdm(desc="Computing singular directions", **options)

    def _targets(self, config: SpectralConfig, model: nn.Module) -> dict[str, nn.Module]:
        wrapped = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        return {
            name: module
            for name, module in model.named_modules()
            if name and not name.startswith(wrapped) and self._check_target_module_exists(config, name)
        }

    def _own_slice(self, config: SpectralConfig, shapes: dict[str, tuple[int, int]]) -> None:
        others = [other for other in self.peft_config.values() if isinstance(other, SpectralConfig)]
        if sum(other is config for other in others) > 1:
            raise ConfigError("Two adapters cannot share one SpectralConfig; make one for each.")
        others = [other for other in others if other is not config]
        of_spectrum = config.layer_class.slice_of == "spectrum"
        widths = {name: min(shape) if of_spectrum else shape[1] for name, shape in shapes.items()}
        narrowest = min(widths, key=widths.__getitem__)
        if config.slice is None:
            rivals = [other for other in others if other.layer_class.slice_of == config.layer_class.slice_of]
            slices = [other.directions for other in rivals if other.slice is not None]
            config.slice = free_slice(slices, config.r, capacity=widths[narrowest]).start // config.r
        elif shared := config.overlapping(others):
            owns = f"an adapter of this model owns (directions {shared[0].directions})"
            if config.basis == "fresh":
                raise SliceConflict(
                    f"Slice {config.slice} is one that {owns}; leave `slice` out to get the next free one."
                )
            warnings.warn(
                f"Slice {config.slice} is one that {owns}; active together, they disturb each other.", stacklevel=2
            )
        config.directions.check_fits(widths[narrowest], narrowest)

    def _create_and_replace(
        self,
        peft_config: SpectralConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SpectralLinear):
            layer = target
        else:
            layer = SpectralLinear(target, **get_quantization_kwargs(self.model))
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, peft_config, current_key)
        if self._bar is not None:
            self._bar.update()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None]:
        """`adapter_names`: one adapter, or "__base__", for each row of the batch."""
        names: Sequence[str] | None = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ConfigError("adapter_names is for inference; call model.eval() first.")
        if unknown := sorted({*names} - {BASE_MODEL, *self.peft_config}):
            known = f"{closest(unknown[0], self.peft_config)} There are: {', '.join(self.peft_config)}."
            raise UnknownName(f"No adapter is called '{unknown[0]}'{known}")
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in names for _ in range(beams)]  # generate() repeats every row of the decoder
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        encoding = {*encoder.modules()} if encoder is not None and encoder is not self.model else set[nn.Module]()
        hooks = [
            module.register_forward_pre_hook(
                partial(_with_adapter_names, list(names) if module in encoding else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, SpectralLinear | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def add_weighted_adapter(self, *args: object, **kwargs: object) -> None:
        raise ConfigError(
            "Spectral adapters are not averaged. Activate several with base_model.set_adapter([...]), which adds their "
            "changes, or save each as a LoRA and average those."
        )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SpectralConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.save_basis:
            return state
        # Singular values stay: they show whether it is the same base.
        return {key: value for key, value in state.items() if not key.endswith((".basis.U", ".basis.V"))}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if f".{_LAYERS}.{adapter_name}." in key:  # basis.U is one level deeper than PEFT looks
            return key.replace(f".{_LAYERS}.{adapter_name}.", f".{_LAYERS}.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SpectralConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compare the file with the model before a tensor is loaded.

        A basis that was not stored stays as it was computed here. Raises FormatError where tensors are missing,
        BaseMismatch where shapes or the basis do not fit.
        """
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for path, layer in model.named_modules():
            if not isinstance(layer, SpectralLinear) or adapter_name not in layer.spectral_layers:
                continue
            prefix = f"{path}.{_LAYERS}.{adapter_name}."
            expected = layer.spectral_layers[adapter_name].state_dict()
            tensors = {name: state[prefix + name] for name in expected if prefix + name in state}
            optional = set[str]() if config.save_basis else {"basis.U", "basis.V"}
            if missing := sorted({*expected} - {*tensors} - optional):
                raise FormatError(f"The saved adapter lacks {missing[0]} of {path}.")
            for name, tensor in tensors.items():
                if tensor.shape != expected[name].shape:
                    raise BaseMismatch(
                        f"The adapter does not fit this base: {name} of {path} is {tuple(expected[name].shape)} here "
                        f"and {tuple(tensor.shape)} in the file."
                    )
            layer.check_basis(path, config, tensors)
            layer.mark_checked(adapter_name)
            state |= {prefix + name: expected[name] for name in optional & {*expected}}
        return state


def _with_adapter_names(
    names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}
