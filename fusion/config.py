"""Strict settings: frozen models that refuse what they do not know, read from TOML and written to it exactly.

`settings_of(model)` is the one reflection of a model: the command line, the studio's forms and typed text follow it.
Nothing here imports torch, so that `fusion --help` need not.
"""

import json
import os
import re
import reprlib
import tomllib
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from fusion.errors import ConfigError, closest

TOKEN = re.compile(r"<[a-z0-9_-]+>")  # a concept's word in prompts
_ANY_TOKEN = re.compile(TOKEN.pattern, re.IGNORECASE)
NAME = r"[^/\\.\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,199}"  # of an adapter and its file: no folder, not hidden
NAME_RULE = "up to 200 letters, no / or \\, the first no dot"
MAX_SEED = 2**63 - 1  # of torch's generators
MAX_SEEDS = 10_000  # of one evaluation
MAX_STEPS = 10_000_000
MAX_BATCH = 1024  # of a training step
MAX_STRENGTH = 1000  # of an adapter; at ten, pictures are noise
MAX_WEIGHT = 1e6  # of a part of the loss; also a learning rate that nothing survives
MAX_PROMPT = 10_000  # letters; a text encoder reads some 70 tokens
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can have one alone, tokenizers and terminals cannot
BASE_DEFAULTS = "fusion.toml"  # in a base's folder: what suits that base
_LIMITS = ("gt", "ge", "lt", "le")
_REWORDED = {"an instance of Path": "a path", "a valid integer": "a whole number", "a valid number": "a number"}
_BASE_TABLES = ("training", "distillation", "generation", "example")


def lower_tokens(text: str, tokens: Container[str]) -> str:
    """A prompt in which the concepts' `tokens` are in lower case: to a tokenizer, <Dog> is <dog>."""
    return _ANY_TOKEN.sub(lambda match: match[0].lower() if match[0].lower() in tokens else match[0], text)


