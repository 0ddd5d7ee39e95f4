"""Spectral adapters as a method of PEFT: for language models, and wherever PEFT is used.

    from fusion.peft import SpectralConfig
    model = peft.get_peft_model(model, SpectralConfig(r=8))

Importing this module makes PEFT know the method, by entries in its tables; PEFT loads no method by itself.
"""

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from fusion.peft.config import SPECTRAL, SpectralConfig
from fusion.peft.conversion import add_native_adapter, save_as_lora, to_adapter
from fusion.peft.layer import SpectralLinear
from fusion.peft.learning_rates import parameter_groups
from fusion.peft.model import SpectralModel

__all__ = [
    "SpectralConfig",
    "SpectralLinear",
    "SpectralModel",
    "add_native_adapter",
    "parameter_groups",
    "save_as_lora",
    "to_adapter",
]

if SPECTRAL not in PEFT_TYPE_TO_CONFIG_MAPPING:  # a later PEFT may bring the method
    PEFT_TYPE_TO_CONFIG_MAPPING[SPECTRAL] = SpectralConfig  # pyright: ignore[reportArgumentType]
    PEFT_TYPE_TO_TUNER_MAPPING[SPECTRAL] = SpectralModel  # pyright: ignore[reportArgumentType]
    PEFT_TYPE_TO_PREFIX_MAPPING[SPECTRAL] = SpectralModel.prefix  # pyright: ignore[reportArgumentType]
