"""Regression and the method it replaces: gradient fusion by 500 iterations of LBFGS, on the same second moments."""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.bases import Base
from benchmarks.clock import repeated, timed
from benchmarks.report import Section, bar, table
from fusion.adapters import ADAPTERS
from fusion.adapters.adapter import Adapter, AdapterInfo, Branch, Concept
from fusion.layer_names import sees_tokens
from fusion.methods import METHODS, MethodOptions
from fusion.models.input_moments import record_moments
from fusion.models.pipelines import base_info
from fusion.models.tokens import initial_rows
from fusion.spectral.delta import Delta
from fusion.spectral.moments import Moment, Moments, response
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import decompose

CONCEPTS = 3
ROUNDS = 3
ITERATIONS = {True: 500, False: 50}  # Mix-of-Show's, for layers whose inputs are tokens and for the others
PROMPTS, CONCEPT_FREE = ("a photo of a {token}",), ("a tree and a car on a green background", "a photo")


def measure(base: Base, log: Callable[[str], None]) -> Section:
    counts = Counter(tuple(weight.shape) for weight in base.weights.values())
    layers = {tuple(weight.shape): name for name, weight in base.weights.items()}  # one layer of each shape
    adapters = _adapters(base, list(layers.values()))
    moments: list[Moments] = []
    options: dict[str, Any] = {"prompts": PROMPTS, "concept_free": CONCEPT_FREE, "steps": 1}
    with _small_latents(base.pipe.unet):
        recording = timed(lambda: moments.extend(record_moments(base.pipe, adapters, **options)))
    log(f"moments recorded in {recording:.0f} s")
    strengths = [1.0] * CONCEPTS
    rows: list[list[str]] = []
    seconds = {"regression": 0.0, "gradient": 0.0}
    worst = 0.0
    for shape, layer in sorted(layers.items()):
        steps = 20 if base.toy else ITERATIONS[sees_tokens(layer)]
        fusing = MethodOptions(iterations=steps)
        deltas = [adapter.deltas()[layer] for adapter in adapters]
        inputs = [each.layers[layer] for each in moments]
        results: dict[str, Delta] = {}

        def fuse(name: str, layer=layer, deltas=deltas, inputs=inputs, results=results, options=fusing) -> None:
            results[name] = METHODS[name](layer, deltas, strengths, moments=inputs, options=options)

        times = {
            "regression": repeated(lambda fuse=fuse: fuse("regression"), ROUNDS).median,
            "gradient": timed(lambda fuse=fuse: fuse("gradient")),
        }
        seconds = {name: total + times[name] * counts[shape] for name, total in seconds.items()}
        errors = {name: _error(results[name], deltas, inputs) for name in times}
        worst = max(worst, errors["regression"] / errors["gradient"])
        rows.append(
            [
                f"{shape[0]} × {shape[1]}",
                str(counts[shape]),
                str(steps),
                f"{times['regression']:.4f} s",
                f"{times['gradient']:.1f} s",
                f"{times['gradient'] / times['regression']:,.0f}×",
                f"{errors['regression']:.5f}",
                f"{errors['gradient']:.5f}",
            ]
        )
        log(", ".join(rows[-1]))
    rows.append(
        [
            "all layers, by their number",
            str(sum(counts.values())),
            "",
            f"{seconds['regression']:.1f} s",
            f"{seconds['gradient']:,.0f} s",
            f"{seconds['gradient'] / seconds['regression']:,.0f}×",
            "",
            "",
        ]
    )
    columns = ["weight", "layers", "iterations", "regression", "LBFGS", "faster", "its error", "LBFGS's error"]
    bars = [
        ["regression's error to LBFGS's, the worst layer", bar(worst, 1.01)],
        ["regression's time to LBFGS's, all layers", bar(seconds["regression"] / seconds["gradient"], 0.02)],
    ]
    text = (
        f"{CONCEPTS} additive adapters of rank {base.rank}, ungated, on one layer of each shape; the inputs are those "
        f"of this base, recorded in {recording:.0f} s. LBFGS has the original's iterations, both start "
        "from the recorded moments, in float64. Error: root of Σ‖(ΔW − ΔWᵢ)Xᵢ‖² / Σ‖ΔWᵢXᵢ‖²."
    )
    return Section("Regression against gradient fusion", text, [table(columns, rows), table(["bar", "measured"], bars)])


@contextmanager
def _small_latents(unet: Any) -> Generator[None]:
    """Record at 16×16 latents at most: the width of the inputs matters here, not their number."""
    side = unet.config.sample_size
    unet.register_to_config(sample_size=min(side, 16))
    yield
    unet.register_to_config(sample_size=side)


def _adapters(base: Base, layers: Sequence[str]) -> list[Adapter]:
    """Random adapters, each on its own slice of these layers."""
    spectra = {name: decompose(base.weights[name]) for name in layers}
    adapters: list[Adapter] = []
    for k in range(CONCEPTS):
        concept, directions = Concept(f"<concept-{k}>", "dog"), SpectralSlice.contiguous(k, base.rank)
        kind, generator = ADAPTERS["additive"], torch.Generator().manual_seed(k)
        parts = {n: kind.fresh(base.weights[n], directions, spectrum=spectra[n]) for n in layers}
        for layer in parts.values():
            for parameter in layer.parameters():
                parameter.data.normal_(0, 1e-2, generator=generator)
        branch = Branch(f"concept-{k}", "additive", parts, (directions,))
        info = AdapterInfo(f"concept-{k}", base_info(base.pipe), (concept,))
        adapters.append(Adapter(info, (branch,), {concept.token: initial_rows(base.pipe, concept)}))
    return adapters


def _error(fused: Delta, deltas: Sequence[Delta], moments: Sequence[Moment]) -> float:
    difference = sum(float(response(fused + d * -1.0, m.own) ** 2) for d, m in zip(deltas, moments, strict=True))
    return (difference / sum(float(response(d, m.own) ** 2) for d, m in zip(deltas, moments, strict=True))) ** 0.5
