"""What a file says of itself. safetensors metadata are strings; nested values are JSON in them.

Beside our own entries: ModelSpec 1.0.1 (`modelspec.*`), which every tool shows, and what kohya's trainer writes
(`ss_*`), by which A1111 tells the families apart.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fusion.adapters.adapter import AdapterInfo, BaseInfo, Concept, Provenance
from fusion.errors import FormatError

_BASE = {"family": str, "name": str, "prediction": str}
_CONCEPT = {"token": str, "noun": str, "vectors": int}
_PROVENANCE = {"tool": str, "steps": int, "seed": int, "parents": list, "settings": dict}
_KINDS = {str: "a string", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


class _Family(NamedTuple):
    architecture: str
    resolution: str
    kohya: str
    a1111: str


_FAMILIES = {
    "sd1": _Family("stable-diffusion-v1", "512x512", "sd_v1", "SD1"),
    "sd1 v_prediction": _Family("stable-diffusion-v1", "512x512", "sd_v1_v", "SD1"),
    "sd2": _Family("stable-diffusion-v2-512", "512x512", "sd_v2", "SD2"),
    "sd2 v_prediction": _Family("stable-diffusion-v2-768-v", "768x768", "sd_v2_v", "SD2"),
    "sdxl": _Family("stable-diffusion-xl-v1-base", "1024x1024", "sdxl_base_v1-0", "SDXL"),
}
_UNKNOWN = _Family("stable-diffusion", "512x512", "", "Unknown")


def info_entries(info: AdapterInfo) -> dict[str, str]:
    """An AdapterInfo as metadata; `parse_info` is the inverse."""
    origin = info.provenance
    nested = {
        "base": vars(info.base) if info.base else None,
        "concepts": [vars(concept) for concept in info.concepts],
        "provenance": {**vars(origin), "parents": list(origin.parents), "settings": dict(origin.settings)},
    }
    return {"name": info.name, **{key: to_json(value) for key, value in nested.items()}}


def parse_info(metadata: Mapping[str, str]) -> AdapterInfo:
    """Raises FormatError, or what Concept itself refuses, for metadata that are not an AdapterInfo."""
    base, concepts = from_json(metadata, "base"), from_json(metadata, "concepts")
    origin = fields(from_json(metadata, "provenance"), _PROVENANCE, "provenance")
    return AdapterInfo(
        name=require(metadata, "name"),
        base=BaseInfo(**fields(base, _BASE, "base")) if base is not None else None,
        concepts=tuple(Concept(**fields(c, _CONCEPT, "a concept")) for c in typed(concepts, list, "concepts")),
        provenance=Provenance(**dict(origin, parents=strings(origin["parents"], "parents"))),
    )


def modelspec(info: AdapterInfo, kind: str, *, implementation: str = "diffusers") -> dict[str, str]:
    """ModelSpec entries; `kind` is "lora", "spectral-adapter" or "textual-inversion"."""
    family = _family(info.base)
    entries = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{family.architecture}/{kind}",
        "implementation": implementation,
        "title": info.name,
        "resolution": family.resolution,
        "trigger_phrase": ", ".join(concept.token for concept in info.concepts),
        "merged_from": ", ".join(info.provenance.parents),
        "prediction_type": "v" if info.base and info.base.prediction == "v_prediction" else "epsilon",
    }
    return {f"modelspec.{key}": value for key, value in entries.items() if value}


def kohya_entries(info: AdapterInfo, rank: int, alpha: int) -> dict[str, str]:
    """The `ss_*` entries by which A1111, Forge and kohya's own tools know a LoRA."""
    entries = {
        "ss_v2": str(bool(info.base and info.base.family == "sd2")),
        "ss_base_model_version": _family(info.base).kohya,
        "ss_sd_model_name": info.base.name if info.base else "",
        "ss_output_name": info.name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
    }
    return {key: value for key, value in entries.items() if value}


def foreign_base(metadata: Mapping[str, str]) -> BaseInfo | None:
    """What a LoRA file says of its base by kohya's or ModelSpec's entries. None: it does not say."""
    version, spec = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    for key, family in _FAMILIES.items():
        if version == family.kohya or spec.startswith(f"{family.architecture}/"):
            by_velocity = version.endswith("_v") or metadata.get("modelspec.prediction_type") == "v"
            name = metadata.get("ss_sd_model_name", "").removesuffix(".safetensors") or "unknown"
            return BaseInfo(key.partition(" ")[0], name, "v_prediction" if by_velocity else "epsilon")
    return None


def a1111_version(base: BaseInfo | None) -> str:
    """ "SD1", "SD2", "SDXL" or "Unknown"."""
    return _family(base).a1111


def _family(base: BaseInfo | None) -> _Family:
    if base is None:
        return _UNKNOWN
    return _FAMILIES.get(f"{base.family} {base.prediction}") or _FAMILIES.get(base.family, _UNKNOWN)


def to_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str)


def from_json(metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(require(metadata, key))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the metadata entry '{key}' is no JSON ({type(error).__name__})") from error


def require(metadata: Mapping[str, str], key: str) -> str:
    if key not in metadata:
        raise FormatError(f"the metadata entry '{key}' is missing")
    return metadata[key]


def typed(value: Any, kind: type, what: str) -> Any:
    """`value` if it is of that kind; a bool is no number, and a number is finite and of sane size."""
    good = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
    if good and isinstance(value, int | float):
        good = abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)
    if not good:
        raise FormatError(f"{what} should be {_KINDS[kind]} in the metadata, not {str(value)[:40]!r}")
    return value


def fields(value: Any, kinds: Mapping[str, type], what: str) -> dict[str, Any]:
    """An object with exactly these fields, each of its kind."""
    found = typed(value, dict, what)
    if odd := sorted(kinds.keys() ^ found.keys()):
        raise FormatError(f"{what} has missing or unknown fields in the metadata: {', '.join(odd)[:80]}")
    return {key: typed(found[key], kind, f"{what}.{key}") for key, kind in kinds.items()}


def strings(value: Any, what: str) -> tuple[str, ...]:
    return tuple(typed(item, str, f"each of {what}") for item in typed(value, list, what))
