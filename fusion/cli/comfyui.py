"""Write ComfyUI's nodes for spectral adapters: a folder for its custom_nodes, which needs no packages of its own."""

from argparse import ArgumentParser, Namespace
from pathlib import Path


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion comfyui --output_dir DIR [--overwrite]"
    parser.epilog = "example: fusion comfyui --output_dir ComfyUI/custom_nodes/comfyui-spectral-fusion"
    add = parser.add_argument
    add("-o", "--output_dir", required=True, type=Path, metavar="DIR", help="the folder of the nodes")
    add("--overwrite", action="store_true", help="replace a folder of something else")


def run(args: Namespace) -> None:
    from fusion.comfyui.node_folder import write_node_folder

    print(f"wrote {write_node_folder(args.output_dir, overwrite=args.overwrite)}")
    print("next: put adapters into ComfyUI/models/spectral_adapters, and start ComfyUI again")
