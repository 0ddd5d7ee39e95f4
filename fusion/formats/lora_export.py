"""An adapter as other programs read it: a LoRA, and a textual inversion for every concept token.

SD 1.x, 2.x    one tensor (vectors, dim), named by the token: `pipe.load_textual_inversion(path)` takes the token
               from there; A1111, Forge, ComfyUI and InvokeAI take the only tensor and go by the file's name
SDXL           clip_l and clip_g, one for each text encoder, as A1111 and ComfyUI know them
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor

from fusion.adapters.adapter import Adapter, AdapterInfo, Concept
from fusion.adapters.imported import ImportedLayer
from fusion.errors import FormatError, UnknownName, closest
from fusion.formats import EXPORT_FORMS
from fusion.formats.lora_file import write_lora
from fusion.formats.metadata import foreign_export, modelspec
from fusion.formats.safetensors_file import write_file
from fusion.output_files import check_output, output_group
from fusion.progress import units
from fusion.spectral.delta import Delta, check_compression

_SDXL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@dataclass(frozen=True)
class ExportReport:
    """The files that were written, and what users have to know about them."""

    path: Path  # the LoRA
    files: list[Path]
    notes: list[str]
    rank: int  # the largest over all layers
    exact: bool  # nothing was compressed away
    energy: float  # the share of ‖ΔW‖², over all layers, that is in the file


def export(
    adapter: Adapter,
    path: str | os.PathLike[str],
    form: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "float16",
    overwrite: bool = False,
    picture: Image.Image | None = None,
) -> ExportReport:
    """Write `adapter` as a LoRA in the form "diffusers" or "kohya", exactly unless `rank` or `energy` compress it.

    Every concept goes beside it as `<stem>_<token>.safetensors`: A1111 and ComfyUI use the file's name as the word in
    prompts, so it must not be a word of the language. All of them appear together, or none. An earlier export of the
    same adapter is replaced, other files with `overwrite` only. `picture` is what other programs show of the LoRA; it
    is stored small in the file.
    Raises UnknownName for another form, ConfigError for an impossible rank or energy, FormatError if there is no layer,
    OutputError where nothing can be written.
    """
    if form not in EXPORT_FORMS:
        known = f"{closest(form, EXPORT_FORMS)} There are: {', '.join(EXPORT_FORMS)}."
        raise UnknownName(f"No export form is '{form}'{known}")
    check_compression(rank, energy)
    target, embeddings = check_export_outputs(adapter, path, overwrite=overwrite)
    imported = _imported(adapter) if EXPORT_FORMS[form].kinds and rank is None and energy is None else {}
    deltas = _without(adapter, imported).deltas()
    if not deltas and not imported:
        raise FormatError(f"'{adapter.info.name}' changes no layer, so there is no LoRA to export.")
    layers = units("compressing layers", list(deltas.items()))
    factors = {layer: _compressed(delta, rank, energy) for layer, delta in layers}
    # A1111, Forge and ComfyUI know an embedding by its file's name, diffusers by the token in it.
    words = [c.token if form == "diffusers" else file.stem for c, file in embeddings.items()]
    with output_group(target) as group:
        file = group / target.name
        write_lora(EXPORT_FORMS[form], adapter.info, factors, file, dtype, imported, words=words, picture=picture)
        for concept, file in embeddings.items():
            _write_embedding(group / file.name, adapter.info, concept, adapter.tokens[concept.token])
    exact = all(factors[layer] is deltas[layer] for layer in deltas)
    share = 1.0 if exact else _energy(factors) / max(_energy(deltas), 1e-300)
    largest = max((delta.rank for delta in factors.values()), default=0)
    notes = [] if exact else [f"Compressed to rank {largest}; {share:.2%} of the change's energy is kept."]
    if imported:
        notes.append(
            f"{len(imported)} layers are written as what they were imported as, not as a plain LoRA. ComfyUI, A1111 "
            "and Forge read them; diffusers reads no LoHa and LoKr of this form: export as 'diffusers' for it."
        )
    family = adapter.info.base.family if adapter.info.base else ""
    if form == "kohya" and family == "sdxl" and any("time_embedding" in layer for layer in adapter.layer_names):
        notes.append("kohya's own loader skips the layers time_embed of SDXL; A1111, ComfyUI and diffusers read them.")
    notes += _notes(adapter, target, embeddings)
    if not imported:
        notes.append(f"diffusers: pipe.load_lora_weights('{target}')")
    return ExportReport(target, [target, *embeddings.values()], notes, largest, exact, share)


def _imported(adapter: Adapter) -> dict[str, ImportedLayer]:
    """The layers that can be written as the kinds they were imported as: nothing else changes them."""
    names = [name for branch in adapter.branches for name in branch.layers]
    return {
        name: layer
        for branch in adapter.branches if branch.strength == 1
        for name, layer in branch.layers.items() if isinstance(layer, ImportedLayer) and names.count(name) == 1
    }  # fmt: skip


def _without(adapter: Adapter, layers: Mapping[str, ImportedLayer]) -> Adapter:
    """The adapter without some of its layers."""
    rest = [{n: layer for n, layer in branch.layers.items() if n not in layers} for branch in adapter.branches]
    branches = tuple(replace(branch, layers=kept) for branch, kept in zip(adapter.branches, rest, strict=True))
    return replace(adapter, branches=branches)


def check_export_outputs(
    adapter: Adapter, path: str | os.PathLike[str], *, overwrite: bool = False
) -> tuple[Path, dict[Concept, Path]]:
    """The LoRA's file and those of the embeddings. Raises OutputError now for what could not be written later."""
    check = partial(check_output, endings=(".safetensors",), overwrite=overwrite)
    target = check(path, foreign=foreign_export(adapter.info, "lora"))
    files = {c: target.with_name(f"{target.stem}_{c.token.strip('<>')}.safetensors") for c in adapter.info.concepts}
    embeddings = {concept: file for concept, file in files.items() if concept.token in adapter.tokens}
    for concept, file in embeddings.items():
        check(file, foreign=foreign_export(_embedding_info(file, adapter.info, concept), "textual-inversion"))
    return target, embeddings


