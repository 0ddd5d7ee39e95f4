"""Strict settings: frozen models that refuse what they do not know, read from TOML and written to it exactly.

Nothing here imports torch, so that `fusion --help` need not.
"""

import json
import re
import reprlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from fusion.errors import ConfigError, closest

TOKEN = re.compile(r"<[a-z0-9_-]+>")  # a concept's word in prompts
BASE_DEFAULTS = "fusion.toml"  # in a base's folder: what suits that base
_BASE_TABLES = ("training", "generation")


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
    def _explain(cls, values: Any, handler: Any) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            # One problem a key: a field of several kinds has one for each.
            details = {detail["loc"][:1]: detail for detail in error.errors(include_url=False)}
            raise ConfigError(listing([_explained(detail, cls) for detail in details.values()])) from None

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
    """TOML that reads back as the same settings: what the user has set, so that defaults stay defaults.

    TOML reads JSON's strings, lists, booleans and numbers; settings are nothing else.
    """
    values = model.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()]
    return "".join(lines).replace("\x7f", "\\u007f")


def read_base_defaults(folder: str | Path | None, table: str) -> dict[str, Any]:
    """A table of a base folder's `fusion.toml`, "training" or "generation"; empty when there is none."""
    path = Path(folder) / BASE_DEFAULTS if folder else None
    tables = _parse(path) if path and path.is_file() else {}
    for name, content in tables.items():
        if name not in _BASE_TABLES or not isinstance(content, dict):
            raise ConfigError(f"{path}: '{name}' is no table of a base's defaults{closest(name, _BASE_TABLES)}")
    return tables.get(table, {})


def listing(problems: Sequence[str], limit: int = 10) -> str:
    """Problems as one text: one as it is, several counted and one a line."""
    if len(problems) == 1:
        return problems[0]
    tail = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n- ".join([f"{len(problems)} problems:", *problems[:limit], *tail])


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, or no TOML
        raise ConfigError(f"{path.name}: not valid TOML: {error}.") from None


def _is_path(model: type[BaseModel], name: str) -> bool:
    annotation = model.model_fields[name].annotation
    return Path in (annotation, *get_args(annotation))


def _explained(detail: Any, model: type[BaseModel]) -> str:
    """One or two sentences for a problem that pydantic found."""
    key = str(detail["loc"][0]) if detail["loc"] else ""
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{key}'{closest(key, model.model_fields)}"
    if detail["type"] == "missing" and len(detail["loc"]) == 1:
        return f"'{key}' is missing: {model.model_fields[key].description or 'it has no default.'}"
    place = key + "".join(f"[{part}]" for part in detail["loc"] if isinstance(part, int))
    reason = re.sub(r"^\w+ should ", "must ", detail["msg"]).replace("an instance of Path", "a path")
    return f"{place} {reason}, got {reprlib.repr(detail['input'])}."
