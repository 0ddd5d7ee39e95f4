"""Adapter types: trainable changes to one weight. A new type is one file and one line here."""

from fusion.adapters.additive import AdditiveLayer
from fusion.adapters.core import CoreLayer, SingularValuesLayer
from fusion.adapters.guarded import GuardedAdditiveLayer
from fusion.adapters.layer import AdapterLayer
from fusion.adapters.lora import LoraLayer
from fusion.adapters.orthogonal import OrthogonalLayer
from fusion.adapters.rotational import RotationalLayer

ADAPTERS: dict[str, type[AdapterLayer]] = {
    "additive": AdditiveLayer,  # Spectral Adapter^A    arXiv 2405.13952
    "guarded": GuardedAdditiveLayer,  # additive, off the reserved directions
    "rotational": RotationalLayer,  # Spectral Adapter^R    arXiv 2405.13952
    "core": CoreLayer,  # LoRA-XS on a slice    arXiv 2405.17604
    "singular_values": SingularValuesLayer,  # SVDiff on a slice     arXiv 2303.11305
    "lora": LoraLayer,  # LoRA                  arXiv 2106.09685; also merged and imported adapters
    "orthogonal": OrthogonalLayer,  # Orthogonal Adaptation arXiv 2312.02432
}
