"""Aspect-ratio buckets: sizes of about one area that pictures are cut to, so that little of a long one is cut off.

Sizes, and which of them a picture gets, are as in kohya's scripts (`--enable_bucket`), which follow NovelAI (2022).
"""

from collections.abc import Sequence

from fusion.errors import ConfigError
from fusion.training.config import TrainingConfig

Size = tuple[int, int]  # width, height, in pixels
USUAL_STEP = 64  # pixels


def training_sizes(config: TrainingConfig, resolution: int, multiple: int) -> list[Size]:
    """The sizes that pictures are cut to: the square of `resolution`, or one for each bucket.

    `multiple`: pixels of a latent position. Raises ConfigError for sides that are no multiples of it.
    """
    if not config.enable_bucket:
        if resolution % multiple:
            raise ConfigError(f"resolution {resolution} does not suit this base; use a multiple of {multiple}.")
        return [(resolution, resolution)]
    step = config.bucket_reso_steps or max(multiple, min(USUAL_STEP, resolution // 8 // multiple * multiple))
    if step % multiple:
        raise ConfigError(f"bucket_reso_steps {step} does not suit this base; use a multiple of {multiple}.")
    smallest = (config.min_bucket_reso or resolution // 2) // step * step or step
    largest = -(-(config.max_bucket_reso or 2 * resolution) // step) * step
    if not smallest <= resolution <= largest:
        raise ConfigError(f"buckets of {smallest} to {largest} px do not suit resolution {resolution}.")
    return bucket_sizes(resolution, smallest, largest, step)


def bucket_sizes(resolution: int, smallest: int, largest: int, step: int) -> list[Size]:
    """All sizes of sides `smallest` to `largest`, multiples of `step`, with at most the area of the square."""
    side = resolution // step * step
    sizes = {(side, side)}
    for width in range(smallest, largest + 1, step):
        height = min(largest, resolution**2 // width // step * step)
        if height >= smallest:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def nearest_size(picture: Size, sizes: Sequence[Size]) -> Size:
    """The size that a picture is cut to: its own, or that of the nearest ratio of width to height."""
    ratio = picture[0] / picture[1]
    return picture if picture in sizes else min(sizes, key=lambda size: abs(size[0] / size[1] - ratio))
