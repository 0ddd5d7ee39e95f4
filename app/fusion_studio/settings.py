"""A form of every setting of a training, made of its own schema: what it is called, what it means, what applies."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import html
from typing import Any, Literal, get_args, get_origin

import fusion
from fusion_studio.training_jobs import PAGE_SETTINGS


def form_html() -> str:
    """Fieldsets by what the settings are about. Nothing filled in means that the base and the preset decide."""
    groups = ""
    for title, names in fusion.TrainingConfig.groups().items():
        fields = "".join(_field(name) for name in names if name not in PAGE_SETTINGS)
        if fields:
            groups += f"<fieldset><legend>{html.escape(title.capitalize())}</legend>{fields}</fieldset>"
    return groups


def _field(name: str) -> str:
    about: Any = fusion.TrainingConfig.model_fields[name]
    default = "" if about.default is None or about.is_required() else str(about.default).lower()
    label, text = name.replace("_", " "), html.escape(about.description or "")
    control = _control(name, about.annotation, html.escape(default))
    return f"<label><span>{label}</span>{control}<small>{text}</small></label>"


def _control(name: str, annotation: Any, default: str) -> str:
    kinds = get_args(annotation) or (annotation,)
    literal = next((k for k in (annotation, *kinds) if get_origin(k) is Literal), None)
    choices = ("true", "false") if annotation is bool else get_args(literal)
    if choices:
        options = "".join(f"<option>{html.escape(str(choice))}</option>" for choice in choices)
        return f'<select name="{name}"><option value="">{default or "as usual"}</option>{options}</select>'
    if any(get_origin(kind) is list for kind in (annotation, *kinds)):
        return f'<textarea name="{name}" rows="1" placeholder="{default}"></textarea>'
    numeric = {int, float} & {*kinds, annotation}
    return f'<input name="{name}" placeholder="{default}"{" inputmode=decimal" if numeric else ""}>'
