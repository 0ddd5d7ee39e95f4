"""Say what adapter files hold; for several, which directions they own and how much they interfere."""

import argparse
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusion.cli.console import columns, size, terminal_width, verdict

WIDTH = 64  # characters of the slice map


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "fusion inspect PATH ... [options]"
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="adapter files, LoRA files, or folders of them")
    add("--plot", type=Path, metavar="FILE", help="also draw slice map and interference as .png, .svg or .pdf")
    add("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    from fusion.composition.verdict import compatibility
    from fusion.formats.reading import load

    files = list(expand(args.paths))
    adapters = [load(path) for path in files]
    report = compatibility(adapters) if len(adapters) > 1 or len(adapters[0].branches) > 1 else None
    if args.plot:
        draw(adapters, report, args.plot)
    if args.json:
        known = [describe(adapter, path) for adapter, path in zip(adapters, files, strict=True)]
        print(json.dumps({"adapters": known, "compatibility": report.to_json() if report else None}, indent=2))
        return
    if len(adapters) == 1:
        print_one(adapters[0], files[0])
    else:
        print_table(adapters, files)
    if report:
        print_slices(adapters)
        print_matrix(report.interference)
    if len(adapters) > 1:
        print()
        verdict(report.verdict, report)
    if args.plot:
        print(f"\nwrote {args.plot}")


def expand(paths: list[Path]) -> Iterator[Path]:
    """Files as they are, folders as the adapters in them."""
    from fusion.errors import FormatError
    from fusion.formats.library import Library

    for path in paths:
        if not path.is_dir():
            yield path
        elif found := [entry.path for entry in Library(path).adapters()]:
            yield from found
        else:
            raise FormatError(f"There is no adapter in '{path}'.")


def describe(adapter: Any, path: Path) -> dict[str, Any]:
    """Everything a file says of itself, as JSON."""
    info, made = adapter.info, adapter.info.provenance
    branches = [
        {**vars(b), "slices": [part.to_json() for part in b.slices], "layers": list(b.layers)} for b in adapter.branches
    ]
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "digest": adapter.digest(),
        "name": info.name,
        "base": vars(info.base) if info.base else None,
        "concepts": [vars(concept) for concept in info.concepts],
        "branches": branches,
        "rank": adapter.rank,
        "provenance": vars(made) | {"settings": dict(made.settings)},
    }


def print_one(adapter: Any, path: Path) -> None:
    info, made = adapter.info, adapter.info.provenance
    rows = [("concept", f"{c.token} from '{c.noun}', {c.vectors} vector{'s' * (c.vectors > 1)}") for c in info.concepts]
    for b in adapter.branches:
        slices = f" on slice {', '.join(map(str, b.slices))}" if b.slices else ""
        strength = "" if b.strength == 1 else f", strength {b.strength:g}"
        gate = f"at {' '.join(b.gate)} only" if b.gate else "on every token"
        rows += [("branch", f"{b.name}: {b.type}{slices}{strength}, acts {gate}"), ("", ", ".join(b.targets))]
    counts = Counter(name.partition(".")[0] for name in adapter.layer_names)
    parameters = sum(p.numel() for p in adapter.parameters())
    rows += [("layers", ", ".join(f"{count} in {part}" for part, count in counts.items()))]
    rows += [("change", f"rank {adapter.rank} at most, {parameters:,} trained numbers")]
    rows += [("base", f"{info.base.name} ({info.base.family}, {info.base.prediction})" if info.base else "not known")]
    rows += [("trained", f"{made.steps} steps, seed {made.seed}")] if made.steps else []
    rows += [
        ("parents", ", ".join(made.parents)),
        ("settings", ", ".join(f"{k} {v}" for k, v in made.settings.items())),
    ]
    print(f"{path}  {size(path)}, contents {adapter.digest()[:12]}")
    for label, text in rows:
        if text:
            indent = f"  {label:<10}"
            print(textwrap.fill(text, terminal_width(), initial_indent=indent, subsequent_indent=" " * len(indent)))


def print_table(adapters: list[Any], files: list[Path]) -> None:
    rows = [("adapter", "concepts", "type", "slice", "rank", "layers", "acts", "base", "size")]
    for adapter, path in zip(adapters, files, strict=True):
        concepts = " ".join(concept.token for concept in adapter.info.concepts) or "-"
        types = ", ".join(dict.fromkeys(branch.type for branch in adapter.branches))
        slices = ", ".join(map(str, adapter.slices)) or "-"
        acts = "at its tokens" if all(branch.gate for branch in adapter.branches) else "everywhere"
        base = adapter.info.base.name if adapter.info.base else "not known"
        sizes = (str(adapter.rank), str(len(adapter.layer_names)))
        rows.append((adapter.info.name, concepts, types, slices, *sizes, acts, base, size(path)))
    print("\n".join(columns(rows)))


def owned(adapters: list[Any]) -> dict[str, tuple[Any, ...]]:
    """Slices by the name the interference matrix uses: a fused adapter is taken apart into its branches."""
    found: dict[str, tuple[Any, ...]] = {}
    for adapter in adapters:
        for branch in adapter.branches:
            name = adapter.info.name if len(adapter.branches) == 1 else branch.name
            while name in found:
                name += "'"
            found[name] = branch.slices
    return found


def capacity(adapters: list[Any]) -> int:
    """How many singular directions the narrowest layer has."""
    return min(min(delta.shape) for adapter in adapters for delta in adapter.deltas().values())


def print_slices(adapters: list[Any]) -> None:
    slices, available = owned(adapters), capacity(adapters)
    if not any(slices.values()):
        return
    end = min(available, max(16, 2 * max(part.stop for parts in slices.values() for part in parts)))
    step = -(-end // WIDTH)
    mine, shared, free = "█▒·" if (sys.stdout.encoding or "").lower().startswith("utf") else "#x."
    width = max(map(len, slices))
    print(f"\nslices: singular directions 0-{end - 1} of {available}" + (f", {step} a character" if step > 1 else ""))
    for name, parts in slices.items():
        own = {i // step for part in parts for i in part.indices}
        others = {i // step for n, ps in slices.items() if n != name for part in ps for i in part.indices}
        line = (shared if c in own & others else mine if c in own else free for c in range(-(-end // step)))
        print(f"  {name:<{width}}  {''.join(line)}  {', '.join(map(str, parts)) or 'owns none'}")


def print_matrix(measured: Any) -> None:
    """Cosines of ΔW, and what each keeps of itself in the sum."""
    names = measured.names
    rows = [("", *names, "kept")]
    for i, name in enumerate(names):
        cosines = ["1" if i == j else f"{round(value, 3) + 0.0:+.3f}" for j, value in enumerate(measured.cosine[i])]
        rows.append((name, *cosines, f"{measured.retention[i]:.2f}"))
    print("\ninterference: cosine of ΔW; kept = how much of each is left in the sum of all")
    print("\n".join(f"  {line}" for line in columns(rows)))
    print(f"  the sum is {measured.energy_ratio:.2f} times as large as the strongest of them")


def draw(adapters: list[Any], report: Any, path: Path) -> None:
    from fusion.evaluation.plots import overview, slice_map, write

    if report is None:
        write(slice_map(owned(adapters), capacity=capacity(adapters)), path)
    else:
        measured = report.interference
        write(overview(owned(adapters), measured.names, measured.cosine, capacity=capacity(adapters)), path)
