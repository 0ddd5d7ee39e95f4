"""What a training starts from: a fresh adapter on its slice, attached live, and the groups its optimizer sees."""

from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import Adapter, AdapterInfo, BaseInfo, Branch, Concept, Provenance
from fusion.adapters.layer import AdapterLayer, LayerOptions
from fusion.errors import UnknownName, closest
from fusion.layer_names import component_of
from fusion.library.library_folder import Library
from fusion.library.spectrum_cache import cached_spectrum
from fusion.models.layer_sites import components, matrix, sites
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import base_info
from fusion.models.targets import default_targets, resolve
from fusion.models.tokens import initial_rows
from fusion.spectral.slices import SpectralSlice
from fusion.training.config import TrainingConfig


def fresh_adapter(
    pipe: Pipeline, config: TrainingConfig, held: ExitStack, resumed: SpectralSlice | None = None
) -> Adapter:
    """An untrained adapter for `config`, on a free slice; a slice reserved in a library is held until `held` closes.

    `resumed`: the slice of the training that is gone on with.

    Raises UnknownName for a target that names no layer, SliceConflict for a slice that is taken or does not fit.
    """
    if config.adapter_type not in ADAPTERS:
        near = closest(config.adapter_type, ADAPTERS)
        raise UnknownName(f"No adapter type is called '{config.adapter_type}'{near} There are: {', '.join(ADAPTERS)}.")
    kind, info = ADAPTERS[config.adapter_type], base_info(pipe)
    gated = config.gating == "tokens"
    learning = [c for c in components(pipe) if c == "unet" or config.text_encoder_lr]
    targets = tuple(config.targets or default_targets(learning, gated=gated))
    places = sites(pipe)
    names = resolve(targets, places)
    narrowest = min(names, key=lambda name: min(matrix(places[name]).shape))
    capacity = min(matrix(places[narrowest]).shape)
    directions = choose_slice(config, kind, info, capacity, held, resumed)
    directions.check_fits(capacity, narrowest)
    options = LayerOptions(seed=config.seed, guard=config.guard)
    layers = {name: fresh_layer(kind, matrix(places[name]), directions, options) for name in names}
    concept = Concept(config.token, config.noun, config.num_vectors)
    rows = {component: nn.Parameter(start) for component, start in initial_rows(pipe, concept).items()}
    slices = (directions,) if kind.slice_of else ()
    branch = Branch(config.name, config.adapter_type, layers, slices, targets, (config.token,) if gated else ())
    provenance = Provenance(f"spectral-fusion {tool_version()}", 0, config.seed, (), config.lasting_settings())
    return Adapter(AdapterInfo(config.name, info, (concept,), provenance), (branch,), {concept.token: rows})


def choose_slice(
    config: TrainingConfig, kind: type[AdapterLayer], base: BaseInfo, capacity: int, held: ExitStack,
    resumed: SpectralSlice | None = None,
) -> SpectralSlice:  # fmt: skip
    """The slice the config names, or that of the training that is resumed, or the library's next free one."""
    if kind.slice_of is None:
        return SpectralSlice(0, config.rank)
    wanted = resumed
    if config.slice is not None and config.layout == "strided":
        wanted = SpectralSlice.strided(config.slice, config.rank, config.slots)
    elif config.slice is not None:
        wanted = SpectralSlice.contiguous(config.slice, config.rank)
    where: dict[str, Any] = {
        "capacity": capacity,
        "layout": config.layout,
        "slots": config.slots,
        "slice_of": kind.slice_of,
    }
    library = Library(config.library or config.output_dir)
    reserved = library.reserve(base, config.rank, wanted=wanted, replacing=config.token, **where)
    return held.enter_context(reserved).slice


def fresh_layer(
    kind: type[AdapterLayer], weight: Tensor, directions: SpectralSlice, options: LayerOptions
) -> AdapterLayer:
    """One untrained layer in float32; the SVD comes from the cache when the type needs one."""
    exact = weight.float()
    depth = max(directions.stop, options.guard)
    spectrum = cached_spectrum(exact, depth) if kind.slice_of == "spectrum" else None
    return kind.fresh(exact, directions, spectrum=spectrum, options=options)


def parameter_groups(pipe: Pipeline, adapter: Adapter, config: TrainingConfig) -> list[dict[str, Any]]:
    """Optimizer groups: UNet layers, text encoder layers and token rows at their own learning rates.

    With `balance_slices` every spectral parameter gets its layer's own rate, so that a slice far down the spectrum
    learns as fast as the first. Token rows are pulled by no weight decay: zero is no meaning of a word.
    """
    places = sites(pipe)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, layer in adapter.layers.items():
        rate = config.learning_rate if component_of(name) == "unet" else config.text_encoder_lr
        if not rate:
            continue
        gains = {}
        if config.balance_slices:
            spectrum = cached_spectrum(matrix(places[name]).float(), config.rank)
            gains = layer.learning_rate_gains(spectrum.S[: config.rank])
        for key, parameter in layer.named_parameters():
            groups.setdefault(rate * gains.get(key, 1.0), []).append(parameter)
    rows = [row for per_component in adapter.tokens.values() for row in per_component.values()]
    decay = config.adam_weight_decay
    made = [{"params": params, "lr": rate, "weight_decay": decay} for rate, params in groups.items()]
    return [*made, {"params": rows, "lr": config.token_lr, "weight_decay": 0.0}] if config.token_lr else made


def tool_version() -> str:
    try:
        return version("spectral-fusion")
    except PackageNotFoundError:
        return "from source"
