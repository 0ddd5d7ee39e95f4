"""`python -m benchmarks.gpu`: what of the toolkit holds on a GPU, then what it costs there. Under four minutes.

Checks come first, a line each; then tables at Stable Diffusion 1.5's shape. With `--compiled`
drawing with compiled UNets instead, with `--sdxl` SDXL's shape: under five minutes each. `--device cpu` runs the same
at toy size. Exits with 1 if a check fails; a bar that is missed fails none.
"""

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda, cuda:1, mps; cpu: toy size")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of each training among the checks")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", choices=("checks", "numbers"))
    which.add_argument("--compiled", action="store_true", help="drawing with compiled UNets")
    which.add_argument("--sdxl", action="store_true", help="training and drawing at SDXL's shape")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown to write it to; other sections are kept")
    options = parser.parse_args()
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # read at import: advice for their own users
        os.environ.setdefault(name, "error")
    import torch

    from benchmarks.gpu import compiled, numbers, sdxl
    from benchmarks.gpu.checks import Checks, check_product
    from benchmarks.report import Section, table, write
    from fusion.models.devices import as_device

    checks, device = Checks(), as_device(options.device)
    toy = device.type == "cpu"
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # the card that is waited for
    if options.compiled:
        compiled.measure(options.device, checks, toy=toy)
    elif options.sdxl:
        sdxl.measure(options.device, checks, toy=toy)
    else:
        if options.only != "numbers":
            check_product(options.device, checks, options.steps)
            compiled.check_toy(options.device, checks)
        if options.only != "checks":
            numbers.measure(options.device, checks, toy=toy)
    if options.output:
        title = "GPU: checks" + ", compiled" * options.compiled + ", SDXL" * options.sdxl
        section = Section(title, numbers.card(device), [table(["check", "", ""], checks.rows)])
        write(options.output, [section, *checks.sections])
    print(f"{checks.failed} failed, {checks.seconds():.0f} s")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
