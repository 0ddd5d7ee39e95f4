"""A form of every setting of a training, made of its own schema: what it is called, what it means, what applies."""

from __future__ import annotations  # names of `fusion` must not load torch before the page is up

import html
from itertools import groupby

import fusion
from fusion_studio.training_jobs import PAGE_SETTINGS


def form_html() -> str:
    """Fieldsets by what the settings are about. Nothing filled in means that the base and the preset decide."""
    settings = [setting for setting in fusion.settings_of(fusion.TrainingConfig) if setting.name not in PAGE_SETTINGS]
    return "".join(
        f"<fieldset><legend>{html.escape(title.capitalize())}</legend>{''.join(map(_field, group))}</fieldset>"
        for title, group in groupby(settings, key=lambda setting: setting.group)
    )


def _field(setting: fusion.Setting) -> str:
    label, text = setting.name.replace("_", " "), html.escape(setting.help)
    return f"<label><span>{label}</span>{_control(setting)}<small>{text}</small></label>"


def _control(setting: fusion.Setting) -> str:
    name, default = setting.name, "" if setting.default is None else html.escape(str(setting.default).lower())
    if choices := ("true", "false") if bool in setting.kinds else setting.choices:
        options = "".join(f"<option>{html.escape(str(choice))}</option>" for choice in choices)
        return f'<select name="{name}"><option value="">{default or "as usual"}</option>{options}</select>'
    if list in setting.kinds:
        return f'<textarea name="{name}" rows="1" placeholder="{default}"></textarea>'
    mode = " inputmode=decimal" if setting.kinds & {int, float} else ""
    return f'<input name="{name}" placeholder="{default}"{mode}>'