class StrictModel(BaseModel):
    """Settings as a frozen value: unknown keys and wrong kinds raise ConfigError, all problems at once.

    Kinds are not guessed: true is no number, "8" is none either. Paths are stored absolute.
    `model_fields_set` has the names of what the user has set.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    # Text fields that may be a path on this machine or something else: read as a path where it exists.
    names_or_paths: ClassVar[tuple[str, ...]] = ()
    # Other names of fields, accepted wherever the fields' own are.
    aliases: ClassVar[Mapping[str, str]] = {}
    # For help and forms: a group's title -> its first field; the others follow in the order of the class.
    groups: ClassVar[Mapping[str, str]] = {}
    # What a base's fusion.toml may not set, besides paths.
    users_own: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, values: Any, handler: Any) -> Self:
        try:
            return handler(cls.canonical(values) if isinstance(values, Mapping) else values)
        except ValidationError as error:
            # One problem a key: a field of several kinds has one for each.
            details = {detail["loc"][:1]: detail for detail in error.errors(include_url=False)}
            raise ConfigError(listing([_explained(detail, cls) for detail in details.values()])) from None

    @field_validator("*", mode="before")
    @classmethod
    def _paths_and_lists(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if Path in kinds and isinstance(value, str | Path) and str(value):
            return _expanded(value).absolute()
        if any(isinstance(text, str) and SURROGATE.search(text) for text in _items(value)):
            raise ConfigError(f"{info.field_name} has half of a surrogate pair, which is no valid text.")
        if isinstance(value, list | tuple):
            return tuple(value) if tuple in kinds else list(value)
        return value

    @classmethod
    def canonical(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values under the fields' own names. Raises ConfigError where one setting is given under two names."""
        keys: dict[str, str] = {}
        for key in values:
            name = cls.aliases.get(key, key)
            if name in keys:
                raise ConfigError(f"'{keys[name]}' and '{key}' are two names of one setting; give one of them.")
            keys[name] = key
        return {name: values[key] for name, key in keys.items()}

    @classmethod
    def rooted(cls, values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Canonical values, with relative paths read from `folder`."""
        result = cls.canonical(values)
        for name in cls.places() & result.keys():
            value = result[name]
            if isinstance(value, str | Path) and str(value):
                path = folder / _expanded(value)
                # Path.exists raises where a name is too long to be one.
                is_path = name not in cls.names_or_paths or str(value).startswith((".", "~")) or os.path.exists(path)  # noqa: PTH110
                result[name] = str(path.absolute()) if is_path else value
        return result

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Settings typed here: relative paths are read from the working folder."""
        return cls.model_validate(cls.rooted(values, Path()))

    @classmethod
    def parsed(cls, texts: Mapping[str, str]) -> dict[str, Any]:
        """Canonical values of typed texts. What is no setting stays as it is, to be refused with the others."""
        known = {setting.name: setting for setting in settings_of(cls)}
        return {k: known[k].parse(text) if k in known else text for k, text in cls.canonical(texts).items()}

    @classmethod
    def places(cls) -> set[str]:
        """The fields that are, or may be, paths on this machine."""
        paths = (name for name, field in cls.model_fields.items() if Path in _kinds(field.annotation))
        return {*cls.names_or_paths, *paths}

    def settings(self) -> dict[str, Any]:
        """What the user has set, in the order of the fields."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    def updated(self, values: Mapping[str, Any]) -> Self:
        """The same settings with some replaced, checked again. A value of None takes a setting back."""
        merged = {**self.settings(), **self.canonical(values)}
        return type(self).model_validate({k: v for k, v in merged.items() if v is not None})

    def with_base_defaults(self, table: Mapping[str, Any]) -> Self:
        """These settings, with the base's own wherever the user has set nothing.

        `table` is the model's table in the base's `fusion.toml`. A base is other people's work: it may set how to
        train or draw, but no path and nothing of `users_own`. Raises ConfigError.
        """
        try:
            defaults = self.canonical(table)
            if refused := sorted({*self.users_own, *self.places()} & defaults.keys()):
                raise ConfigError(f"it sets '{refused[0]}', which only you may set; remove it.")
            given = {name: value for name, value in self.settings().items() if value is not None}
            return type(self).model_validate({**defaults, **given})
        except ConfigError as error:
            raise ConfigError(f"With the base's {BASE_DEFAULTS}: {error}") from None


Model = TypeVar("Model", bound=StrictModel)


@dataclass(frozen=True)
class Setting:
    """One field of a StrictModel, as a command line or a form shows and reads it."""

    name: str
    help: str
    group: str
    kinds: frozenset[Any]  # of bool, int, float, str, Path, list …; empty where there are only choices
    choices: tuple[Any, ...]  # empty where any value of the kinds will do
    default: Any  # None: there is none, or it depends on the base
    required: bool
    aliases: tuple[str, ...]

    def parse(self, text: str) -> Any:
        """The value of typed text. Text of another kind is returned as it is, for the model to refuse."""
        if bool in self.kinds and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if list in self.kinds and str not in self.kinds:
            return [part for part in re.split(r"\s*,\s*" if "," in text else r"\s+", text.strip()) if part]
        if list in self.kinds and "\n" in text:
            return [line.strip() for line in text.splitlines() if line.strip()]
        for kind in (int, float):
            if kind in self.kinds:
                with suppress(ValueError):
                    return kind(text)
        return text


@cache
def settings_of(model: type[StrictModel]) -> tuple[Setting, ...]:
    """All settings of a model, in the order of its fields."""
    titles, group, settings = {first: title for title, first in model.groups.items()}, "", list[Setting]()
    for name, field in model.model_fields.items():
        group, kinds = titles.get(name, group), _kinds(field.annotation)
        choices = () if kinds else _choices(field.annotation)
        default = None if field.is_required() else field.default
        others = tuple(other for other, of in model.aliases.items() if of == name)
        about = field.description or ""
        settings.append(Setting(name, about, group, kinds, choices, default, field.is_required(), others))
    return tuple(settings)


def read_toml(path: str | Path, model: type[Model], over: Mapping[str, Any] | None = None) -> Model:
    """The settings in a TOML file, those in `over` taking precedence. Raises ConfigError naming the file.

    Relative paths in the file are relative to it, those in `over` to the working folder.
    """
    path = Path(path)
    values = _parse(path)
    try:
        return model.model_validate({**model.rooted(values, path.parent), **model.rooted(over or {}, Path())})
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None


def to_toml(model: StrictModel) -> str:
    """TOML that reads back as the same settings: what the user has set, so that defaults stay defaults.

    TOML reads JSON's strings, lists, booleans and numbers; settings are nothing else.
    """
    values = model.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()]
    return "".join(lines).replace("\x7f", "\\u007f")


def read_base_defaults(base: str | Path | None, table: str) -> dict[str, Any]:
    """A table of a base's `fusion.toml`, one of _BASE_TABLES; empty when there is none, or the base is from the hub.

    It is in the base's folder. Beside a single file `model.safetensors` it is `model.fusion.toml`, else `fusion.toml`.
    """
    where = str(base or "")
    paths = [Path(where) / BASE_DEFAULTS] if os.path.isdir(where) else []  # noqa: PTH112 (long names raise)
    if os.path.isfile(where):  # noqa: PTH113
        paths = [Path(where).with_suffix(f".{BASE_DEFAULTS}"), Path(where).with_name(BASE_DEFAULTS)]
    path = next((path for path in paths if path.is_file()), None)
    tables = _parse(path) if path else {}
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
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ConfigError(f"'{path}' is no file.")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, or no TOML
        raise ConfigError(f"{path.name}: not valid TOML: {error}.") from None


def _expanded(value: str | Path) -> Path:
    try:
        return Path(value).expanduser()
    except RuntimeError:  # "~name" of nobody on this machine
        raise ConfigError(f"'{value}' starts in the home folder of a user who does not exist here.") from None


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _kinds(annotation: Any) -> frozenset[Any]:
    """The plain kinds an annotation allows besides its choices: of `str | list[str] | None` str and list."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return frozenset().union(*map(_kinds, get_args(annotation)))
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    return frozenset() if annotation is NoneType or origin is Literal else frozenset([origin or annotation])


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in _choices(part))


