"""Errors and notes as one sentence on the page. Gradio renders them as HTML, and tokens look like tags: escape."""

import html
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

import fusion

logger = logging.getLogger(__name__)


def told(handler: Callable[..., Any], *first: Any) -> Callable[..., Any]:
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
    wrapped.__signature__ = signature.replace(parameters=list(signature.parameters.values())[len(first) :])
    return wrapped


@contextmanager
def _noticed() -> Iterator[None]:
    try:
        yield
    except gr.Error:
        raise
    except fusion.FusionError as error:
        raise _notice(str(error)) from None
    except Exception as error:  # our mistake: the log has it in full
        logger.exception("Unexpected error in the app")
        raise _notice(f"Something unexpected happened ({type(error).__name__}); the terminal has details.") from None


def _notice(sentence: str) -> gr.Error:
    return gr.Error(html.escape(sentence), title="That did not work", print_exception=False)


def warn(sentence: str) -> None:
    gr.Warning(html.escape(sentence), title="Note")
