"""An adapter as other programs read it: a LoRA, an embedding for every concept token, and a card that says so."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fusion.adapters.adapter import Adapter, BaseInfo, Concept
from fusion.errors import ConfigError, FormatError, UnknownName, closest
from fusion.formats import EXPORTS
from fusion.formats.lora_file import write_lora
from fusion.formats.metadata import a1111_version
from fusion.formats.safetensors_file import safetensors_target, write_whole
from fusion.formats.textual_inversion import embedding_path, write_embedding
from fusion.spectral.delta import Delta


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what the user has to know about it."""

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
) -> ExportReport:
    """Write `adapter` as a LoRA in the form "diffusers" or "kohya", exactly unless `rank` or `energy` compress it.

    Beside it: `<stem>_<token>.safetensors` for every concept, and `<stem>.json`, the card of A1111 and InvokeAI.
    Raises UnknownName for another form, ConfigError for a senseless rank or energy, FormatError if there is no layer.
    """
    if form not in EXPORTS:
        known = " and ".join(EXPORTS)
        raise UnknownName(f"No export form is called '{form}'{closest(form, EXPORTS)} There are: {known}.")
    target = safetensors_target(path)
    whole = adapter.deltas()
    if not whole:
        raise FormatError(f"'{adapter.info.name}' changes no layer, so there is no LoRA to export.")
    kept = {layer: compressed(delta, rank, energy) for layer, delta in whole.items()}
    write_lora(EXPORTS[form], adapter.info, kept, target, dtype)
    embeddings = {c: embedding_path(target, c) for c in adapter.info.concepts if c.token in adapter.tokens}
    for concept, file in embeddings.items():
        write_embedding(file, adapter.info, concept, adapter.tokens[concept.token])
    exact = all(kept[layer] is whole[layer] for layer in whole)
    report = ExportReport(
        path=target,
        files=[target, *embeddings.values(), target.with_suffix(".json")],
        notes=_notes(adapter, target, embeddings),
        rank=max(delta.rank for delta in kept.values()),
        exact=exact,
        energy=1.0 if exact else _energy(kept) / max(_energy(whole), 1e-300),
    )
    if not exact:
        report.notes.insert(0, f"Compressed to rank {report.rank}; {report.energy:.2%} of the change's energy is kept.")
    _write_card(adapter, report, embeddings)
    return report


def compressed(delta: Delta, rank: int | None, energy: float | None) -> Delta:
    """`delta` itself where nothing has to be cut off."""
    if rank is not None and rank < 1:
        raise ConfigError(f"rank should be at least 1, got {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy is a share, above 0 and at most 1, got {energy}.")
    if energy is None and (rank is None or rank >= delta.rank):
        return delta
    small = delta.compress(rank, energy)
    return small if small.rank < delta.rank else delta


def _energy(deltas: Mapping[str, Delta]) -> float:
    return sum(float(delta.inner(delta)) for delta in deltas.values())


def _notes(adapter: Adapter, target: Path, embeddings: Mapping[Concept, Path]) -> list[str]:
    notes = []
    if adapter.gated:
        tokens = ", ".join(dict.fromkeys(token for branch in adapter.branches for token in branch.gate))
        notes.append(
            f"A plain LoRA cannot be gated: '{adapter.info.name}' acts only at its own tokens ({tokens}), the export "
            "on every word of every prompt. It will disturb prompts without them, and several concepts each other; "
            "lower its strength where it does."
        )
    if not embeddings:
        return notes
    words = ", ".join(file.stem for file in embeddings.values())
    notes.append(
        f"The concept tokens are embeddings beside it. A1111, Forge and ComfyUI: move them into the embeddings folder "
        f"and write {words} (ComfyUI: embedding:{next(iter(embeddings.values())).stem}) in the prompt."
    )
    for concept, file in embeddings.items():
        notes.append(f"diffusers: {'; '.join(_lines(adapter.info.base, concept, file))}")
    notes.append(f"diffusers: pipe.load_lora_weights('{target}')")
    return notes


def _lines(base: BaseInfo | None, concept: Concept, file: Path) -> list[str]:
    """What to write in Python to use one embedding."""
    if base is None or base.family != "sdxl":
        return [f"pipe.load_textual_inversion('{file}')  # {concept.token}"]
    return [
        # SDXL's published config names a wrong end of prompt: CLIP then pools at the largest id, the new token's.
        "pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id",
        f"rows = safetensors.torch.load_file('{file}')",
        f"pipe.load_textual_inversion({{'{concept.token}': rows['clip_l']}})",
        f"pipe.load_textual_inversion({{'{concept.token}': rows['clip_g']}}, text_encoder=pipe.text_encoder_2, "
        "tokenizer=pipe.tokenizer_2)",
    ]


def _write_card(adapter: Adapter, report: ExportReport, embeddings: Mapping[Concept, Path]) -> None:
    """`<stem>.json`, from which A1111 and InvokeAI fill in the trigger words."""
    nouns = [f"{c.token} ({c.noun})" if c.noun else c.token for c in adapter.info.concepts]
    card = {
        "description": f"{adapter.info.name}: {', '.join(nouns)}" if nouns else adapter.info.name,
        "sd version": a1111_version(adapter.info.base),
        "activation text": ", ".join(file.stem for file in embeddings.values()),
        "preferred weight": 1.0,
        # Cards are passed on with the LoRA: the folders of this machine are nobody's business.
        "notes": "\n".join(report.notes).replace(f"{report.path.parent}{os.sep}", ""),
    }
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    write_whole(report.path.with_suffix(".json"), [text.encode()])
