"""Errors and notes as one sentence on the page. Gradio renders them as HTML, and tokens look like tags: escape."""

import html
import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from fusion_studio.session import error_sentence


def bind(handler: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """`handler` with its first arguments filled in, whose errors appear on the page as one sentence."""

    def answering(*values: Any) -> Any:
        with _noticed():
            return handler(*first, *values)

    def streaming(*values: Any) -> Iterator[Any]:
        with _noticed():
            yield from handler(*first, *values)

    wrapped: Any = streaming if inspect.isgeneratorfunction(handler) else answering
    wrapped.__name__, wrapped.__doc__ = handler.__name__, handler.__doc__
    signature = inspect.signature(handler)  # the API that gradio publishes takes its names from here
    wrapped.__annotations__ = {"event": gr.EventData} if "event" in signature.parameters else {}
    wrapped.__signature__ = signature.replace(parameters=list(signature.parameters.values())[len(first) :])
    return wrapped


@contextmanager
def _noticed() -> Generator[None]:
    try:
        yield
    except Exception as error:
        raise gr.Error(html.escape(error_sentence(error)), print_exception=False) from None


def warn(sentence: str) -> None:
    gr.Warning(html.escape(sentence))
