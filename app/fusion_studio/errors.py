"""Errors and warnings as one sentence on the page. Gradio renders them as HTML, and tokens look like tags: escape."""

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
        with _errors_on_page():
            return handler(*first, *values)

    def streaming(*values: Any) -> Iterator[Any]:
        with _errors_on_page():
            yield from handler(*first, *values)

    bound: Any = streaming if inspect.isgeneratorfunction(handler) else answering
    bound.__name__, bound.__doc__ = handler.__name__, handler.__doc__
    signature = inspect.signature(handler)  # the API that gradio publishes takes its names from here
    bound.__annotations__ = {"event": gr.EventData} if "event" in signature.parameters else {}
    bound.__signature__ = signature.replace(parameters=list(signature.parameters.values())[len(first) :])
    return bound


@contextmanager
def _errors_on_page() -> Generator[None]:
    try:
        yield
    except Exception as error:
        raise gr.Error(html.escape(error_sentence(error)), print_exception=False) from None


def warn(sentence: str) -> None:
    gr.Warning(html.escape(sentence))
