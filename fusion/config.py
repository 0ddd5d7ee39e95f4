"""Strict settings: frozen models that refuse what they do not know, read from TOML and written to it exactly.

Nothing here imports torch, so that `fusion --help` need not.
"""

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fusion.errors import ConfigError, closest

TOKEN = re.compile(r"<[a-z0-9_-]+>")  # a concept's word in prompts
BASE_DEFAULTS = "fusion.toml"  # in a base's folder: what suits that base
_BASE_TABLES = ("training", "generation")
# pydantic's words for a wrong kind, and those of a person writing TOML.
_PLAIN_WORDS = {
    "Input should be a valid integer": "must be a whole number",
    "Input should be a valid number": "must be a number",
    "Input should be a finite number": "must be a finite number",
    "Input should be a valid boolean": "must be true or false",
    "Input should be a valid string": "must be text",
    "Input should be a valid list": "must be a list",
    "Input should be an instance of Path": "must be a path",
    "Input should be": "must be",
    "Value error, ": "",
}


class StrictModel(BaseModel):
    """Settings as a frozen value: unknown keys and wrong kinds raise ConfigError, all problems at once.

    Kinds are not guessed: true is no number, "8" is none either. Paths are stored absolute, and those read from
    a file are relative to that file. `model_fields_set` tells what the user has set.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    # Text fields that may name a place on this machine or something else: read as a path where it exists.
    names_or_paths: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            raise ConfigError(listing(_problems(error, cls))) from None

    @field_validator("*", mode="before")
    @classmethod
    def _paths_and_lists(cls, value: Any, info: ValidationInfo) -> Any:
        folder: Path | None = info.context and info.context["folder"]
        name = str(info.field_name)
        if isinstance(value, str | Path) and str(value) and _is_path(cls, name):
            return ((folder or Path()) / Path(value).expanduser()).absolute()
        if isinstance(value, str) and folder and name in cls.names_or_paths:
            place = folder / Path(value).expanduser()
            return str(place.absolute()) if place.exists() or value.startswith((".", "~")) else value
        return list(value) if isinstance(value, tuple) else value

    @classmethod
    def places(cls) -> set[str]:
        """The fields that say where something is on this machine."""
        return {*cls.names_or_paths, *(name for name in cls.model_fields if _is_path(cls, name))}

    def settings(self) -> dict[str, Any]:
        """What the user has set, in the order of the fields."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    def updated(self, values: Mapping[str, Any]) -> Self:
        """The same settings with some replaced, checked again. A value of None takes a setting back."""
        return type(self).model_validate({k: v for k, v in {**self.settings(), **values}.items() if v is not None})


Model = TypeVar("Model", bound=StrictModel)


def read_toml(path: str | Path, model: type[Model], over: Mapping[str, Any] | None = None) -> Model:
    """The settings in a TOML file, those in `over` taking precedence. Raises ConfigError naming the file."""
    path = Path(path)
    values = {**_parse(path), **(over or {})}
    try:
        return model.model_validate(values, context={"folder": path.parent})
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None


def to_toml(model: StrictModel) -> str:
    """TOML that reads back as the same settings: what the user has set, so that defaults stay defaults."""
    return "".join(f"{k} = {_value(v)}\n" for k, v in model.settings().items() if v is not None)


def read_base_defaults(folder: str | Path | None, table: str) -> dict[str, Any]:
    """A table of a base folder's `fusion.toml`, "training" or "generation"; empty when there is none."""
    path = Path(folder) / BASE_DEFAULTS if folder else None
    if path is None or not path.is_file():
        return {}
    tables = _parse(path)
    for name, content in tables.items():
        if name not in _BASE_TABLES or not isinstance(content, dict):
            raise ConfigError(
                f"{path}: '{name}' is no table of a base's defaults{closest(name, _BASE_TABLES)} "
                f"There are [{'] and ['.join(_BASE_TABLES)}]."
            )
    return tables.get(table, {})


def listing(problems: Sequence[str], limit: int = 10) -> str:
    """Problems as one text: one as it is, several counted and one a line."""
    if len(problems) == 1:
        return problems[0]
    more = len(problems) - limit
    tail = [f"and {more} more"] if more > 0 else []
    return "\n- ".join([f"{len(problems)} problems:", *problems[:limit], *tail])


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name}: not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.name}: not valid TOML: {error}.") from None


def _is_path(model: type[BaseModel], name: str) -> bool:
    annotation = model.model_fields[name].annotation
    return Path in (annotation, *get_args(annotation))


def _problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One or two sentences for each key with a problem."""
    by_key: dict[str, list[Any]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(str(detail["loc"][0]) if detail["loc"] else "", []).append(detail)
    return [text for key, details in by_key.items() for text in _explained(key, details, model)]


def _explained(key: str, details: list[Any], model: type[BaseModel]) -> Iterable[str]:
    if details[0]["type"] == "extra_forbidden":
        return [f"unknown key '{key}'{closest(key, model.model_fields)}"]
    if details[0]["type"] == "missing":
        return [f"'{key}' is missing: {model.model_fields[key].description or 'it has no default.'}"]
    # A field of several kinds has a problem for each; one inside a list is nearer to the mistake.
    inside = [detail for detail in details if any(isinstance(part, int) for part in detail["loc"])]
    place = key + "".join(f"[{part}]" for part in (inside or details)[0]["loc"] if isinstance(part, int))
    reasons = [_plain(detail["msg"]) for detail in inside or details]
    reason = " or ".join(dict.fromkeys([reasons[0], *(r.removeprefix("must be ") for r in reasons[1:])]))
    if details[0]["type"] == "value_error":
        return [f"{place}: {reason}"]
    shown = repr((inside or details)[0]["input"])
    return [f"{place} {reason}, got {shown if len(shown) <= 60 else shown[:57] + '...'}."]


def _plain(message: str) -> str:
    for theirs, ours in _PLAIN_WORDS.items():
        if message.startswith(theirs):
            return ours + message[len(theirs) :]
    return message


def _value(value: Any) -> str:
    """A TOML value. TOML reads JSON's strings and Python's shortest exact numbers."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, StrictModel):
        value = value.settings()
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_value(str(k))} = {_value(v)}' for k, v in value.items() if v is not None)}}}"
    raise TypeError(f"TOML has no {type(value).__name__}")
