"""The sizes that all stages of one pocket share: the first stage writes them into the work folder, others read them.

A picture's latents have `side / factor` positions a side and `channels` numbers each.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tools.pocket import subjects

# Of the autoencoder's levels, by its factor: few channels where there are many pixels, which cost most; many where
# shapes are remembered. With one level more the inner ones are those of the smaller factor, which is then a start.
WIDTHS = {4: (32, 96, 192), 8: (16, 32, 96, 192), 16: (16, 16, 32, 96, 192)}
VOCABULARIES = {"trained": subjects.TRAINED, "all": [*subjects.TRAINED, *subjects.OTHERS]}
JUDGE_SIDE = 128  # px of the pictures that the judges see, whatever the size of those that are drawn


@dataclass(frozen=True)
class Settings:
    side: int = 128
    factor: int = 8
    channels: int = 4
    widths: tuple[int, ...] = ()
    vocabulary: str = "trained"

    def __post_init__(self) -> None:
        widths = tuple(self.widths) or WIDTHS.get(self.factor, ())
        object.__setattr__(self, "widths", widths)
        if 2 ** (len(widths) - 1) != self.factor:
            raise SystemExit(f"factor {self.factor} takes 1 + log2 of it as --widths; got {len(widths)} of them")
        if self.side % (4 * self.factor):
            raise SystemExit(
                f"side {self.side} does not suit factor {self.factor}; use a multiple of {4 * self.factor}"
            )

    @property
    def latent_side(self) -> int:
        return self.side // self.factor

    @property
    def names(self) -> list[str]:
        """The subjects that the denoiser learns."""
        return VOCABULARIES[self.vocabulary]


def read_settings(work: Path, **flags: object) -> Settings:
    """The settings of a work folder; of `flags` what is not None is written into a new one, and has to agree later."""
    path = work / "settings.json"
    values = {name: tuple(value) if name == "widths" else value for name, value in flags.items() if value is not None}
    if not path.exists():
        settings = Settings(**values)  # pyright: ignore[reportArgumentType]
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")
        return settings
    settings = Settings(**json.loads(path.read_text(encoding="utf-8")))
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in values and values[field.name] != value:
            raise SystemExit(f"{path} has {field.name} {value}, not {values[field.name]}; use another --work for that")
    return settings
