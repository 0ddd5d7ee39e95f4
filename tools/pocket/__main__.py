"""Run one stage: `python -m tools.pocket STAGE [options]`; `--help` lists them."""

import argparse
from pathlib import Path

import torch

WORK = Path.home() / ".cache" / "spectral-fusion" / "pocket"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.pocket", description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="where everything is made (default: %(default)s)")
    stages = parser.add_subparsers(dest="stage", required=True)
    stages.add_parser("artwork", help="fetch the icon sets and draw them as sprites")
    training(stages.add_parser("autoencoder", help="128 px to latents and back"), steps=3000, rate=2e-3, batch=8)
    options = vars(parser.parse_args())
    torch.set_flush_denormal(True)
    stage, work = options.pop("stage"), options.pop("work")
    __import__(f"tools.pocket.{stage}", fromlist=["run"]).run(work, **options)


def training(parser: argparse.ArgumentParser, *, steps: int, rate: float, batch: int) -> None:
    parser.add_argument("--start", type=Path, help="an older pocket to start from (default: from nothing)")
    parser.add_argument("--steps", type=int, default=steps, help="in all, resumed ones too (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=rate, help="learning rate (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=batch, help="default: %(default)s")


if __name__ == "__main__":
    main()
