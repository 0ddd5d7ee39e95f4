"""Open the studio in the browser, for this machine only unless --host names another address."""

from argparse import ArgumentParser, Namespace
from importlib.util import find_spec

from fusion.cli.console import UsageError
from fusion_studio.__main__ import add_arguments as add_studio_arguments


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "fusion studio [options]"
    add_studio_arguments(parser)


def run(args: Namespace) -> None:
    if find_spec("gradio") is None:
        raise UsageError("The studio needs gradio; install it with: python -m pip install 'spectral-fusion[app]'")
    from fusion_studio.__main__ import run as run_studio

    run_studio(args)
