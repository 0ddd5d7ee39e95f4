"""Adapters from files onto ComfyUI's MODEL and CLIP, checked before anything is changed."""

from pathlib import Path
from typing import cast

from folder_paths import get_temp_directory
from torch import Tensor

from fusion.adapters.adapter import Adapter, checked_strengths
from fusion.comfyui.attachment import Entry, attach, entries_of
from fusion.comfyui.base import Clip, ComfyBase, ModelPatcher, text_encoders
from fusion.comfyui.concept_tokenizer import ConceptTokenizer
from fusion.comfyui.mask_cells import MaskCells
from fusion.errors import TokenConflict
from fusion.formats.adapter_file import load
from fusion.layer_names import TOKENIZERS
from fusion.models.base_check import check_base, with_base_weights
from fusion.models.binding import bind
from fusion.models.pipeline import Pipeline
from fusion.models.tokens import check_concepts


def load_adapter(
    model: ModelPatcher, clip: Clip, path: str, strength: float, text_strength: float, word: str | None = None,
    mask: Tensor | None = None,
) -> tuple[ModelPatcher, Clip]:  # fmt: skip
    """Clones of MODEL and CLIP with an adapter, behind those that are loaded already.

    `word`: a token or phrase that the adapter is bound to. `mask`: (1, H, W), where it acts then. Raises what `load`
    and `bind` raise, BaseMismatch for a foreign base, TokenConflict for a token in use.
    """
    adapter = load(path)
    checked_strengths([adapter, adapter], [strength, text_strength])
    base = cast(Pipeline, ComfyBase(model, clip))
    adapter = adapter if word is None else bind(base, adapter, word)
    others = [entry.adapter for entry in entries_of(clip.patcher)]
    _check(base, clip, adapter, others)
    cells = None if mask is None else MaskCells(mask)
    model, clip = attach(model, clip, Entry(with_base_weights(base, adapter), strength, text_strength, cells))
    original = clip.tokenizer.base if isinstance(clip.tokenizer, ConceptTokenizer) else clip.tokenizer
    folder = Path(get_temp_directory()) / "spectral_fusion"
    clip.tokenizer = ConceptTokenizer(original, text_encoders(clip), [*others, adapter], folder)
    return model, clip


def _check(base: Pipeline, clip: Clip, adapter: Adapter, others: list[Adapter]) -> None:
    check_base(base, adapter)
    encoders = {component: getattr(base, component) for component in text_encoders(clip)}
    tokenizers = {component: getattr(base, TOKENIZERS[component]) for component in encoders}
    check_concepts(adapter.info.concepts, adapter.tokens, encoders, tokenizers)
    for other in others:
        if shared := sorted(other.tokens.keys() & adapter.tokens.keys()):
            raise TokenConflict(
                f"{shared[0]} is a token of '{other.info.name}' and of '{adapter.info.name}'; rename one with "
                "fusion library --rename."
            )
