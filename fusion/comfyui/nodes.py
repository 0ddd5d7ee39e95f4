"""The nodes, as ComfyUI calls them. What is heavy to import waits until a node runs, so ComfyUI starts as before."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fusion.comfyui.base import Clip, Conditioning, ModelPatcher
from fusion.errors import FormatError

FOLDER = "spectral_adapters"  # in ComfyUI's models folder; adapters may also lie among the LoRAs
_FOLDERS = (FOLDER, "loras")


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
        from fusion.comfyui.loader import load_adapter

        return load_adapter(model, clip, _path(adapter_name), strength_model, strength_clip)


class BindLora:
    """Any LoRA, bound to a word or phrase: it acts where a prompt of this CLIP has it."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "bind"
    CATEGORY = "loaders"
    DESCRIPTION = "Binds a LoRA to a token such as <alice>, or to words of the prompt such as: the knight."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        word = ("STRING", {"default": "<alice>"})
        required = {**_models(), "lora_name": (_files(),), "word": word, **_strengths()}
        return {"required": required, "optional": {"mask": ("MASK",)}}

    def bind(
        self, model: ModelPatcher, clip: Clip, lora_name: str, word: str, strength_model: float, strength_clip: float,
        mask: Tensor | None = None,
    ) -> tuple[ModelPatcher, Clip]:  # fmt: skip
        """MODEL and CLIP with the LoRA at the word; with a mask, it changes the picture there alone."""
        from fusion.comfyui.loader import load_adapter

        return load_adapter(model, clip, _path(lora_name), strength_model, strength_clip, word, mask)


class ConceptMasks:
    """Where each concept of a prompt will be in the picture that a KSampler with these settings draws."""

    RETURN_TYPES = ("MASK",) * 4
    RETURN_NAMES = ("concept_1", "concept_2", "concept_3", "concept_4")
    FUNCTION = "find"
    CATEGORY = "conditioning"
    DESCRIPTION = "Finds where the UNet will draw each concept of the prompt, in the order of the prompt."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from comfy.samplers import KSampler

        required = {
            **_models(),
            "text": ("STRING", {"multiline": True}),
            "negative": ("CONDITIONING",),
            "latent_image": ("LATENT",),
            "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
            "steps": ("INT", {"default": 20, "min": 1, "max": 10000}),
            "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1}),
            "sampler_name": (KSampler.SAMPLERS,),
            "scheduler": (KSampler.SCHEDULERS,),
        }
        return {"required": required}

    def find(
        self, model: ModelPatcher, clip: Clip, text: str, negative: Conditioning, latent_image: dict[str, Tensor],
        seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """A mask for each concept, empty ones for those that the prompt lacks."""
        from fusion.comfyui.concept_masks import MAX_CONCEPTS, find_masks

        by_token = find_masks(
            model, clip, text, negative, latent_image["samples"], seed=seed, steps=steps, cfg=cfg,
            sampler=sampler_name, scheduler=scheduler,
        )  # fmt: skip
        masks = list(by_token.values())
        return *masks, *[masks[0] * 0] * (MAX_CONCEPTS - len(masks))


class AdapterCompatibility:
    """What to expect of the adapters on a CLIP together, by their weights; nothing is drawn."""

    RETURN_TYPES = ("STRING",)
    FUNCTION = "report"
    CATEGORY = "loaders"
    OUTPUT_NODE = True
    DESCRIPTION = "Reports whether the loaded adapters disturb each other, as fusion inspect does."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"clip": ("CLIP",)}}

    def report(self, clip: Clip) -> dict[str, Any]:
        """The verdict, its reasons, and the cosine of every two changes."""
        from fusion.comfyui.adapter_report import report_adapters

        text = report_adapters(clip)
        return {"ui": {"text": [text]}, "result": (text,)}


NODE_CLASS_MAPPINGS: dict[str, Any] = {
    "LoadSpectralAdapter": LoadSpectralAdapter,
    "BindLoraToWord": BindLora,
    "ConceptMasks": ConceptMasks,
    "AdapterCompatibility": AdapterCompatibility,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "LoadSpectralAdapter": "Load Spectral Adapter",
    "BindLoraToWord": "Bind LoRA to Word",
    "ConceptMasks": "Find Concept Masks",
    "AdapterCompatibility": "Adapter Compatibility",
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
