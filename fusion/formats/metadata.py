"""Metadata strings by which other programs know our files.

ModelSpec 1.0.1 (`modelspec.*`), which every tool shows, and what kohya's trainer writes (`ss_*`), by which A1111
distinguishes the families.
"""

import base64
import io
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.adapters.adapter import AdapterInfo, BaseInfo
from fusion.errors import FusionError
from fusion.formats.safetensors_file import opened
from fusion.output_files import MARK

if TYPE_CHECKING:
    from PIL import Image

# ModelSpec's architecture, resolution, kohya's version.
_FAMILIES = {
    ("sd1", "epsilon"): ("stable-diffusion-v1", "512x512", "sd_v1"),
    ("sd1", "v_prediction"): ("stable-diffusion-v1", "512x512", "sd_v1_v"),
    ("sd2", "epsilon"): ("stable-diffusion-v2-512", "512x512", "sd_v2"),
    ("sd2", "v_prediction"): ("stable-diffusion-v2-768-v", "768x768", "sd_v2_v"),
    ("sdxl", "epsilon"): ("stable-diffusion-xl-v1-base", "1024x1024", "sdxl_base_v1-0"),
    ("sdxl", "v_prediction"): ("stable-diffusion-xl-v1-base", "1024x1024", "sdxl_base_v1-0"),
}
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # of the embeddings of prompts
# How the versions begin that kohya's, ai-toolkit's and OneTrainer's files name.
_VERSIONS = {
    **dict.fromkeys(("sd_v1", "sd_1.", "stable-diffusion-v1"), "sd1"),
    **dict.fromkeys(("sd_v2", "sd_2.", "stable-diffusion-v2"), "sd2"),
    **dict.fromkeys(("sdxl", "stable-diffusion-xl"), "sdxl"),
}
_UNKNOWN = ("stable-diffusion", "512x512", "")
_MADE_BY = "made_by"
# Of what follows the header, as kohya's trainer (A1111 takes it from there, instead of reading the file) and ModelSpec
# have it.
HASHES = {"sshs_model_hash": "", "modelspec.hash_sha256": "0x"}
THUMBNAIL_SIDE = 256  # pixels


def modelspec(info: AdapterInfo, kind: str, *, implementation: str = "diffusers") -> dict[str, str]:
    """ModelSpec entries; `kind` is "lora", "spectral-adapter" or "textual-inversion"."""
    architecture, resolution, _ = _family(info.base)
    entries = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}/{kind}",
        "implementation": implementation,
        "title": info.name,
        "resolution": resolution,
        "trigger_phrase": ", ".join(concept.token for concept in info.concepts),
        "merged_from": ", ".join(info.provenance.parents),
        "prediction_type": "v" if info.base and info.base.prediction == "v_prediction" else "epsilon",
    }
    return {_MADE_BY: MARK, **{f"modelspec.{key}": value for key, value in entries.items() if value}}


def foreign_export(info: AdapterInfo, kind: str) -> Callable[[Path], str]:
    """For `check_output`: only an earlier export of the same adapter, as the same `kind`, may be replaced."""
    expected = modelspec(info, kind)

    def reason(path: Path) -> str:
        try:
            with opened(path) as file:
                metadata = file.metadata
        except FusionError:
            return "it is another kind of file"
        keys = {"modelspec.title", "modelspec.trigger_phrase", *([] if info.concepts else [_MADE_BY])}
        same = all(metadata.get(key) == expected.get(key) for key in keys)
        same = same and metadata.get("modelspec.architecture", "").endswith(f"/{kind}")
        return "" if same else f"it is no earlier export of '{info.name}'"

    return reason


def kohya_entries(info: AdapterInfo, rank: int, words: Iterable[str] = ()) -> dict[str, str]:
    """The `ss_*` entries by which A1111, Forge and kohya's tools know a LoRA.

    `words`: those of its concepts in prompts, which these programs list as what it was trained on. Captions are not
    stored, since they may say more about people's pictures than their owners want to share.
    """
    tags = dict.fromkeys(words, max(info.provenance.steps, 1))
    entries = {
        "ss_v2": str(bool(info.base and info.base.family == "sd2")),
        "ss_base_model_version": _family(info.base)[2],
        "ss_sd_model_name": info.base.name if info.base else "",
        "ss_output_name": info.name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_tag_frequency": json.dumps({info.name: tags}) if tags else "",
    }
    return {key: value for key, value in entries.items() if value}


def thumbnail_entries(image: "Image.Image") -> dict[str, str]:
    """A picture in the file: for SwarmUI and others by ModelSpec, and for A1111, Forge and ComfyUI's model browser."""
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    small.save(buffer, "JPEG", quality=90)
    text = base64.b64encode(buffer.getvalue()).decode()
    return {"modelspec.thumbnail": f"data:image/jpeg;base64,{text}", "ssmd_cover_images": json.dumps([text])}


def foreign_base(
    metadata: Mapping[str, str], widths: Mapping[str, int], convolutions: Collection[str]
) -> BaseInfo | None:
    """The base of a LoRA file by its contents, else by kohya's or ModelSpec's entries; None if nothing shows it.

    `widths`: layer name -> I of its inputs; `convolutions`: the layers whose factors are those of convolutions.
    """
    version, spec = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    named = (family for start, family in _VERSIONS.items() if version.startswith(start) or spec.startswith(start))
    family = _family_by_contents(widths, convolutions) or next(named, None)
    if family is None:
        return None
    velocity = version.endswith("_v") or metadata.get("modelspec.prediction_type") == "v" or spec.endswith("-v/lora")
    name = metadata.get("ss_sd_model_name", "").removesuffix(".safetensors") or "unknown"
    return BaseInfo(family, name, "v_prediction" if velocity else "epsilon")


def _family_by_contents(widths: Mapping[str, int], convolutions: Collection[str]) -> str | None:
    """By the width of the prompts that cross-attention reads, SDXL's second text encoder, SD 1.x's convolutions."""
    if any(layer.startswith("text_encoder_2.") for layer in widths):
        return "sdxl"
    for layer, width in widths.items():
        if layer.endswith(("attn2.to_k", "attn2.to_v")) and width in _WIDTHS:
            return _WIDTHS[width]
    return "sd1" if any(layer.endswith((".proj_in", ".proj_out")) for layer in convolutions) else None


def _family(base: BaseInfo | None) -> tuple[str, str, str]:
    return _FAMILIES.get((base.family, base.prediction), _UNKNOWN) if base else _UNKNOWN
