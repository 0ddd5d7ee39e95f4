"""What a training starts from: its layers, its slice, an untrained adapter and the groups its optimizer sees."""

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import Adapter, AdapterInfo, Branch, Concept, Provenance
from fusion.adapters.layer import AdapterLayer, LayerOptions
from fusion.errors import ConfigError, UnknownName, closest
from fusion.layer_names import component_of, sees_tokens
from fusion.library.library_folder import Library
from fusion.library.spectrum_cache import cached_spectrum
from fusion.models.layer_sites import Site, components, matrix, sites
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import base_info, base_name
from fusion.models.stored_weights import StoredWeights
from fusion.models.targets import default_targets, resolve
from fusion.models.tokens import initial_rows
from fusion.progress import OnProgress, reporter
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import Spectrum
from fusion.training.config import TrainingConfig

logger = logging.getLogger(__name__)


def check_base_name(pipe: Pipeline, config: TrainingConfig) -> None:
    """Raise ConfigError if the settings name another base than the one that is open."""
    named, opened = config.pretrained_model_name_or_path, base_name(pipe)
    if named and opened != "unnamed" and Path(named).name.removesuffix(".safetensors") != opened:
        raise ConfigError(
            f"pretrained_model_name_or_path is '{named}', but '{opened}' is open; open that base, or leave it out."
        )


def target_sites(pipe: Pipeline, config: TrainingConfig) -> dict[str, Site]:
    """The layers to adapt, by canonical name. Raises UnknownName for a target or adapter type that does not exist."""
    if config.adapter_type not in ADAPTERS:
        near = closest(config.adapter_type, ADAPTERS)
        raise UnknownName(f"No adapter type is called '{config.adapter_type}'{near} There are: {', '.join(ADAPTERS)}.")
    layers = sites(pipe)
    return {name: layers[name] for name in resolve(target_patterns(pipe, config), layers)}


def target_patterns(pipe: Pipeline, config: TrainingConfig) -> tuple[str, ...]:
    """The targets that the config names, else those that suit its gating."""
    trained = [c for c in components(pipe) if c == "unet" or config.text_encoder_lr]
    return tuple(config.targets or default_targets(trained, gated=config.gating == "tokens"))


@contextmanager
def reserved_slice(
    pipe: Pipeline, config: TrainingConfig, targets: Mapping[str, Site], resumed: SpectralSlice | None = None
) -> Generator[SpectralSlice]:
    """The slice to train on, reserved in the library until the context is left.

    It is the one that the config names, or that of the checkpoint that is `resumed`, or the next free one. Where none
    is free, a gated adapter shares the least shared one with other gated adapters, unless `exclusive_slice` is set.
    Raises SliceConflict for a slice that is taken, or does not fit the narrowest of the `targets`.
    """
    kind = ADAPTERS[config.adapter_type]
    capacity, narrowest = min((min(matrix(site).shape), name) for name, site in targets.items())
    if kind.slice_of is None:
        SpectralSlice(0, config.rank).check_fits(capacity, narrowest)
        yield SpectralSlice(0, config.rank)
        return
    library, gated = Library(config.library or config.output_dir), config.gating == "tokens"
    with library.reserve(
        base_info(pipe), config.rank, capacity=capacity, layout=config.layout, slots=config.slots,
        slice_of=kind.slice_of, directions=named_slice(config) or resumed, replacing=config.token,
        gated=gated, share=gated and config.slice is None and not config.exclusive_slice,
    ) as reservation:  # fmt: skip
        reservation.slice.check_fits(capacity, narrowest)
        if reservation.sharers:
            logger.warning(
                "%s%s shares slice %s with %s; their tokens keep gated concepts apart.",
                "" if resumed else "No slice is free: ", config.token, reservation.slice, _counted(reservation.sharers),
            )  # fmt: skip
        yield reservation.slice


def _counted(owners: Sequence[str]) -> str:
    return f"{owners[0]} and {len(owners) - 1} more" if len(owners) > 1 else owners[0]


def named_slice(config: TrainingConfig) -> SpectralSlice | None:
    """The slice that the config names by its number, if it does."""
    if config.slice is None:
        return None
    if config.layout == "strided":
        return SpectralSlice.strided(config.slice, config.rank, config.slots)
    return SpectralSlice.contiguous(config.slice, config.rank)


