"""`python -m benchmarks.gpu`: what of the toolkit holds on a GPU, then what it costs there. Under four minutes.

Checks come first, a line each; then the tables "GPU" and "Drawing" at Stable Diffusion 1.5's shape. With `--compiled`
drawing with compiled UNets instead, with `--sdxl` SDXL's shape: under five minutes each. `--device cpu` runs the same
at toy size. Exits with 1 if a check fails; a bar that is missed fails none.
"""

import argparse
import os
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda, cuda:1, mps; cpu: toy size")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of each training among the checks")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", choices=("checks", "numbers"))
    which.add_argument("--compiled", action="store_true", help="drawing with compiled UNets")
    which.add_argument("--sdxl", action="store_true", help="training and drawing at SDXL's shape")
    options = parser.parse_args()
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # read at import: advice for their own users
        os.environ.setdefault(name, "error")
    import torch

    from benchmarks.gpu import compiled, numbers, sdxl
    from benchmarks.gpu.checks import Checks, check_product

    if options.device.startswith("cuda:"):
        torch.cuda.set_device(options.device)  # which is what is waited for, and measured
    checks, toy = Checks(), options.device == "cpu"
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
    print(f"{checks.failed} failed, {checks.seconds():.0f} s")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
