"""Adapter types: changes to one weight. A new type is one file and one line here."""

from fusion.adapters.additive import AdditiveLayer
from fusion.adapters.core import CoreLayer, SingularValuesLayer
from fusion.adapters.guarded import GuardedAdditiveLayer
from fusion.adapters.imported import ImportedLayer
from fusion.adapters.layer import AdapterLayer
from fusion.adapters.locon import LoconLayer
from fusion.adapters.loha import LohaLayer
from fusion.adapters.lokr import LokrLayer
from fusion.adapters.lora import LoraLayer
from fusion.adapters.orthogonal import OrthogonalLayer
from fusion.adapters.rotational import RotationalLayer

# Types that can be trained.
ADAPTERS: dict[str, type[AdapterLayer]] = {
    "additive": AdditiveLayer,  # Spectral Adapter^A    arXiv 2405.13952
    "guarded": GuardedAdditiveLayer,  # additive, off the reserved directions
    "rotational": RotationalLayer,  # Spectral Adapter^R    arXiv 2405.13952
    "core": CoreLayer,  # LoRA-XS on a slice    arXiv 2405.17604
    "singular_values": SingularValuesLayer,  # SVDiff on a slice     arXiv 2303.11305
    "lora": LoraLayer,  # LoRA                  arXiv 2106.09685; also merged and imported adapters
    "orthogonal": OrthogonalLayer,  # Orthogonal Adaptation arXiv 2312.02432
}

# Types of other programs' files, which are not trained here. Each can also be a DoRA.
IMPORTED_TYPES: dict[str, type[ImportedLayer]] = {
    "locon": LoconLayer,  # LoRA with a kernel in the middle, or as a DoRA    arXiv 2309.14859, 2402.09353
    "loha": LohaLayer,  # Hadamard product      arXiv 2108.06098
    "lokr": LokrLayer,  # Kronecker product     arXiv 2212.10650
}
LAYER_TYPES: dict[str, type[AdapterLayer]] = {**ADAPTERS, **IMPORTED_TYPES}  # all that adapters in files can have
