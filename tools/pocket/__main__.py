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
    part = stages.add_parser("autoencoder", help="128 px to latents and back")
    training(part, steps=3000, rate=2e-3, batch=8)
    part.add_argument(
        "--keep-code", type=float, default=0.5, help="with --start: weight of its code (default: %(default)s)"
    )
    part.add_argument("--freeze-encoder", action="store_true", help="go on with the decoder alone")
    part = stages.add_parser("tokenizer", help="words to numbers")
    part.add_argument("--start", type=Path, help="an older pocket whose tokenizer is kept (default: learn one)")
    part = stages.add_parser("latents", help="encode scenes for the denoiser")
    part.add_argument("--count", type=int, default=60_000, help="scenes in all (default: %(default)s)")
    part = stages.add_parser("denoiser", help="UNet and text encoder")
    training(part, steps=6000, rate=2e-3, batch=64)
    part.add_argument(
        "--decay", type=float, default=0.5, help="share of steps with falling rate (default: %(default)s)"
    )
    part.add_argument("--name", default="denoiser", help="its folder, for trials (default: %(default)s)")
    part = stages.add_parser("judge", help="pocket-clip")
    part.add_argument("--steps", type=int, default=3000, help="default: %(default)s")
    part.add_argument("--rate", type=float, default=2e-3, help="default: %(default)s")
    part.add_argument("--batch", type=int, default=80, help="default: %(default)s")
    part = stages.add_parser("classifier", help="a plain classifier to check the judge")
    part.add_argument("--steps", type=int, default=2000, help="default: %(default)s")
    part.add_argument("--rate", type=float, default=3e-3, help="default: %(default)s")
    part.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    part = stages.add_parser("evaluate", help="every bar, on fixed prompts and seeds")
    part.add_argument("--only", nargs="*", default=[], help="parts of it (default: all)")
    part.add_argument("--every", type=int, default=1, help="take each n-th prompt only, for a quick look")
    part.add_argument("--pictures", type=int, default=2048, help="for the distance (default: %(default)s)")
    part = stages.add_parser("card", help="the folders as they are shipped, with model cards")
    part.add_argument("--no-sheet", dest="sheet", action="store_false", help="leave out the contact sheet")
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
