"""What comes from a page is of the types that handlers expect, and errors and warnings are one sentence on it.

Gradio renders those as HTML, and tokens look like tags: escape.
"""

import html
import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

import gradio as gr
from pydantic import ConfigDict, TypeAdapter, ValidationError

import fusion
from fusion_studio.session import Session

FINITE = ConfigDict(allow_inf_nan=False)


def bind(handler: Callable[..., Any], session: Session, *further: Any) -> Callable[..., Any]:
    """`handler` with its first arguments filled in, the others checked; its errors appear as one sentence."""
    first = (session, *further)
    signature, hints = inspect.signature(handler), get_type_hints(handler)
    parameters = list(signature.parameters.values())[len(first) :]
    checks = [
        (parameter, None if parameter.name == "event" else TypeAdapter(hints.get(parameter.name, Any), config=FINITE))
        for parameter in parameters
    ]

    def checked(values: tuple[Any, ...]) -> list[Any]:
        pairs = zip(checks, values, strict=False)  # what a page leaves out has its default
        return [_checked(value, parameter, check) if check else value for (parameter, check), value in pairs]

    def answering(*values: Any) -> Any:
        with _errors_on_page(session):
            return handler(*first, *checked(values))

    def streaming(*values: Any) -> Iterator[Any]:
        with _errors_on_page(session):
            yield from handler(*first, *checked(values))

    bound: Any = streaming if inspect.isgeneratorfunction(handler) else answering
    bound.__name__, bound.__doc__ = handler.__name__, handler.__doc__
    bound.__annotations__ = {"event": gr.EventData} if "event" in signature.parameters else {}
    bound.__signature__ = signature.replace(
        parameters=parameters
    )  # the API that gradio publishes takes names from here
    return bound


def _checked(value: Any, parameter: inspect.Parameter, check: TypeAdapter[Any]) -> Any:
    """A value of the type that the handler names; an emptied field, None, has the default, if there is one."""
    if value is None and parameter.default is not parameter.empty:
        return parameter.default
    try:
        return check.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = " ".join([parameter.name.replace("_", " "), *map(str, first["loc"])])
        raise fusion.FusionError(f"{place}: {first['msg'].replace('Input', 'this')}.") from None


@contextmanager
def _errors_on_page(session: Session) -> Generator[None]:
    try:
        yield
    except Exception as error:
        raise gr.Error(html.escape(session.error_sentence(error)), print_exception=False) from None


def warn(sentence: str) -> None:
    gr.Warning(html.escape(sentence))