def bounds(
    ge: float | None = None, le: float | None = None, *, gt: float | None = None, lt: float | None = None
) -> str:
    """The rule of a number, as messages have it: "must be between 1 and 1000", "must be more than 0"."""
    if ge is not None and le is not None:
        return f"must be between {_plain(ge)} and {_plain(le)}"
    rules = {"more than": gt, "at least": ge, "less than": lt, "at most": le}
    return "must be " + " and ".join(f"{word} {_plain(limit)}" for word, limit in rules.items() if limit is not None)


def _plain(number: float) -> str:
    return str(int(number) if number == int(number) else number)


def _explained(detail: Any, model: type[BaseModel]) -> str:
    """One or two sentences for a problem that pydantic found."""
    key = str(detail["loc"][0]) if detail["loc"] else ""
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{key}'{closest(key, model.model_fields)}"
    if detail["type"] == "missing" and len(detail["loc"]) == 1:
        return f"'{key}' is missing: {model.model_fields[key].description or 'it has no default.'}"
    place = key + "".join(f"[{part}]" for part in detail["loc"] if isinstance(part, int))
    reason = re.sub(r"^\w+ should ", "must ", detail["msg"])
    for words, ours in _REWORDED.items():
        reason = reason.replace(words, ours)
    if detail.get("ctx", {}).get("pattern") == f"^{NAME}$":
        reason = f"must be {NAME_RULE}"
    if limits := {name: value for name, value in detail.get("ctx", {}).items() if name in _LIMITS}:
        for rule in model.model_fields[key].metadata if place == key else ():  # the other one, too
            limits |= {name: getattr(rule, name) for name in _LIMITS if getattr(rule, name, None) is not None}
        reason = bounds(**limits)
    return f"{place} {reason}, got {reprlib.repr(detail['input'])}."
