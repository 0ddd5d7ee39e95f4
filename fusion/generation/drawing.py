"""A pipeline, adapters and a prompt become pictures, each with the whole recipe that made it.

Knows nothing of training or files of adapters; the preview of a training is drawn by this code too.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from PIL import Image, PngImagePlugin

from fusion.adapters.adapter import Adapter, nouns
from fusion.config import TOKEN
from fusion.errors import ConfigError, FormatError, FusionError
from fusion.generation.auto_regions import Looked, by_nouns, changes, looking, places, regions_of
from fusion.generation.config import Region
from fusion.generation.regions import Cover, drawing_regions, encode_regions
from fusion.generation.schedulers import own_scheduler
from fusion.models.attachment import attach
from fusion.models.pipeline import Pipeline
from fusion.models.pipelines import base_defaults, base_info

RECIPE_KEY = "fusion"  # PNG text chunk


class Cancelled(FusionError):
    """Raised by an `on_step` to stop a picture in the middle; the pipeline is left as it was found."""


@dataclass(frozen=True)
class UsedAdapter:
    """An adapter as a recipe names it; `digest` is of its contents, `file` only a hint where it was."""

    name: str
    digest: str
    strength: float
    tokens: tuple[str, ...]
    file: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that made one picture: the same code with the same recipe makes it again, exact on one machine."""

    prompt: str
    negative_prompt: str
    seed: int  # of the batch: picture i starts from seed + i
    index: int  # of this picture in its batch
    batch: int
    steps: int
    guidance_scale: float
    guidance_rescale: float
    scheduler: str | None  # None: the base's own
    width: int
    height: int
    base: str
    adapters: tuple[UsedAdapter, ...] = ()
    gating: str | None = None
    image: str | None = None  # SHA-256 of the picture img2img started from
    image_strength: float | None = None
    regions: tuple[Region, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(replace(self, regions=())) | {"regions": [region.to_json() for region in self.regions]}

    def parameters(self) -> str:
        """The one-text form other Stable Diffusion tools show."""
        negative = f"\nNegative prompt: {self.negative_prompt}" if self.negative_prompt else ""
        return (
            f"{self.prompt}{negative}\nSteps: {self.steps}, Sampler: {self.scheduler or 'default'}, "
            f"CFG scale: {self.guidance_scale}, Seed: {self.seed + self.index}, Size: {self.width}x{self.height}, "
            f"Model: {self.base}"
        )


@dataclass(frozen=True)
class Picture:
    image: Image.Image
    recipe: Recipe

    def save(self, path: str | Path) -> Path:
        """Write a PNG that carries its recipe."""
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(RECIPE_KEY, json.dumps(self.recipe.to_json()))
        chunks.add_text("parameters", self.recipe.parameters())
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.image.save(path, format="PNG", pnginfo=chunks)
        return path


def recipe_of(path: str | Path) -> Recipe:
    """The recipe in a PNG. Raises FormatError when there is none, or it is not ours."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(RECIPE_KEY)
    except (OSError, SyntaxError, ValueError) as error:
        raise FormatError(f"'{path}' cannot be read as a picture: {error}.") from error
    if text is None:
        raise FormatError(f"'{path}' carries no recipe; only PNGs drawn by `fusion generate` do.")
    try:
        raw = json.loads(text)
        used = tuple(_used_from(entry) for entry in raw.pop("adapters"))
        regions = tuple(Region.from_json(entry) for entry in raw.pop("regions", ()))
        return Recipe(**raw, adapters=used, regions=regions)
    except (TypeError, KeyError, ValueError, OSError, ConfigError) as error:
        raise FormatError(f"The recipe in '{path}' is damaged: {error}.") from error


def _used_from(entry: dict[str, Any]) -> UsedAdapter:
    return UsedAdapter(
        entry["name"], entry["digest"], float(entry["strength"]), tuple(entry["tokens"]), entry.get("file")
    )


def generate(
    pipe: Pipeline,
    prompt: str,
    *,
    adapters: Sequence[Adapter] = (),
    strengths: Sequence[float] | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    batch: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float | None = None,
    scheduler: str | None = None,
    width: int | None = None,
    height: int | None = None,
    image: Image.Image | None = None,
    image_strength: float = 0.6,
    regions: Sequence[Region] | Literal["auto"] = (),
    gating: str | None = None,
    on_step: Callable[[int, int, Callable[[], Image.Image]], None] | None = None,
) -> list[Picture]:
    """Draw `batch` pictures of one prompt; picture i starts from seed + i.

    Adapters are attached for the call and taken out again whatever happens. What is not given comes from the base's
    `fusion.toml`, then from the pipeline. With `image` the drawing starts from that picture, `image_strength` (0 to 1)
    of the way towards noise. With `regions` their parts of the picture follow their prompts instead of `prompt`; one
    that says no more than tokens, "<dog>", follows `prompt` itself with all other concepts by their nouns. With "auto"
    every concept of a prompt that names several gets a region, where it is found to be going to stand.
    `on_step(step, total, preview)` is told every step; preview() decodes the first picture.
    Raises ConfigError, UnknownName for a scheduler, and whatever attach raises; Cancelled passes through.
    """
    defaults = base_defaults(pipe, "generation")
    values = [1.0] * len(adapters) if strengths is None else [float(s) for s in strengths]
    if len(values) != len(adapters):
        raise ConfigError(f"Give one strength for each of the {len(adapters)} adapters; got {len(values)} strengths.")
    if batch < 1 or not 0 < image_strength <= 1:
        raise ConfigError(f"batch is 1 or more and image_strength between 0 and 1; got {batch} and {image_strength}.")
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    recipe = Recipe(
        prompt=prompt,
        negative_prompt=negative_prompt or "",
        seed=seed,
        index=0,
        batch=batch,
        steps=int(_first(steps, defaults.get("steps"), 30)),
        guidance_scale=float(_first(guidance_scale, defaults.get("guidance_scale"), 7.5)),
        guidance_rescale=float(_first(guidance_rescale, defaults.get("guidance_rescale"), 0.0)),
        scheduler=_first(scheduler, defaults.get("scheduler"), None),
        width=width or (image.width if image else size),
        height=height or (image.height if image else size),
        base=base_info(pipe).name,
        adapters=tuple(_used(a, s) for a, s in zip(adapters, values, strict=True)),
        gating=gating,
        image=hashlib.sha256(image.convert("RGB").tobytes()).hexdigest() if image else None,
        image_strength=image_strength if image else None,
    )
    _check_size(pipe, recipe)
    asked = {token: noun for token, noun in nouns(adapters).items() if token in prompt}
    with ExitStack() as attached:
        for adapter, strength in zip(adapters, values, strict=True):
            handle = attached.enter_context(attach(pipe, adapter, gating))
            for branch in adapter.branches:
                handle.strength(branch.name, branch.strength * strength)
        if regions == "auto":
            # Every picture has places of its own, so they are drawn one by one.
            singles = [replace(recipe, seed=seed + i, batch=1) for i in range(batch)]
            recipes = [replace(one, regions=_found(pipe, one, image, asked)) for one in singles]
        else:
            recipes = [replace(recipe, regions=tuple(_spelled_out(region, prompt, asked) for region in regions))]
        images = [(one, drawn) for one in recipes for drawn in enumerate(_draw(pipe, one, image, on_step))]
    return [Picture(drawn, replace(one, index=i)) for one, (i, drawn) in images]


def _spelled_out(region: Region, prompt: str, nouns: Mapping[str, str]) -> Region:
    """A region of bare tokens with the prompt of the picture, in which no other concept is named.

    A concept is drawn worse where the text encoder has read another one's token before its own.
    """
    words = region.prompt.split()
    if not all(TOKEN.fullmatch(word) and word in prompt for word in words):
        return region
    return replace(region, prompt=by_nouns(prompt, nouns, keep=words))


def _found(pipe: Pipeline, recipe: Recipe, image: Image.Image | None, nouns: Mapping[str, str]) -> tuple[Region, ...]:
    """A region for each concept of the prompt, where it is going to stand; none for a single one."""
    if len(nouns) < 2:
        return ()
    try:
        with looking(pipe.unet, recipe.steps):
            _draw(pipe, replace(recipe, prompt=by_nouns(recipe.prompt, nouns)), image, None)
    except Looked as seen:
        masks = places(changes(pipe, seen, recipe.prompt, nouns))
        return tuple(_spelled_out(region, recipe.prompt, nouns) for region in regions_of(masks, nouns))
    return ()


def _draw(
    pipe: Pipeline, recipe: Recipe, image: Image.Image | None, on_step: Callable[..., None] | None
) -> list[Image.Image]:
    with own_scheduler(pipe, recipe.scheduler), _quiet(pipe):
        call: Any = pipe if image is None else _img2img(pipe)
        options: dict[str, Any] = {
            "num_inference_steps": recipe.steps,
            "guidance_scale": recipe.guidance_scale,
            # Drawn on the CPU, so that a seed means the same on every device.
            "generator": [torch.Generator("cpu").manual_seed(recipe.seed + i) for i in range(recipe.batch)],
        }
        if image is None:
            options |= {"width": recipe.width, "height": recipe.height}
        else:
            resized = image.convert("RGB").resize((recipe.width, recipe.height), Image.Resampling.LANCZOS)
            options |= {"image": [resized] * recipe.batch, "strength": recipe.image_strength}
        if recipe.guidance_rescale and "guidance_rescale" in inspect.signature(call.__call__).parameters:
            options["guidance_rescale"] = recipe.guidance_rescale
        if on_step is not None:
            options["callback_on_step_end"] = _reporter(on_step)
        if not recipe.regions:
            negative = [recipe.negative_prompt] * recipe.batch if recipe.negative_prompt else None
            return call(prompt=[recipe.prompt] * recipe.batch, negative_prompt=negative, **options).images
        scale = pipe.vae_scale_factor
        cover = Cover(recipe.regions, recipe.height // scale, recipe.width // scale)
        prompts = encode_regions(pipe, recipe.prompt, recipe.negative_prompt, recipe.regions, recipe.batch)
        with drawing_regions(pipe, cover):
            return call(**prompts, **options).images


def _reporter(on_step: Callable[..., None]) -> Callable[..., dict[str, Any]]:
    def report(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1, pipe.num_timesteps, lambda: _preview(pipe, tensors["latents"]))
        return tensors

    return report


def _preview(pipe: Pipeline, latents: torch.Tensor) -> Image.Image:
    """The first picture as it stands; noisy latents of any scheduler are brought to unit scale at most."""
    with torch.no_grad():
        first = latents[:1] / latents[:1].std().clamp(min=1)
        decoded = pipe.vae.decode(first.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(decoded.float())[0]


@contextmanager
def _quiet(pipe: Pipeline) -> Generator[None]:
    """No progress bar of the pipeline's own while we report steps ourselves."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _img2img(pipe: Pipeline) -> Any:
    """The img2img pipeline of the same components, with what is attached to them."""
    kind = getattr(diffusers, type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline"))
    extra = (
        {"requires_safety_checker": False} if "requires_safety_checker" in inspect.signature(kind).parameters else {}
    )
    made = kind(**pipe.components, **extra)
    made.set_progress_bar_config(disable=True)
    return made


def _check_size(pipe: Pipeline, recipe: Recipe) -> None:
    multiple = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    for side, value in (("width", recipe.width), ("height", recipe.height)):
        if value < multiple or value % multiple:
            raise ConfigError(f"{side} {value} does not suit this base; use a multiple of {multiple}.")


def _used(adapter: Adapter, strength: float) -> UsedAdapter:
    tokens = tuple(concept.token for concept in adapter.info.concepts)
    return UsedAdapter(adapter.info.name, adapter.digest(), strength, tokens)


def _first(*values: Any) -> Any:
    """The first value that was given."""
    return next((value for value in values if value is not None), None)
