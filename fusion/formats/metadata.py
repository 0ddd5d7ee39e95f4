"""Metadata strings by which other programs know our files.

ModelSpec 1.0.1 (`modelspec.*`), which every tool shows, and what kohya's trainer writes (`ss_*`), by which A1111
distinguishes the families.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from fusion.adapters.adapter import AdapterInfo, BaseInfo
from fusion.errors import FusionError
from fusion.formats.safetensors_file import opened
from fusion.output_files import MARK

# ModelSpec's architecture, resolution, kohya's version.
_FAMILIES = {
    ("sd1", "epsilon"): ("stable-diffusion-v1", "512x512", "sd_v1"),
    ("sd1", "v_prediction"): ("stable-diffusion-v1", "512x512", "sd_v1_v"),
    ("sd2", "epsilon"): ("stable-diffusion-v2-512", "512x512", "sd_v2"),
    ("sd2", "v_prediction"): ("stable-diffusion-v2-768-v", "768x768", "sd_v2_v"),
    ("sdxl", "epsilon"): ("stable-diffusion-xl-v1-base", "1024x1024", "sdxl_base_v1-0"),
    ("sdxl", "v_prediction"): ("stable-diffusion-xl-v1-base", "1024x1024", "sdxl_base_v1-0"),
}
_UNKNOWN = ("stable-diffusion", "512x512", "")
_MADE_BY = "made_by"


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


def kohya_entries(info: AdapterInfo, rank: int) -> dict[str, str]:
    """The `ss_*` entries by which A1111, Forge and kohya's tools know a LoRA."""
    entries = {
        "ss_v2": str(bool(info.base and info.base.family == "sd2")),
        "ss_base_model_version": _family(info.base)[2],
        "ss_sd_model_name": info.base.name if info.base else "",
        "ss_output_name": info.name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
    }
    return {key: value for key, value in entries.items() if value}


def foreign_base(metadata: Mapping[str, str]) -> BaseInfo | None:
    """The base of a LoRA file by kohya's or ModelSpec's entries; None if it has neither."""
    version, spec = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    for (family, _), (architecture, _, kohya) in _FAMILIES.items():
        if version == kohya or spec.startswith(f"{architecture}/"):
            velocity = version.endswith("_v") or metadata.get("modelspec.prediction_type") == "v"
            name = metadata.get("ss_sd_model_name", "").removesuffix(".safetensors") or "unknown"
            return BaseInfo(family, name, "v_prediction" if velocity else "epsilon")
    return None


def _family(base: BaseInfo | None) -> tuple[str, str, str]:
    return _FAMILIES.get((base.family, base.prediction), _UNKNOWN) if base else _UNKNOWN
