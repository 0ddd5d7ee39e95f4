"""Teach Stable Diffusion personal concepts as spectral adapters, and use them together in one picture.

errors, config          what can go wrong by a user's hand; strict settings
spectral/               the mathematics: spectrum, slices, Delta, rotation, interference
adapters/  methods/     trainable changes to one weight; ways to make several changes one
models/                 what we know of Stable Diffusion: names, targets, tokens, gates, attach and bake
formats/                adapters in files, our own and other people's; the library folder
composition/            fuse, and compatibility before it
generation              pipeline + adapters + prompt -> pictures with recipes
training/  evaluation/  pictures -> adapter; adapters -> numbers
cli/                    one file per verb
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion.adapters import ADAPTERS as ADAPTERS
    from fusion.adapters.adapter import Adapter as Adapter
    from fusion.adapters.adapter import Concept as Concept
    from fusion.composition.activations import cross_talk as cross_talk
    from fusion.composition.activations import merge_error as merge_error
    from fusion.composition.fusing import fuse as fuse
    from fusion.composition.measures import interference as interference
    from fusion.composition.ownership import SliceMap as SliceMap
    from fusion.composition.ownership import slice_map as slice_map
    from fusion.composition.verdict import compatibility as compatibility
    from fusion.errors import FusionError as FusionError
    from fusion.evaluation.comparison import Cell as Cell
    from fusion.evaluation.comparison import compare as compare
    from fusion.evaluation.contact import contact_sheet as contact_sheet
    from fusion.evaluation.foresight import foresee as foresee
    from fusion.evaluation.judge import open_judge as open_judge
    from fusion.evaluation.report import evaluate as evaluate
    from fusion.formats.exporting import export as export
    from fusion.formats.library import Library as Library
    from fusion.formats.moments_file import load_moments as load_moments
    from fusion.formats.moments_file import save_moments as save_moments
    from fusion.formats.native import save as save
    from fusion.formats.reading import load as load
    from fusion.generation import Cancelled as Cancelled
    from fusion.generation import Picture as Picture
    from fusion.generation import Recipe as Recipe
    from fusion.generation import generate as generate
    from fusion.generation import recipe_of as recipe_of
    from fusion.methods import METHODS as METHODS
    from fusion.methods import MethodOptions as MethodOptions
    from fusion.models.bases import base_defaults as base_defaults
    from fusion.models.bases import open_pipeline as open_pipeline
    from fusion.models.bases import pocket as pocket
    from fusion.models.families import base_info as base_info
    from fusion.models.injection import attach as attach
    from fusion.models.injection import bake as bake
    from fusion.models.recording import record_moments as record_moments
    from fusion.models.regions import Region as Region
    from fusion.models.schedulers import SCHEDULERS as SCHEDULERS
    from fusion.spectral.slices import SpectralSlice as SpectralSlice
    from fusion.training.config import TrainingConfig as TrainingConfig
    from fusion.training.examination import examine as examine
    from fusion.training.interruption import keep_settings as keep_settings
    from fusion.training.interruption import unfinished as unfinished
    from fusion.training.loop import TrainStep as TrainStep
    from fusion.training.loop import train as train
    from fusion.training.pictures import load_picture as load_picture
    from fusion.training.presets import PRESETS as PRESETS
    from fusion.training.presets import preset as preset

# Public name -> the module it lives in, imported on first use: `import fusion` costs nothing and needs no torch.
_PUBLIC = {
    "ADAPTERS": "fusion.adapters",
    "Adapter": "fusion.adapters.adapter",
    "Cancelled": "fusion.generation",
    "Cell": "fusion.evaluation.comparison",
    "Concept": "fusion.adapters.adapter",
    "FusionError": "fusion.errors",
    "Library": "fusion.formats.library",
    "METHODS": "fusion.methods",
    "MethodOptions": "fusion.methods",
    "PRESETS": "fusion.training.presets",
    "Picture": "fusion.generation",
    "Recipe": "fusion.generation",
    "Region": "fusion.models.regions",
    "SCHEDULERS": "fusion.models.schedulers",
    "SliceMap": "fusion.composition.ownership",
    "SpectralSlice": "fusion.spectral.slices",
    "TrainStep": "fusion.training.loop",
    "TrainingConfig": "fusion.training.config",
    "attach": "fusion.models.injection",
    "bake": "fusion.models.injection",
    "base_defaults": "fusion.models.bases",
    "base_info": "fusion.models.families",
    "compare": "fusion.evaluation.comparison",
    "compatibility": "fusion.composition.verdict",
    "contact_sheet": "fusion.evaluation.contact",
    "cross_talk": "fusion.composition.activations",
    "evaluate": "fusion.evaluation.report",
    "examine": "fusion.training.examination",
    "export": "fusion.formats.exporting",
    "foresee": "fusion.evaluation.foresight",
    "fuse": "fusion.composition.fusing",
    "generate": "fusion.generation",
    "interference": "fusion.composition.measures",
    "keep_settings": "fusion.training.interruption",
    "load": "fusion.formats.reading",
    "load_moments": "fusion.formats.moments_file",
    "load_picture": "fusion.training.pictures",
    "merge_error": "fusion.composition.activations",
    "open_judge": "fusion.evaluation.judge",
    "open_pipeline": "fusion.models.bases",
    "pocket": "fusion.models.bases",
    "preset": "fusion.training.presets",
    "recipe_of": "fusion.generation",
    "record_moments": "fusion.models.recording",
    "save": "fusion.formats.native",
    "save_moments": "fusion.formats.moments_file",
    "slice_map": "fusion.composition.ownership",
    "train": "fusion.training.loop",
    "unfinished": "fusion.training.interruption",
}
__all__ = list(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]
_PACKAGES = (
    "adapters",
    "composition",
    "evaluation",
    "formats",
    "generation",
    "methods",
    "models",
    "spectral",
    "training",
)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"fusion.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fusion' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
