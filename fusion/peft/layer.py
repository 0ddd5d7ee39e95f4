"""A linear layer, or a convolution, with spectral adapters beside it: y = W x + Σ strength · ΔW x.

Shapes: O out_features, I in_features, R slice length, Q rank of a delta, B batch. A convolution's weight is the matrix
(O, I·K) of the K cells of its kernel.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fusion.adapters.layer import AdapterLayer
from fusion.errors import BaseMismatch, ConfigError
from fusion.formats.adapter_file import tensor_shapes
from fusion.models.base_check import FINE_TUNE_RESIDUAL, FOREIGN_RESIDUAL
from fusion.peft.config import SpectralConfig
from fusion.peft.directions import leading_directions
from fusion.spectral.delta import Delta
from fusion.spectral.spectrum import Spectrum, residual

BASE_MODEL = "__base__"  # PEFT's word in `adapter_names` for rows that no adapter changes
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Without the stored directions only singular values can be compared. Half precision moves them by 1e-4.
_FOREIGN_SINGULAR_VALUES = 5e-3


def check_supported(module: nn.Module, name: str, **quantization: Any) -> None:
    """Raise ConfigError, in one line, for a module whose weight is no matrix in floating point."""
    if isinstance(module, SpectralLinear):
        return
    if isinstance(module, BaseTunerLayer):
        raise ConfigError(f"{name} already has an adapter of another PEFT method; merge that first, or use two models.")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise ConfigError(f"{name} is part of nn.MultiheadAttention, which reads its weight and never calls it.")
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros"):
        raise ConfigError(f"{name} is a convolution in groups, or not padded by zeros, which is not supported.")
    backend = resolve_quantization_backend(module, **quantization)
    if backend is not None and not backend.backend_name.startswith("bnb"):
        raise ConfigError(f"{name} is quantised by {backend.backend_name}; of those only bitsandbytes is supported.")
    if not isinstance(module, nn.Linear | nn.Conv2d | Conv1D):
        raise ConfigError(
            f"{name} is of type {type(module).__name__}; spectral adapters change linear layers and Conv2d."
        )
    if backend is None and module.weight.dtype not in _FLOATS:
        raise ConfigError(
            f"{name} has a weight of {module.weight.dtype}, whose scale is not known; load it as bfloat16."
        )


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(O, I) of a supported module's weight, packed or not."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features
    weight: Tensor = base.weight  # pyright: ignore[reportAssignmentType]
    matrix = weight.T if isinstance(base, Conv1D) else weight.flatten(1)
    return matrix.shape[0], matrix.shape[1]


class SpectralLinear(nn.Module, BaseTunerLayer):  # PEFT finds layers for a second adapter by "Linear" in their class
    adapter_layer_names = ("spectral_layers",)
    other_param_names = ("strengths",)

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.spectral_layers = nn.ModuleDict()  # adapter -> AdapterLayer: its parameters, and its basis as buffers
        self.strengths: dict[str, float] = {}
        self._disable_adapters, self.merged_adapters = False, []
        self._unmerged_weight: Tensor | None = None
        self._unchecked: dict[str, SpectralConfig] = {}  # adapters whose tensors come from a file

    def matrix(self) -> Tensor:
        """The base's weight (O, I) in float32, dequantised."""
        weight = self.get_base_weight() if self._unmerged_weight is None else self._unmerged_weight
        weight = weight.detach().float()
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight.flatten(1)

    def update_layer(self, adapter_name: str, config: SpectralConfig, name: str = "this layer") -> None:
        """Add an adapter: fresh, or with places for the tensors of a file."""
        if config.basis != "file" and (self.weight.is_meta or not self.weight.numel()):
            raise ConfigError(
                f"{name} has no weight here now (offloaded or sharded) to decompose; load the model whole."
            )
        layer = self._blank(config) if config.basis == "file" else None
        if layer is None or (_has_unsaved_buffers(layer) and not config.inference_mode):
            layer = self._fresh(config)
        self.spectral_layers[adapter_name] = layer
        self.strengths[adapter_name] = 1.0
        if config.basis != "fresh":
            self._unchecked[adapter_name] = config
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _fresh(self, config: SpectralConfig) -> AdapterLayer:
        weight, kind = self.matrix(), config.layer_class
        depth = max(config.directions.stop, config.guard)
        spectrum = leading_directions(weight, depth) if kind.slice_of == "spectrum" else None
        return kind.fresh(weight, config.directions, spectrum=spectrum, options=config.options)

    def _blank(self, config: SpectralConfig) -> AdapterLayer:
        """A layer whose tensors are NaN until those of a file replace them. Without an SVD."""
        sizes = dict(zip("OI", weight_shape(self.get_base_layer()), strict=True)) | {"R": config.r}
        device = "cpu" if self.weight.is_meta else self.weight.device
        return config.layer_class.from_tensors(
            {
                tensor: torch.full([sizes[letter] for letter in letters], float("nan"), device=device)
                for tensor, letters in tensor_shapes(config.adapter_type).items()
            }
        )

    def adapter_layer(self, adapter_name: str) -> AdapterLayer:
        layer = self.spectral_layers[adapter_name]
        assert isinstance(layer, AdapterLayer)
        return layer

    def strongest(self, rank: int) -> Tensor:
        """The largest singular values of the base's weight, (R,)."""
        return leading_directions(self.matrix(), rank).S

    def check_basis(self, name: str, config: SpectralConfig, tensors: dict[str, Tensor]) -> None:
        """Compare a stored basis with the base's weight, as `fusion.attach` does: BaseMismatch, or a warning."""
        S = tensors.get("basis.S")
        if S is None or self.weight.is_meta:
            return
        if "basis.U" in tensors:
            basis, limit = Spectrum(tensors["basis.U"], S, tensors["basis.V"]), FOREIGN_RESIDUAL
            error = residual(self.matrix(), Spectrum(*(part.float() for part in basis)))
        else:
            ours = leading_directions(self.matrix(), config.directions.stop).S[config.directions.start :]
            error = float((ours - S.to(ours)).norm() / S.float().norm().clamp(min=1e-12))
            limit = _FOREIGN_SINGULAR_VALUES
        if not error <= limit:
            raise BaseMismatch(
                f"The adapter was trained on another base: at {name} the residual is {error:.3g} (limit {limit}). "
                "Load it onto the base that its adapter_config.json names."
            )
        if error > FINE_TUNE_RESIDUAL:
            warnings.warn(
                f"The adapter was trained on a relative of this base (residual {error:.3f} at {name}, same base < "
                f"{FINE_TUNE_RESIDUAL}); results may differ.",
                stacklevel=2,
            )

    def mark_checked(self, adapter_name: str) -> None:
        self._unchecked.pop(adapter_name, None)

    def _check_loaded(self) -> None:
        """At the first use, for programs that load tensors in ways of their own."""
        for name, config in list(self._unchecked.items()):
            if name in self.spectral_layers:
                tensors = self.spectral_layers[name].state_dict()
                if any(bool(tensor.isnan().any()) for tensor in tensors.values()):
                    raise ConfigError(
                        f"Adapter '{name}' has the config of a saved adapter and not its tensors; load it with "
                        "PeftModel.from_pretrained or load_adapter, or set basis = 'fresh' for a new one."
                    )
                self.check_basis("a layer", config, tensors)
            del self._unchecked[name]

    def delta(self, adapter_name: str, dtype: torch.dtype | None = None) -> Delta:
        """ΔW of one adapter with its strength; worked out in the adapter's precision, whatever autocast is on."""
        layer = self.adapter_layer(adapter_name)
        with torch.autocast(self.weight.device.type, enabled=False):
            return (layer.delta() * self.strengths[adapter_name]).to(self.weight.device, dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW in the shape of the base's weight. PEFT's conversions call it."""
        dense = self.delta(adapter_name).dense()
        base = self.get_base_layer()
        if isinstance(base, nn.Conv2d):
            return dense.reshape(base.weight.shape)
        return dense.T if isinstance(base, Conv1D) else dense

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self._unchecked and not torch.compiler.is_compiling():
            self._check_loaded()
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._routed(x, y, adapter_names)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.spectral_layers:
                y = y + self._change(x, name).to(y.dtype)
        return y

    def _routed(self, x: Tensor, y: Tensor, adapter_names: list[str]) -> Tensor:
        """Row i of a batch with the adapter adapter_names[i] alone."""
        if len(adapter_names) != len(x):
            raise ConfigError(f"adapter_names has {len(adapter_names)} names, but the batch {len(x)} rows.")
        if self.merged:
            raise ConfigError("adapter_names cannot be used while adapters are merged; call unmerge_adapter first.")
        for name in dict.fromkeys(adapter_names):
            if name in self.spectral_layers:
                rows = torch.tensor([i for i, row in enumerate(adapter_names) if row == name], device=x.device)
                y = y.index_add(0, rows, self._change(x[rows], name).to(y.dtype))
        return y

    def _change(self, x: Tensor, adapter_name: str) -> Tensor:
        """ΔW x through its factors, never as an (O, I) matrix."""
        delta, base = self.delta(adapter_name, x.dtype), self.get_base_layer()
        if isinstance(base, nn.Conv2d):
            kernel = delta.down.reshape(-1, *base.weight.shape[1:])  # (Q, I, k, k)
            inner = F.conv2d(x, kernel, None, base.stride, base.padding, base.dilation)
            return F.conv2d(inner, delta.up[:, :, None, None])
        return F.linear(F.linear(x, delta.down), delta.up)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW to the base's weight. The weight itself is kept beside it, so that `unmerge` is exact.

        Raises ConfigError on a quantised weight, which would have to be rounded again.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spectral_layers]
        if names and self.quantization_backend is not None:
            raise ConfigError(
                "A quantised weight would have to be rounded again to take an adapter in; call model.dequantize() and "
                "load the adapter there, or leave it unmerged."
            )
        self._check_loaded()
        weight = self.weight
        for name in names:
            merged = weight.data.float() + self.get_delta_weight(name).detach()
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            if self._unmerged_weight is None:
                self._unmerged_weight = weight.data
            weight.data = merged.to(weight.dtype)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        if self._unmerged_weight is not None:
            self.get_base_layer().weight.data, self._unmerged_weight = self._unmerged_weight, None
            self.merged_adapters.clear()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's strength; ΔW is linear in it. diffusers' `set_adapters` calls it."""
        if adapter in self.strengths:
            self.strengths[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        for name in self.active_adapters:
            if name in self.strengths:
                self.strengths[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for name in self.active_adapters:
            if name in self.strengths:
                self.strengths[name] = 1.0 if scale is None else self.strengths[name] / scale

    def __repr__(self) -> str:
        return "spectral." + super().__repr__()


def _has_unsaved_buffers(layer: AdapterLayer) -> bool:
    """Whether training needs tensors that are in no file, as a guard is."""
    return not {name for name, _ in layer.named_buffers()} <= {*layer.state_dict()}
