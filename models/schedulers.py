"""Which sampler a model is sampled with: its family's published one, its own where it needs that, or the one asked for."""

import diffusers
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from errors import InputError, first_line

# What a model was trained with: a sampler of another class, or other settings, must agree with it.
TRAINED_WITH = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
FEW_STEP = ("LCMScheduler", "TCDScheduler")
CHOICES = (*(each.name for each in KarrasDiffusionSchedulers if each.name != "EDMEulerScheduler"), *FEW_STEP)
FEW_STEPS, NO_GUIDANCE = 4, 1.0  # a few-step model's defaults


def class_of(name):
    """The diffusers class that --scheduler names; InputError if it is none that these models can be sampled with."""
    if name not in CHOICES:
        raise InputError(f"--scheduler {name}: is not one of {', '.join(CHOICES)}")
    return getattr(diffusers, name)


def is_few_step(class_name, config):
    """Whether a sampler is that of a distilled model: consistency models, or trailing steps from the noisiest level on.

    Lightning and Turbo are published with the latter (Lin et al., 2024). Models of zero terminal SNR step so too, but many
    times.
    """
    trailing = config.get("timestep_spacing") == "trailing" and config.get("prediction_type", "epsilon") == "epsilon"
    return class_name in FEW_STEP or (trailing and not config.get("rescale_betas_zero_snr"))


def needs_its_own(class_name, config, family):
    """Whether a model is not to be sampled with the family's sampler, or not with its published settings."""
    other_target = class_name != family.scheduler and config.get("prediction_type", "epsilon") != "epsilon"
    return bool(is_few_step(class_name, config) or config.get("rescale_betas_zero_snr") or other_target)


def settled(own, family, embedded=False, chosen=None):
    """The sampler to use in place of a pipeline's `own`; `chosen` is the class that --scheduler names, if it is given."""
    name, config = type(own).__name__, dict(own.config)
    published = dict(family.embedded.scheduler_config if embedded else family.scheduler_config)
    if chosen is None and (not family.scheduler or needs_its_own(name, config, family)):
        return own
    wanted = chosen or family.scheduler
    if wanted == family.scheduler:
        trained = {key: config[key] for key in TRAINED_WITH if key in config}
        return getattr(diffusers, wanted).from_config(trained | published)
    try:
        return class_of(wanted).from_config(own.config)
    except (ImportError, ValueError, NotImplementedError) as reason:
        raise InputError(f"--scheduler {wanted}: cannot sample this model ({first_line(reason)})") from None
