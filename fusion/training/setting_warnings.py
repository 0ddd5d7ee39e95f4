"""What is worth a warning in the settings of a training, though they can be trained with."""

import os

from fusion.training.config import RATES, TrainingConfig

MAX_USUAL_RATE = 0.1  # of AdamW, AdamW in 8 bits and Adafactor
MIN_PRODIGY_RATE = 0.1  # prodigy's is a factor of the rate that it finds


def warnings_about(config: TrainingConfig) -> list[str]:
    """A sentence for each setting that does nothing, or is a learning rate of another optimizer."""
    return [*idle_settings(config), *unusual_rates(config)]


def idle_settings(config: TrainingConfig) -> list[str]:
    """A sentence for each setting that was changed and does nothing beside the others."""
    base, unet_only = config.pretrained_model_name_or_path, bool(config.targets)
    unet_only = unet_only and all(target.startswith("unet") for target in config.targets or ())
    rules: dict[str, tuple[bool, tuple[str, ...]]] = {
        "with gating = 'tokens', under which class prompts run the base itself": (
            config.gating == "tokens", ("with_prior_preservation",)
        ),
        "without with_prior_preservation": (
            not config.with_prior_preservation, ("num_class_images", "prior_loss_weight", "sample_batch_size")
        ),
        "without gating = 'tokens', since the slice is exclusive there": (
            config.gating != "tokens", ("exclusive_slice",)
        ),
        "without enable_bucket": (
            not config.enable_bucket, ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
        ),
        "without shuffle_caption": (not config.shuffle_caption, ("keep_tokens",)),
        "with use_masks = false": (not config.use_masks, ("unmasked_weight",)),
        "without layout = 'strided'": (config.layout != "strided", ("slots",)),
        "without adapter_type = 'guarded'": (config.adapter_type != "guarded", ("guard",)),
        "with optimizer = 'adafactor'": (
            config.optimizer == "adafactor", ("adam_beta1", "adam_beta2", "adam_epsilon")
        ),
        "without validation_prompt": (not config.validation_prompt, ("validation_steps",)),
        "with checkpointing_steps = 0": (not config.checkpointing_steps, ("checkpoints_total_limit",)),
        "where no text encoder is among the targets": (
            unet_only and config.optimizer != "prodigy", ("text_encoder_lr",)
        ),
        "without a base from the hub": (base is None or os.path.exists(base), ("revision",)),  # noqa: PTH110
    }  # fmt: skip
    default = {name: field.default for name, field in TrainingConfig.model_fields.items()}
    return [
        f"{name} does nothing {where}."
        for where, (idle, names) in rules.items() if idle
        for name in names if getattr(config, name) != default[name]
    ]  # fmt: skip


def unusual_rates(config: TrainingConfig) -> list[str]:
    """A sentence for each learning rate that was set and is usual with another optimizer only."""
    rates = {name: getattr(config, name) for name in RATES if name in config.model_fields_set}
    if config.optimizer == "prodigy":
        return [
            f"{name} = {rate:g} is low with optimizer = 'prodigy', which multiplies the learning rate that it finds "
            "by it; 1 is usual."
            for name, rate in rates.items() if 0 < rate < MIN_PRODIGY_RATE
        ]  # fmt: skip
    return [
        f"{name} = {rate:g} is high with optimizer = '{config.optimizer}'; its default is "
        f"{TrainingConfig.model_fields[name].default:g}, and 1 is usual with 'prodigy' only."
        for name, rate in rates.items() if rate > MAX_USUAL_RATE
    ]  # fmt: skip