def fresh_adapter(
    pipe: Pipeline, config: TrainingConfig, targets: Mapping[str, Site], directions: SpectralSlice,
    on_progress: OnProgress | None = None,
) -> Adapter:  # fmt: skip
    """An untrained adapter in float32 of the `targets` on the slice `directions`; its ΔW is zero.

    `on_progress(done, total)` counts layers.
    """
    kind, concept = ADAPTERS[config.adapter_type], Concept(config.token, config.noun, config.num_vectors)
    options, depth = LayerOptions(seed=config.seed, guard=config.guard), max(directions.stop, config.guard)
    layers: dict[str, AdapterLayer] = {}
    stored = StoredWeights(pipe)
    report = on_progress or reporter("computing the layers' singular directions")
    for number, (name, site) in enumerate(targets.items()):
        report(number, len(targets))
        spectrum = layer_spectrum(stored, name, site, depth) if kind.slice_of == "spectrum" else None
        layers[name] = kind.fresh(matrix(site).float(), directions, spectrum=spectrum, options=options)
    if stored.unknown:
        logger.warning(
            "This base is in half precision, and the files that its weights came from are not known or hold others: "
            "%d of %d slices are those of rounded weights. Open it with fusion.open_pipeline, or in float32.",
            len(stored.unknown), len(layers),
        )  # fmt: skip
    rows = {component: nn.Parameter(start) for component, start in initial_rows(pipe, concept).items()}
    branch = Branch(
        config.name, config.adapter_type, layers, (directions,) if kind.slice_of else (),
        target_patterns(pipe, config), (config.token,) if config.gating == "tokens" else (),
    )  # fmt: skip
    info = AdapterInfo(config.name, base_info(pipe), (concept,), Provenance(tool(), 0, config.seed))
    return Adapter(info, (branch,), {concept.token: rows})


def layer_spectrum(stored: StoredWeights, name: str, site: Site, depth: int) -> Spectrum:
    """The first `depth` directions of a layer's weight as the base's files store it, on the layer's device."""
    spectrum, device = cached_spectrum(stored.matrix(name, site), depth), matrix(site).device
    return Spectrum(*(part.to(device) for part in spectrum))


def named_parameters(adapter: Adapter) -> dict[str, nn.Parameter]:
    """Everything trainable under a stable name: `<layer>.<tensor>` and `<component>.token.<token>`."""
    named = {f"{name}.{key}": p for name, layer in adapter.layers.items() for key, p in layer.named_parameters()}
    for token, rows in adapter.tokens.items():
        named |= {f"{c}.token.{token}": row for c, row in rows.items() if isinstance(row, nn.Parameter)}
    return named


def parameter_groups(
    pipe: Pipeline, adapter: Adapter, config: TrainingConfig, targets: Mapping[str, Site]
) -> list[dict[str, Any]]:
    """Optimizer groups: UNet layers, text encoder layers and token rows at their own learning rates.

    With `balance_slices` every spectral parameter gets its layer's own rate, so that a slice far down the spectrum
    learns as fast as the first. Token rows have no weight decay: no word's embedding is near zero.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    stored = StoredWeights(pipe)
    for name, layer in adapter.layers.items():
        rate = config.learning_rate if component_of(name) == "unet" else config.text_encoder_lr
        if not rate:
            continue
        gains = {}
        if config.balance_slices:
            spectrum = layer_spectrum(stored, name, targets[name], config.rank)
            gains = layer.learning_rate_gains(spectrum.S[: config.rank])
        for key, parameter in layer.named_parameters():
            groups.setdefault(rate * gains.get(key, 1.0), []).append(parameter)
    rows = [row for per_component in adapter.tokens.values() for row in per_component.values()]
    decay = config.adam_weight_decay
    layers = [{"params": params, "lr": rate, "weight_decay": decay} for rate, params in groups.items()]
    return [*layers, {"params": rows, "lr": config.token_lr, "weight_decay": 0.0}] if config.token_lr else layers


def warn_about_gates(config: TrainingConfig, layers: list[str]) -> None:
    """Say where token gating cannot keep concepts apart, and where it makes a setting useless."""
    if ADAPTERS[config.adapter_type].slice_of is None:
        changed = {"slice": config.slice is not None, "layout": config.layout != "contiguous"}
        for name in (name for name, idle in (changed | {"balance_slices": config.balance_slices}).items() if idle):
            logger.warning("%s does nothing with adapter_type = '%s', which owns no slice.", name, config.adapter_type)
    if config.gating != "tokens":
        return
    if ungated := [name for name in layers if not sees_tokens(name)]:
        logger.warning(
            "%d of %d targeted layers see no tokens (%s, …); there %s acts on whole pictures whose prompt has it, so "
            "concepts drawn together will mix.", len(ungated), len(layers), ungated[0], config.token,
        )  # fmt: skip


def memory_advice(config: TrainingConfig, resolution: int) -> str:
    """The end of a sentence about too little memory: the settings that would take less, the most helpful first."""
    helpful = {
        "gradient_checkpointing = true": not config.gradient_checkpointing,
        f"train_batch_size below {config.train_batch_size} (with gradient_accumulation_steps)": (
            config.train_batch_size > 1
        ),
        "mixed_precision = 'bf16' or 'fp16'": config.mixed_precision == "no",
        f"a resolution below {resolution}": True,
    }
    return f"what helps: {', '.join(name for name, helps in helpful.items() if helps)}."


def tool() -> str:
    """What made an adapter, for its provenance."""
    try:
        return f"spectral-fusion {version('spectral-fusion')}"
    except PackageNotFoundError:
        return "spectral-fusion from source"
