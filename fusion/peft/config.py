"""`SpectralConfig`: the settings of a spectral adapter, as PEFT's other methods have theirs."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig

from fusion.adapters import ADAPTERS
from fusion.adapters.layer import AdapterLayer, LayerOptions
from fusion.errors import ConfigError, UnknownName, closest
from fusion.output_files import write_output
from fusion.spectral.slices import SpectralSlice

BASES = ("fresh", "file", "recomputed")
_CARD = """
## Loading

PEFT does not know this method by itself: import the package that brings it first (`pip install spectral-fusion`).

```python
import fusion.peft
from peft import PeftModel

model = PeftModel.from_pretrained(base, "this folder or repository")
```
"""


class _PeftType(str):
    """A key of PEFT's tables that passes for a member of PeftType, a closed enum of strings."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return self[:]

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


SPECTRAL = _PeftType("SPECTRAL")


@dataclass
class SpectralConfig(PeftConfig):
    """A spectral adapter for `get_peft_model`, `model.add_adapter` and `unet.add_adapter`.

    Raises ConfigError and UnknownName for values that cannot be.
    """

    r: int = field(default=8, metadata={"help": "Singular directions of the slice."})
    adapter_type: str = field(default="additive", metadata={"help": f"One of {', '.join(ADAPTERS)}."})
    slice: int | None = field(
        default=None,
        metadata={"help": "Which r directions, 0 the strongest. Default: the next that no adapter of the model has."},
    )
    guard: int = field(default=64, metadata={"help": "guarded: leading directions that are projected off."})
    seed: int = field(default=0, metadata={"help": "Of random starts (lora)."})
    save_basis: bool = field(
        default=True,
        metadata={"help": "Store the slice's singular directions, so that loading needs no SVD and is exact anywhere."},
    )
    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "Names of modules, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that are trained whole."})
    basis: str = field(
        default="fresh",
        metadata={
            "help": "Where a slice's directions come from: the base (fresh, recomputed) or the file. Set by saving."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPECTRAL  # pyright: ignore[reportAttributeAccessIssue]
        if self.adapter_type not in ADAPTERS:
            known = f"{closest(str(self.adapter_type), ADAPTERS)} There are: {', '.join(ADAPTERS)}."
            raise UnknownName(f"No adapter type is called '{self.adapter_type}'{known}")
        if self.basis not in BASES:
            raise ConfigError(f"basis should be one of {', '.join(BASES)}, got '{self.basis}'.")
        lowest = {"r": 1, "slice": 0, "guard": 0, "seed": 0}
        for name, least in lowest.items():
            value = getattr(self, name)
            if (value is not None or name != "slice") and (type(value) is not int or value < least):
                raise ConfigError(f"{name} should be a whole number of at least {least}, got {value!r}.")

    @property
    def layer_class(self) -> type[AdapterLayer]:
        return ADAPTERS[self.adapter_type]

    @property
    def directions(self) -> SpectralSlice:
        """The slice; of types that own no directions, only its rank counts."""
        return SpectralSlice.contiguous(self.slice or 0, self.r)

    @property
    def options(self) -> LayerOptions:
        return LayerOptions(seed=self.seed, guard=self.guard)

    def overlapping(self, others: Sequence["SpectralConfig"]) -> list["SpectralConfig"]:
        """Those that own some of the same directions."""
        return [
            other
            for other in others
            if other.slice is not None
            and self.layer_class.slice_of == other.layer_class.slice_of
            and self.directions.overlap(other.directions)
        ]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT does, with where the basis is for the one who loads it, and how to load it in the model card."""
        stored = copy(self)
        stored.basis = "file" if self.save_basis else "recomputed"
        super(SpectralConfig, stored).save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        if card.is_file() and "fusion.peft" not in (text := card.read_text(encoding="utf-8")):
            write_output(card, f"{text.rstrip()}\n{_CARD}".encode())
