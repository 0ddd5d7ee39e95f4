"""The card of an adapter's repository: what the Hub and diffusers' users look for, and how it is used with and without
this package."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fusion.adapters.adapter import Adapter
from fusion.formats.hub_file import LIBRARY
from fusion.formats.lora_export import ExportReport, embedding_lines
from fusion.training.config import with_token

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

LORA_FILE = "pytorch_lora_weights.safetensors"  # what pipe.load_lora_weights("user/dog") looks for
_BASES = {  # name of a base -> its id, and the licence that its derivatives inherit
    "stable-diffusion-v1-4": ("CompVis/stable-diffusion-v1-4", "creativeml-openrail-m"),
    "stable-diffusion-v1-5": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m"),
    "stable-diffusion-xl-base-1.0": ("stabilityai/stable-diffusion-xl-base-1.0", "openrail++"),
}
_TAGS = ("text-to-image", "diffusers", "diffusers-training", "lora", "template:sd-lora", "spectral-adapter", LIBRARY)


def instance_prompt(adapter: Adapter) -> str:
    """The prompt of the adapter's training, or "a <dog>", of several concepts "a <dog> and a <cat>"."""
    tokens = [concept.token for concept in adapter.info.concepts]
    trained = adapter.info.provenance.settings.get("instance_prompt")
    if len(tokens) == 1 and isinstance(trained, str):
        return with_token(trained, tokens[0])
    return " and ".join(f"a {token}" for token in tokens) or "a photo"


def model_card(
    adapter: Adapter, repo_id: str, report: ExportReport, *, base: str | None = None,
    pictures: Mapping[str, str] | None = None,
) -> "ModelCard":  # fmt: skip
    """The card of `adapter` in the repository `repo_id`, whose LoRA and embeddings are those of `report`.

    `base`: the base's id on the Hub, where its name does not show it. `pictures`: path in the repository -> prompt.
    """
    from huggingface_hub import ModelCard, ModelCardData

    info = adapter.info
    known, licence = _BASES.get((base or (info.base.name if info.base else "")).rpartition("/")[2], (None, None))
    base_model, family = base or known, info.base.family if info.base else ""
    version = "stable-diffusion-xl" if family == "sdxl" else "stable-diffusion"
    data = ModelCardData(
        license=licence, library_name="diffusers", pipeline_tag="text-to-image",
        base_model=base_model, base_model_relation="adapter" if base_model else None,
        tags=[*_TAGS, version, f"{version}-diffusers"], instance_prompt=instance_prompt(adapter),
        widget=[{"text": text, "output": {"url": path}} for path, text in (pictures or {}).items()] or None,
    )  # fmt: skip
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(adapter, repo_id, report, base_model)}")


def _text(adapter: Adapter, repo_id: str, report: ExportReport, base_model: str | None) -> str:
    info, prompt, family = adapter.info, instance_prompt(adapter), adapter.info.base.family if adapter.info.base else ""
    # A token outside of backticks would be an HTML tag, which is not shown.
    words = ", ".join(f"`{c.token}`{f' (a {_plain(c.noun)})' if c.noun else ''}" for c in info.concepts)
    kind = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    embedded = bool(info.base and info.base.name == "pocket")
    where = "fusion.pocket()" if embedded else f'"{base_model or "THE BASE MODEL"}"'
    opening = [f"from diffusers import {kind}", f"pipe = {kind}.from_pretrained({where})"]
    lora = [f'pipe.load_lora_weights("{repo_id}", weight_name="{report.path.name}")']
    files = {concept: file.name for concept, file in zip(info.concepts, report.files[1:], strict=False)}
    for concept, file in files.items():
        lora += embedding_lines(
            concept, family, f"'{repo_id}', weight_name='{file}'", f"hf_hub_download('{repo_id}', '{file}')"
        )
    if family == "sdxl" and files:
        lora = ["import safetensors.torch", "from huggingface_hub import hf_hub_download", *lora]
    acts = "acts at its own words only" if adapter.gated else "acts on the whole prompt"
    steps = f", {info.provenance.steps} steps" if info.provenance.steps else ""
    name = base_model or (info.base.name if info.base and info.base.name != "unnamed" else "")
    types = ", ".join(dict.fromkeys(branch.type for branch in adapter.branches))
    parts = [
        f"# {_plain(info.name)}",
        "<Gallery />",
        f"## Trigger words\n\nYou should use {words} to trigger the image generation." if words else "",
        f"Adapter of type {types}, rank {adapter.rank}{steps}, on {_plain(name) or 'a base that is not known'}.",
        f"## With spectral-fusion\n\nIt {acts}, and can be used beside other adapters.\n\n"
        + _code("import fusion", *opening, f'fusion.attach(pipe, fusion.load("{repo_id}"))', _call(prompt)),
        "## With diffusers alone\n\n"
        + ("A plain LoRA has no gates: it acts on every word of the prompt.\n\n" if adapter.gated else "")
        + _code(*(["import fusion"] if embedded else []), *opening, *lora, _call(prompt)),
        f"For ComfyUI, A1111 and Forge: `fusion export {repo_id} --to kohya -o lora.safetensors`.",
        "The pictures it was trained on are not in this repository.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _call(prompt: str) -> str:
    return f"pipe({prompt!r}).images[0]"


def _plain(text: str) -> str:
    """Text from a file without what Markdown and HTML would take for their own."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))
