"""Add an adapter to the weights and the vocabulary of the base, and save the result as a diffusers folder.

Any program that reads diffusers folders can draw with it. It cannot be undone, and baked weights have no gates: every
concept acts on every token. The folder is written in the precision of the base's UNet on disk, or that of --dtype.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fusion.cli.console import add_base_arguments, add_overwrite, example, open_base


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion bake ADAPTER -o FOLDER [options]"
    parser.epilog = "example: fusion bake pets.safetensors -o pets-model --gating none"
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="an adapter file, single or fused")
    add("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the new base, a new folder")
    add("--gating", choices=("tokens", "none"), help="none: accept that baked weights act on every token")
    add_overwrite(parser)
    add_base_arguments(parser, dtype="that of the base's UNet on disk")


def run(args: Namespace) -> None:
    from fusion.formats.adapter_file import load
    from fusion.models.baking import bake, check_model_output, save_model

    check_model_output(args.output, overwrite=args.overwrite)
    adapter = load(args.adapter)
    pipe = open_base(args.base, args, args.dtype or "stored")
    bake(pipe, adapter, args.gating)
    save_model(pipe, args.output, overwrite=args.overwrite)
    tokens = [concept.token for concept in adapter.info.concepts]
    print(f"wrote {args.output}: {' '.join(tokens) or adapter.info.name} baked in")
    prompt = f"a {tokens[0]}" if tokens else "a photo"
    print(f"next: {example('generate', '--base', args.output, '--prompt', prompt)}")
