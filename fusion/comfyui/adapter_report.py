"""What to expect of the adapters on a CLIP together, as text."""

from fusion.comfyui.attachment import entries_of
from fusion.comfyui.base import Clip
from fusion.composition.compatibility_report import compatibility
from fusion.errors import ConfigError


def report_adapters(clip: Clip) -> str:
    """The figures of `fusion.compatibility` for the adapters of all loaders. Raises ConfigError for none."""
    adapters = [entry.adapter for entry in entries_of(clip.patcher)]
    if not adapters:
        raise ConfigError("This CLIP has no adapters; connect a loader's.")
    report = compatibility(adapters)
    names, cosine = report.interference.names, report.interference.cosine
    pairs = [f"{names[i]}, {names[j]}: cosine {cosine[i][j]:+.4f}" for i in range(len(names)) for j in range(i)]
    return "\n".join([f"{report.verdict}: {report.sentence}", *report.problems[1:], *report.advice, *pairs])