def _compressed(delta: Delta, rank: int | None, energy: float | None) -> Delta:
    """`delta` itself where nothing has to be cut off."""
    if energy is None and (rank is None or rank >= delta.rank):
        return delta
    small = delta.compress(rank, energy)
    return small if small.rank < delta.rank else delta


def _energy(deltas: Mapping[str, Delta]) -> float:
    return sum(float(delta.inner(delta)) for delta in deltas.values())


def _write_embedding(path: Path, info: AdapterInfo, concept: Concept, rows: Mapping[str, Tensor]) -> None:
    """Write the embeddings (vectors, dim) of one concept per text encoder."""
    tensors = {_SDXL_KEYS[component] if len(rows) > 1 else concept.token: row for component, row in rows.items()}
    embedding = _embedding_info(path, info, concept)
    spec = modelspec(embedding, "textual-inversion", implementation="https://github.com/Stability-AI/generative-models")
    write_file(path, tensors, {"format": "pt", **spec}, "float32")


def _embedding_info(path: Path, info: AdapterInfo, concept: Concept) -> AdapterInfo:
    return AdapterInfo(path.stem, info.base, (concept,))


def _notes(adapter: Adapter, target: Path, embeddings: Mapping[Concept, Path]) -> list[str]:
    notes: list[str] = []
    if adapter.gated:
        tokens = ", ".join(dict.fromkeys(token for branch in adapter.branches for token in branch.gate))
        notes.append(
            f"A plain LoRA cannot be gated: '{adapter.info.name}' acts only at its own tokens ({tokens}), the export "
            "on every word of every prompt. It will disturb prompts without them, and several concepts each other. "
            "With --distill (method 'distill' of fuse) a LoRA learns to leave them alone as the gates do."
        )
        if not adapter.info.provenance.settings.get("quiet_loss_weight"):
            notes.append("Concepts taught with quiet_loss_weight = 10 disturb far less when they are exported.")
    if embeddings:
        words = [file.stem for file in embeddings.values()]
        notes.append(
            "The concept tokens are embeddings beside it. A1111, Forge and ComfyUI: move them into the embeddings "
            f"folder and write {', '.join(words)} (ComfyUI: embedding:{words[0]}) in the prompt."
        )
    for concept, file in embeddings.items():
        family = adapter.info.base.family if adapter.info.base else ""
        notes.append("diffusers: " + "; ".join(embedding_lines(concept, family, f"'{file}'", f"'{file}'")))
    return notes


def embedding_lines(concept: Concept, family: str, source: str, file: str) -> list[str]:
    """Python by which a user of diffusers loads an exported embedding into `pipe`.

    `source`: the arguments of load_textual_inversion; `file`: the expression for the path of the file, for SDXL.
    """
    if family != "sdxl":
        return [f"pipe.load_textual_inversion({source})  # {concept.token}"]
    return [
        # SDXL's published config names a wrong end of prompt: CLIP then pools at the newest token.
        "pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id",
        f"rows = safetensors.torch.load_file({file})",
        f"pipe.load_textual_inversion({{'{concept.token}': rows['clip_l']}})",
        f"pipe.load_textual_inversion({{'{concept.token}': rows['clip_g']}}, text_encoder=pipe.text_encoder_2, "
        "tokenizer=pipe.tokenizer_2)",
    ]
