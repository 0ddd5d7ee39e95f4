"""Share an adapter on the Hugging Face Hub, with its LoRA and embeddings for diffusers, pictures and a card.

Others use it by its id: `fusion generate user/dog`, `fusion.load("user/dog@revision")`. Log in with `hf auth login`.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from fusion.cli.console import add_base, add_overwrite, example, on_base


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion push ADAPTER REPOSITORY [options]"
    parser.epilog = "example: fusion push out/dog.safetensors user/dog --picture out/snow.png"
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="an adapter file, single or fused")
    add("repository", metavar="REPOSITORY", help="its id, user/dog")
    text = "for the card, with its prompt where generate drew it; repeatable (default: the picture beside the adapter)"
    add("--picture", action="append", type=Path, default=[], metavar="FILE", help=text)
    add_hub_options(parser)
    add_overwrite(parser)
    add_base(parser.add_argument_group("base"), "for the card and for DoRAs: ")


def add_hub_options(group: Any) -> None:
    """How a repository is written, under the names that diffusers' and transformers' scripts have."""
    add = group.add_argument
    text = "whether a new repository is private (default: true)"
    add("--hub_private_repo", choices=("true", "false"), nargs="?", const="true", default="true", help=text)
    text = "may be seen by other users of this machine (default: the token of hf auth login)"
    add("--hub_token", metavar="TOKEN", help=text)


def hub_options(args: Namespace) -> dict[str, Any]:
    return {"private": args.hub_private_repo == "true", "token": args.hub_token, "overwrite": args.overwrite}


def run(args: Namespace) -> None:
    from fusion.formats.adapter_file import load

    (adapter,) = on_base([load(args.adapter)], args)
    beside = args.adapter.with_suffix(".png")
    pictures = dict.fromkeys(args.picture or [beside] * beside.is_file(), "")
    push_adapter(adapter, args.repository, args, base=args.base, pictures=pictures)


def push_adapter(
    adapter: Any, repository: str, args: Namespace, *, base: str | None, pictures: dict[Path, str]
) -> None:
    """Push, and print where it is and how it is used."""
    from fusion.hub.adapter_card import instance_prompt
    from fusion.hub.repository import push

    known = base if base and not Path(base).exists() else None  # a path of this machine says nothing to others
    commit = push(adapter, repository, base=known, pictures=pictures, **hub_options(args))
    name = commit.partition("/commit/")[0]
    print(f"pushed {adapter.info.name}: {name}")
    repo = "/".join(name.split("/")[-2:])
    print(f"next: {example('generate', repo, '--prompt', instance_prompt(adapter))}")
