"""The nodes, as ComfyUI calls them."""

from pathlib import Path
from typing import Any, cast

from fusion.adapters.adapter import Adapter, checked_strengths
from fusion.comfyui.attachment import Entry, attach, entries_of
from fusion.comfyui.base import Clip, ComfyBase, ModelPatcher, text_encoders
from fusion.comfyui.concept_tokenizer import ConceptTokenizer
from fusion.errors import FormatError, TokenConflict
from fusion.formats.adapter_file import load
from fusion.models.base_check import check_base, with_base_weights
from fusion.models.binding import bind
from fusion.models.pipeline import Pipeline
from fusion.models.tokens import check_concepts

FOLDER = "spectral_adapters"  # in ComfyUI's models folder; adapters may also lie among the LoRAs
_FOLDERS = (FOLDER, "loras")


def loaded(model: ModelPatcher, clip: Clip, adapter: Adapter, strength: float, text_strength: float) -> Any:
    """MODEL and CLIP with an adapter, behind those that are loaded already.

    Raises BaseMismatch for a foreign base, TokenConflict for a token in use.
    """
    from folder_paths import get_temp_directory

    checked_strengths([adapter, adapter], [strength, text_strength])
    base = cast(Pipeline, ComfyBase(model, clip))
    check_base(base, adapter)
    names = text_encoders(clip)
    tokenizers = {component: getattr(base, "tokenizer" + component.removeprefix("text_encoder")) for component in names}
    check_concepts(adapter.info.concepts, adapter.tokens, {name: getattr(base, name) for name in names}, tokenizers)
    others = [entry.adapter for entry in entries_of(clip.patcher)]
    for other in others:
        if shared := sorted(other.tokens.keys() & adapter.tokens.keys()):
            raise TokenConflict(
                f"{shared[0]} is a token of '{other.info.name}' and of '{adapter.info.name}'; rename one with "
                "fusion library --rename."
            )
    model, clip = attach(model, clip, Entry(with_base_weights(base, adapter), strength, text_strength))
    original = clip.tokenizer.base if isinstance(clip.tokenizer, ConceptTokenizer) else clip.tokenizer
    folder = Path(get_temp_directory()) / "spectral_fusion"
    clip.tokenizer = ConceptTokenizer(original, names, [*others, adapter], folder)
    return model, clip


class LoadSpectralAdapter:
    """A spectral adapter on MODEL and CLIP: its concepts act where a prompt of this CLIP names their tokens."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = "loaders"
    DESCRIPTION = "Adds a spectral adapter. Write its token, such as <dog>, into prompts encoded with this CLIP."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {**_models(), "adapter_name": (_files(),), **_strengths()}}

    def load(
        self, model: ModelPatcher, clip: Clip, adapter_name: str, strength_model: float, strength_clip: float
    ) -> tuple[ModelPatcher, Clip]:
        """MODEL and CLIP with the adapter."""
        return loaded(model, clip, load(_path(adapter_name)), strength_model, strength_clip)


class BindLora:
    """Any LoRA, bound to a word or phrase: it acts where a prompt of this CLIP has it."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "bind"
    CATEGORY = "loaders"
    DESCRIPTION = "Binds a LoRA to a token such as <alice>, or to words of the prompt such as: the knight."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        word = ("STRING", {"default": "<alice>"})
        return {"required": {**_models(), "lora_name": (_files(),), "word": word, **_strengths()}}

    def bind(
        self, model: ModelPatcher, clip: Clip, lora_name: str, word: str, strength_model: float, strength_clip: float
    ) -> tuple[ModelPatcher, Clip]:
        """MODEL and CLIP with the LoRA at the word."""
        base = cast(Pipeline, ComfyBase(model, clip))
        adapter = bind(base, load(_path(lora_name)), word)
        return loaded(model, clip, adapter, strength_model, strength_clip)


NODE_CLASS_MAPPINGS: dict[str, Any] = {"LoadSpectralAdapter": LoadSpectralAdapter, "BindLoraToWord": BindLora}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "LoadSpectralAdapter": "Load Spectral Adapter",
    "BindLoraToWord": "Bind LoRA to Word",
}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]


def _models() -> dict[str, Any]:
    return {"model": ("MODEL",), "clip": ("CLIP",)}


def _strengths() -> dict[str, Any]:
    number = ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05})
    return {"strength_model": number, "strength_clip": number}


def _files() -> list[str]:
    """The adapters' and the LoRAs' file names in ComfyUI's folders."""
    import folder_paths

    if FOLDER not in folder_paths.folder_names_and_paths:
        folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    names = [name for folder in _FOLDERS for name in folder_paths.get_filename_list(folder)]
    return sorted({name for name in names if name.endswith(".safetensors")})


def _path(name: str) -> str:
    import folder_paths

    paths = [folder_paths.get_full_path(folder, name) for folder in _FOLDERS]
    if (path := next(filter(None, paths), None)) is None:
        raise FormatError(f"'{name}' is in neither of ComfyUI's folders {', '.join(_FOLDERS)}.")
    return path
