"""Show the contents of adapter files; of several also which directions they own and how much they interfere."""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusion.cli.console import (
    add_base,
    add_overwrite,
    file_size,
    on_base,
    print_compatibility,
    print_labelled,
    print_table,
)
from fusion.distillation.held_out_errors import HeldOutErrors
from fusion.output_files import check_output

WIDTH = 64  # characters of the slice map
COLUMNS = 9  # how many facts the table of several adapters shows


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion inspect PATH ... [options]"
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="adapter files, LoRA files, or folders of them")
    text = "also draw slice map and interference as .png, .svg or .pdf"
    add("-o", "--output", "--plot", dest="plot", type=Path, metavar="FILE", help=text)
    add_base(parser.add_argument_group("base"), "for a DoRA, whose change depends on it: ")
    add("--json", action="store_true", help="print everything as JSON")
    add_overwrite(parser)


def run(args: Namespace) -> None:
    from fusion.composition.compatibility_report import compatibility
    from fusion.formats.adapter_file import load

    if args.plot:
        from fusion.evaluation.plots import MARKS

        check_output(args.plot, endings=tuple(MARKS), overwrite=args.overwrite)
    files = list(expand(args.paths))
    adapters = on_base([load(path) for path in files], args)
    report = compatibility(adapters)
    measured = report.interference  # each branch of a fused adapter counts, as in `slices`
    slices = [branch.slices for adapter in adapters for branch in adapter.branches]
    capacity = min(min(delta.shape) for adapter in adapters for delta in adapter.deltas().values())
    if args.plot:
        from fusion.evaluation.plots import overview, write

        write(overview(measured.names, slices, measured.cosine, capacity=capacity), args.plot, overwrite=True)
    if args.json:
        contents = [describe(adapter, path) for adapter, path in zip(adapters, files, strict=True)]
        print(json.dumps({"adapters": contents, "compatibility": report.to_json()}, indent=2))
        return
    rows = [facts(adapter, path) for adapter, path in zip(adapters, files, strict=True)]
    if len(adapters) == 1:
        for label, text in rows[0].items():
            if text:
                print_labelled(f"{label:<10}", text)
    else:
        print_table([list(rows[0])[:COLUMNS], *([text or "-" for text in row.values()][:COLUMNS] for row in rows)])
    if len(slices) > 1:
        print_slices(measured.names, slices, capacity)
        print_matrix(measured)
    if len(adapters) > 1:
        print()
        print_compatibility(report.verdict, report)
    if args.plot:
        print(f"\nwrote {args.plot}")


def expand(paths: list[Path]) -> Iterator[Path]:
    """Files as they are, folders as the adapters in them."""
    from fusion.errors import FormatError
    from fusion.library.library_folder import Library

    for path in paths:
        if not path.is_dir():
            yield path
        elif files := [entry.path for entry in Library(path).adapters()]:
            yield from files
        else:
            raise FormatError(f"There is no adapter in '{path}'.")


def describe(adapter: Any, path: Path) -> dict[str, Any]:
    """The contents of a file, for programs."""
    from fusion.formats.hub_file import local_file

    branches = [
        {**vars(b), "slices": [part.to_json() for part in b.slices], "layers": list(b.layers)} for b in adapter.branches
    ]
    about = {
        "file": str(path),
        "bytes": local_file(path).stat().st_size,
        "digest": adapter.digest(),
        "rank": adapter.rank,
    }
    return {**about, **asdict(adapter.info), "branches": branches}


def facts(adapter: Any, path: Path) -> dict[str, str]:
    """The contents of a file, for people."""
    from fusion.formats.hub_file import local_file

    info, provenance, branches = adapter.info, adapter.info.provenance, adapter.branches
    errors = HeldOutErrors.from_json(provenance.settings.get("errors"))
    layers = Counter(name.partition(".")[0] for name in adapter.layer_names)
    return {
        "adapter": info.name,
        "concepts": " ".join(concept.token for concept in info.concepts),
        "type": ", ".join(dict.fromkeys(branch.type for branch in branches)),
        "slice": ", ".join(map(str, adapter.slices)),
        "rank": str(adapter.rank),
        "layers": ", ".join(f"{count} {part}" for part, count in layers.items()),
        "acts": "at its tokens" if all(branch.gate for branch in branches) else "everywhere",
        "base": info.base.name if info.base else "not known",
        "size": file_size(local_file(path)),
        # The table of several adapters ends here.
        "vectors": ", ".join(f"{c.vectors} for {c.token}, from '{c.noun}'" for c in info.concepts),
        "strength": ", ".join(f"{b.name} {b.strength:g}" for b in branches if b.strength != 1),
        "targets": ", ".join(dict.fromkeys(target for branch in branches for target in branch.targets)),
        "numbers": f"{sum(p.numel() for p in adapter.parameters()):,} trained",
        "steps": f"{provenance.steps}, seed {provenance.seed}" if provenance.steps else "",
        "parents": ", ".join(provenance.parents),
        "distilled": errors.sentence(len(info.concepts)) if errors else "",
        "settings": ", ".join(f"{key} {value}" for key, value in provenance.settings.items() if key != "errors"),
        "contents": adapter.digest()[:12],
    }


def print_slices(names: Sequence[str], slices: Sequence[Any], capacity: int) -> None:
    """The slice map as text: a line for each adapter, a character for one or several directions."""
    end = min(capacity, max(16, 2 * max((part.stop for parts in slices for part in parts), default=0)))
    step = -(-end // WIDTH)
    owned, shared, free = "█▒·" if (sys.stdout.encoding or "").lower().startswith("utf") else "#x."
    cells = [{i // step for part in parts for i in part.indices} for parts in slices]
    owners = Counter(cell for row in cells for cell in row)
    width = max(map(len, names))
    print(f"\nslices: singular directions 0-{end - 1} of {capacity}" + (f", {step} a character" if step > 1 else ""))
    for name, parts, row in zip(names, slices, cells, strict=True):
        line = ((shared if owners[c] > 1 else owned) if c in row else free for c in range(-(-end // step)))
        print(f"  {name:<{width}}  {''.join(line)}  {', '.join(map(str, parts)) or 'owns none'}")


def print_matrix(measured: Any) -> None:
    """Cosines of ΔW, and the part of each that remains in the sum."""
    rows = [("", *measured.names, "kept")]
    for i, (name, line) in enumerate(zip(measured.names, measured.cosine, strict=True)):
        cosines = ("1" if i == j else f"{round(value, 3) + 0.0:+.3f}" for j, value in enumerate(line))
        rows.append((name, *cosines, f"{measured.retention[i]:.2f}"))
    print("\ninterference: cosine of ΔW; kept = the part of each that remains in the sum of all")
    print_table(rows, indent="  ")
    print(f"  the sum is {measured.energy_ratio:.2f} times as large as the largest of them")
