"""The steps between training and pictures: fusing, attaching, files, spectra."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import fusion
from benchmarks.bases import Base
from benchmarks.clock import Timing, repeated, timed
from benchmarks.report import Section, bar, table
from fusion.adapters.adapter import Adapter
from fusion.library.spectrum_cache import cached_spectrum
from fusion.models.attachment import Attachment

ROUNDS = 5
Log = Callable[[str], None]


def time_attachment(base: Base, adapters: Sequence[Adapter]) -> tuple[Timing, Timing]:
    """Seconds of attaching some adapters, and of detaching them again."""
    handles: list[Attachment] = []
    attaching: list[float] = []
    detaching: list[float] = []
    for _ in range(ROUNDS + 1):
        attaching.append(timed(lambda: handles.extend(fusion.attach(base.pipe, adapter) for adapter in adapters)))
        detaching.append(timed(lambda: [handle.detach() for handle in handles]))
        handles.clear()
    return Timing(tuple(attaching[1:])), Timing(tuple(detaching[1:]))


def measure(base: Base, log: Log) -> Section:
    ten = [base.adapter("additive", k) for k in range(10)]
    log("ten adapters made")
    attach, detach = time_attachment(base, ten[:1])
    attach_ten, detach_ten = time_attachment(base, [fusion.fuse(ten)])
    rows = [
        _row("fuse three", repeated(lambda: fusion.fuse(ten[:3]), ROUNDS)),
        _row("fuse ten", repeated(lambda: fusion.fuse(ten), ROUNDS), 3),
        _row("the same, merged and compressed to rank 32", Timing((timed(lambda: fusion.fuse(ten, rank=32)),))),
        _row("attach one", attach),
        _row("remove one", detach),
        _row("attach ten fused", attach_ten),
        _row("remove ten fused", detach_ten),
    ]
    text = (
        f"Additive adapters of rank {base.rank} on {len(base.weights)} layers, each on its own slice, ungated. "
        "Attaching includes the check that every layer's stored basis belongs to this base."
    )
    return Section("Fusing and attaching", text, [table(["", "median", "least", "bar"], rows)])


def measure_files(base: Base, log: Log) -> Section:
    kinds = {
        "additive": base.adapter("additive"),
        "additive, token-gated targets": base.adapter("additive", gated=True),
        "rotational": base.adapter("rotational"),
        "LoRA": base.adapter("lora"),
    }
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, adapter in kinds.items():
            path = Path(folder) / "adapter.safetensors"
            fusion.save(adapter, path, dtype="float16")
            megabytes, loading = path.stat().st_size / 1e6, repeated(lambda path=path: fusion.load(path), ROUNDS)
            limited = name == "additive" and not base.toy
            rows.append(
                [
                    name,
                    str(len(adapter.layers)),
                    bar(megabytes, 9, " MB") if limited else f"{megabytes:.2f} MB",
                    bar(loading.median, 0.5, " s") if limited else f"{loading.median:.3f} s",
                ]
            )
            log(f"{name}: {megabytes:.2f} MB")
    text = f"Rank {base.rank}, float16, self-contained: the slice's basis and the token are in the file."
    return Section("Files", text, [table(["adapter", "layers", "file", "loading"], rows)])


def measure_spectra(base: Base, log: Log) -> Section:
    depths = (base.rank, 10 * base.rank)
    with tempfile.TemporaryDirectory() as folder:

        def spectra(depth: int) -> None:
            for weight in base.weights.values():
                cached_spectrum(weight, depth, Path(folder))

        cold = timed(lambda: spectra(depths[0]))
        log(f"cold: {cold:.1f} s")
        warm = {depth: repeated(lambda depth=depth: spectra(depth), ROUNDS) for depth in depths}
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    rows = [
        ["cold: every weight decomposed and stored", f"{cold:.1f} s"],
        *(
            [f"warm, first {depth} directions", f"{t.median:.2f} s" if base.toy else bar(t.median, 1, " s")]
            for depth, t in warm.items()
        ),
        ["cache on disk", f"{size / 1e6:,.0f} MB"],
    ]
    text = f"Singular directions of {len(base.weights)} weights, once per base however many concepts are trained."
    return Section("Spectra", text, [table(["", "measured"], rows)])


def _row(name: str, timing: Timing, limit: float | None = None) -> list[str]:
    result = "" if limit is None else bar(timing.median, limit, " s")
    return [name, f"{timing.median:.3f} s", f"{timing.least:.3f} s", result]
