"""Settings and spaces, checked before anything is built: each fault is one sentence that says what to do."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from torch import nn

from sb3_ezv2.observations import apply, image_keys

UNSUPPORTED_OPTIONS = {
    "action_noise": "EZV2 explores by the noise of its search, so action_noise does not apply: remove it.",
    "use_sde": "EZV2 explores by the noise of its search, so gSDE (use_sde) does not apply: remove it.",
    "sde_sample_freq": "EZV2 explores by the noise of its search, so gSDE (sde_sample_freq) does not apply: remove it.",
    "use_sde_at_warmup": "EZV2 explores by the noise of its search, so gSDE (use_sde_at_warmup) does not apply: remove it.",
    "optimize_memory_usage": "EZV2's replay stores every observation once, so optimize_memory_usage does not apply.",
    "n_steps": "EZV2 calls the length of its value windows td_steps, not n_steps.",
}

POLICY_OPTIONS = {
    "features_extractor_class": "its representation is EfficientZero's; a features extractor of one's own is for MlpPolicy.",
    "features_extractor_kwargs": "its representation is EfficientZero's; a features extractor of one's own is for MlpPolicy.",
    "normalize_images": "its images are always divided by 255.",
    "activation_fn": "the activations are the paper's.",
}
"""Of SB3's policies, with the reason why a policy of EZV2 may not have them."""

BUFFER_SETTINGS = {
    "buffer_size": "buffer_size",
    "observation_space": "env",
    "action_space": "env",
    "device": "device",
    "n_envs": "env",
    "gamma": "gamma",
    "unroll_steps": "unroll_steps",
    "td_steps": "td_steps",
    "td_steps_min": "td_steps_min",
    "td_steps_age": "td_steps_age",
    "alpha": "priority_alpha",
    "beta": "priority_beta",
    "seed": "seed",
}
"""Arguments of the replay buffer, and those of the algorithm that they are made from."""


def check_options(options: dict[str, Any]) -> None:
    """
    :param options: keyword arguments of the constructor that EZV2 does not have
    :raises TypeError: there is one
    """
    for name in options:
        raise TypeError(UNSUPPORTED_OPTIONS.get(name, f"EZV2 has no argument {name!r}."))


def check_policy(policy_class: type, base: type, kwargs: dict[str, Any]) -> None:
    """
    :param policy_class: given to the constructor
    :param base: of all policies of EZV2
    :param kwargs: ``policy_kwargs``
    :raises ValueError: the policy is another algorithm's
    :raises TypeError: an argument that the policy does not have
    """
    if not issubclass(policy_class, base):
        raise ValueError(
            f"EZV2 plans with networks of its own: {policy_class.__module__}.{policy_class.__name__} does not apply, policy "
            'must be "MlpPolicy", "CnnPolicy", "MultiInputPolicy" or a subclass of sb3_ezv2.Ezv2Policy.'
        )
    known = inspect.signature(policy_class).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    given = ("observation_space", "action_space", "lr_schedule", "search_settings", "predicts_observations")
    for name in kwargs:
        if name not in known or name in given:
            reason = POLICY_OPTIONS.get(name, f"it has {', '.join(x for x in known if x not in given)}.")
            raise TypeError(f"policy_kwargs: {policy_class.__name__} takes no argument {name!r}: {reason}")


def check_buffer_kwargs(buffer_class: type, kwargs: dict[str, Any]) -> None:
    """
    :param buffer_class: of the replay buffer
    :param kwargs: ``replay_buffer_kwargs``
    :raises TypeError: an argument that the buffer does not have, or that is a setting of the algorithm
    """
    known = inspect.signature(buffer_class).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for name in kwargs:
        if name in BUFFER_SETTINGS:
            raise TypeError(f"replay_buffer_kwargs: {name!r} is set by EZV2's own argument {BUFFER_SETTINGS[name]!r}.")
        if name not in known and not takes_all:
            others = ", ".join(x for x in known if x not in BUFFER_SETTINGS)
            raise TypeError(f"replay_buffer_kwargs: {buffer_class.__name__} takes no argument {name!r}: it has {others}.")


def check_train_freq(train_freq: TrainFreq, n_envs: int) -> None:
    """
    :param train_freq: as SB3 converts it
    :param n_envs: number of environments
    :raises ValueError: no steps, or whole episodes of several environments
    """
    check_integer("train_freq", train_freq.frequency, 1)
    if train_freq.unit == TrainFrequencyUnit.EPISODE and n_envs > 1:
        raise ValueError(
            f"train_freq in episodes is for one environment, and there are {n_envs}: give a number of steps, for instance "
            "train_freq=1 with gradient_steps=-1."
        )


def check_replay_buffer(buffer: Any, buffer_class: type, observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """
    :param buffer: read from a file
    :param buffer_class: what it must be
    :param observation_space: of the agent
    :param action_space: of the agent
    :raises ValueError: it is of another algorithm or for other spaces
    """
    if not isinstance(buffer, buffer_class):
        raise ValueError(
            f"the file holds a {type(buffer).__name__}, but EZV2 replays sequences: load a buffer that save_replay_buffer "
            "of an EZV2 agent has written."
        )
    for name, space in (("observation", observation_space), ("action", action_space)):
        if getattr(buffer, f"{name}_space") != space:
            raise ValueError(
                f"the {name} space of the replay buffer, {getattr(buffer, f'{name}_space')}, is not the agent's, {space}."
            )


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """:raises ValueError: a space that EZV2 does not support"""
    if isinstance(action_space, spaces.Box):
        if not np.issubdtype(action_space.dtype, np.floating):
            raise ValueError(f"Box actions must be of a floating dtype, not {action_space.dtype}.")
        if not (np.isfinite(action_space.low).all() and np.isfinite(action_space.high).all()):
            raise ValueError(
                "Box actions must have finite bounds: give the environment some, for instance with a gymnasium wrapper."
            )
        if int(np.prod(action_space.shape)) == 0:
            raise ValueError("the action space has no dimension at all.")
    elif isinstance(action_space, (spaces.MultiDiscrete, spaces.MultiBinary)):
        if len(action_space.shape) != 1:
            raise ValueError(
                f"{type(action_space).__name__} actions must have one dimension, not the shape {action_space.shape}: "
                "flatten them in a wrapper of the environment."
            )
        if action_space.shape[0] == 0:
            raise ValueError("the action space has no dimension at all.")
    elif not isinstance(action_space, spaces.Discrete):
        raise ValueError(f"EZV2 supports Box, Discrete, MultiDiscrete and MultiBinary action spaces, not {action_space}.")
    members = observation_space.spaces.values() if isinstance(observation_space, spaces.Dict) else [observation_space]
    for space in members:
        if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)):
            raise ValueError(
                "EZV2 supports Box, Discrete, MultiBinary and MultiDiscrete observation spaces and Dicts of them, not "
                f"{space}: flatten it with gymnasium.wrappers.FlattenObservation."
            )
        if isinstance(space, spaces.Box) and space.shape == ():
            raise ValueError(
                "Box observations must have at least one dimension, not the shape (): give single numbers one with "
                "gymnasium.wrappers.ReshapeObservation(env, (1,))."
            )
        if isinstance(space, spaces.MultiDiscrete) and len(space.shape) > 1:
            raise ValueError(f"MultiDiscrete observations must have one dimension, not the shape {space.shape}.")
        if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)) and np.any(space.start != 0):
            # SB3's preprocessing encodes them one-hot as if they began at 0
            raise ValueError(
                f"{type(space).__name__} observations must start at 0, not at {space.start}, as everywhere in SB3: subtract "
                "the start with gymnasium.wrappers.TransformObservation."
            )


def has_images(observation_space: spaces.Dict) -> bool:
    """:return: whether any of the observations is an image, or meant as one"""
    return any(isinstance(space, spaces.Box) and _may_be_image(space) for space in observation_space.spaces.values())


def check_vectors(observation_space: spaces.Dict) -> None:
    """:raises ValueError: one of the observations is an image, or has a name that SB3's ``CombinedExtractor`` cannot take"""
    if has_images(observation_space):
        raise ValueError("MlpPolicy is not for Dict observations with images: take MultiInputPolicy.")
    for name in observation_space.spaces:
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"SB3's CombinedExtractor cannot take an observation of the name {name!r}, which is empty, has a dot or is an "
                "attribute of torch.nn.ModuleDict: give it another name in a wrapper of the environment."
            )


def check_images(observation_space: spaces.Space, n_downsamples: int) -> None:
    """
    :param observation_space: as the algorithm sees it, images with channels first
    :param n_downsamples: halvings of the resolution
    :raises ValueError: there is no image, or one that the image networks cannot take
    """
    if isinstance(observation_space, spaces.Dict):
        members = observation_space.spaces
    else:
        members = {"observation": observation_space}
    for name, space in members.items():
        if isinstance(space, spaces.Box) and (len(members) == 1 or _may_be_image(space)):
            _check_image(name, space, n_downsamples)
        elif len(members) == 1:
            raise ValueError(f"CnnPolicy is for images, not for {space}: take MlpPolicy.")
    if isinstance(observation_space, spaces.Dict) and not any(map(is_image_space, members.values())):
        raise ValueError(
            "none of the Dict's observations is an image (uint8 in [0, 255], three dimensions): let EZV2 choose the networks "
            "by the name MultiInputPolicy."
        )


def _may_be_image(space: spaces.Box) -> bool:
    """What is meant as an image, if in a form that is not understood."""
    return is_image_space(space) or (space.dtype == np.uint8 and len(space.shape) in (2, 3) and min(space.shape[-2:]) >= 16)


def _check_image(name: str, space: spaces.Box, n_downsamples: int) -> None:
    shape = space.shape
    if len(shape) == 2:
        raise ValueError(
            f"the {name} of shape {shape} has no channel axis: give grey images one, for instance with "
            "gymnasium.wrappers.GrayscaleObservation(env, keep_dim=True)."
        )
    if len(shape) != 3:
        raise ValueError(f"CnnPolicy is for images of three dimensions, not the {name} of shape {shape}: take MlpPolicy.")
    if space.dtype != np.uint8 or not is_image_space(space):
        raise ValueError(
            f"images must be of dtype uint8 with bounds 0 and 255, but the {name} is {space.dtype} in "
            f"[{space.low.min()}, {space.high.max()}]: let the environment give bytes, the network divides them by 255."
        )
    channels, height, width = shape
    if channels > min(height, width):
        raise ValueError(
            f"the {name} looks like {channels} channels of {height}x{width} pixels: the channels must be the first axis or "
            "the last, and fewer than the pixels of the others."
        )
    least = 2**n_downsamples + 1
    if min(height, width) < least:
        works = max(1, int(math.log2(max(2, min(height, width) - 1))))
        raise ValueError(
            f"the {name} of {height}x{width} pixels is too small for {n_downsamples} halvings, which need {least}x{least}: "
            f"give policy_kwargs=dict(n_downsamples={works}) or larger images."
        )


def check_memory(nbytes: int, buffer_size: int, what: str = "replay buffer", alternative: str = "") -> None:
    """
    :param nbytes: what a replay buffer, or something that grows with it, takes when it is full
    :param buffer_size: the replay buffer's size
    :param what: name of what takes the memory
    :param alternative: what else can be done than to lower ``buffer_size``
    :raises ValueError: so much memory is not free
    """
    free = free_memory()
    if free is not None and nbytes > free:
        raise ValueError(
            f"the {what} takes {nbytes / 1e9:.2f} GB when full, but {free / 1e9:.2f} GB of memory are free: lower "
            f"buffer_size to at most {int(buffer_size * free / nbytes)}{alternative and ', ' + alternative}."
        )


def free_memory() -> int | None:
    """:return: bytes that this process can still allocate, by the kernel and its control group; None where that is unknown"""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        # what the group's files take in the cache is given up when memory is needed
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["file"]
        return free if limit == "max" else min(free, int(limit) - int(used) + int(cached))
    except (OSError, KeyError, ValueError):
        return free


def check_settings(settings: dict[str, Any]) -> None:
    """
    :param settings: the algorithm's attributes by their names
    :raises ValueError: one of them is out of its range
    """
    for name in (
        "buffer_size",
        "batch_size",
        "unroll_steps",
        "td_steps",
        "td_steps_min",
        "n_simulations",
        "n_sampled_actions",
        "n_inner_actions",
        "acting_update_interval",
        "exploration_repeat",
    ):
        check_integer(name, settings[name], 1)
    for name in ("learning_starts", "final_gradient_steps"):
        check_integer(name, settings[name], 0)
    check_integer("gradient_steps", settings["gradient_steps"], -1)
    if settings["gradient_steps"] == 0 and settings["final_gradient_steps"] > 0:
        raise ValueError("final_gradient_steps follow the updates of the last step: with gradient_steps=0 there are none.")
    for name, least in (
        ("td_steps_age", 1),
        ("lr_decay_updates", 1),
        ("target_update_interval", 1),
        ("mixed_value_start", 0),
        ("fresh_transitions", 0),
    ):
        if settings[name] is not None:
            check_integer(name, settings[name], least, " or None")
    if settings["td_steps_min"] > settings["td_steps"]:
        raise ValueError(
            f"td_steps_min ({settings['td_steps_min']}) must not be above td_steps ({settings['td_steps']}): the windows "
            "shrink with age."
        )
    if settings["batch_size"] * settings["unroll_steps"] < 2:
        raise ValueError("batch_size and unroll_steps cannot both be 1: batch norm needs more than one state.")
    for name in ("gamma", "policy_action_fraction", "warmup_fraction", "cache_refresh_fraction"):
        _check_number(name, settings[name], 0, 1)
    for name in ("tau", "lr_decay_factor"):
        _check_number(name, settings[name], 0, 1, open_low=True)
    _check_number("average_fraction", settings["average_fraction"], 0, 0.5)
    for name in ("flat_std_scale", "max_grad_norm"):
        _check_number(name, settings[name], 0, math.inf, open_low=True)
    for name in (
        "c_visit",
        "priority_alpha",
        "priority_beta",
        "reward_coef",
        "policy_coef",
        "vf_coef",
        "consistency_coef",
        "observation_coef",
        "ent_coef",
    ):
        _check_number(name, settings[name], 0, math.inf)
    _check_number("c_scale", 0.0 if settings["c_scale"] is None else settings["c_scale"], 0, math.inf)
    _check_number("exploration_eps", 0.0 if settings["exploration_eps"] is None else settings["exploration_eps"], 0, 1)
    if not callable(settings["learning_rate"]):
        _check_number("learning_rate", settings["learning_rate"], 0, math.inf)
    _check_choice("value_target", settings["value_target"], ("mixed", "td", "search"))
    _check_choice("policy_target", settings["policy_target"], ("auto", "candidates", "best_action"))
    if settings["search_value"] is not None:
        _check_choice("search_value", settings["search_value"], ("mean", "improved"))
    _check_reanalysis(settings)


def _check_reanalysis(settings: dict[str, Any]) -> None:
    """:raises ValueError: see :func:`check_settings`"""
    for name in ("reanalyze_cache", "reanalyze_ahead"):
        if not isinstance(settings[name], bool):
            raise ValueError(f"{name} must be True or False, not {settings[name]!r}.")
    thread = settings["reanalyze_thread"]
    if thread is not None and not isinstance(thread, bool):
        raise ValueError(f"reanalyze_thread must be True, False or None, not {thread!r}.")
    if thread and not settings["reanalyze_ahead"]:
        raise ValueError(
            "reanalyze_thread is for the batches that reanalyze_ahead makes: set that to True, or leave this out."
        )
    if settings["cache_refresh_fraction"] > 0 and not settings["reanalyze_cache"]:
        raise ValueError(
            "cache_refresh_fraction is of the searches that reanalyze_cache remembers: set that to True, or this to 0."
        )


def check_integer(name: str, value: Any, least: int, alternative: str = "") -> None:
    """
    :param name: of the setting
    :param value: of the setting
    :param least: smallest that is allowed
    :param alternative: what else is allowed, as the message shall name it
    :raises ValueError: it is none, or a smaller one
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}{alternative}, not {value!r}.")


def _check_number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    numeric = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not numeric or not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        bounds = f"{'above' if open_low else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
        raise ValueError(f"{name} must be a finite number {bounds}, not {value!r}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}.")


def check_normalizer(normalizer: Any, observation_space: spaces.Space) -> None:
    """
    :param normalizer: the environment's ``VecNormalize``, or None
    :param observation_space: of the agent
    :raises ValueError: a wrapper around it changes the observations: its raw ones, which are stored, are then other ones
    """
    if normalizer is not None and normalizer.observation_space != observation_space:
        raise ValueError(
            "VecNormalize must be outside of what changes the shape of observations, such as VecTransposeImage or "
            "VecFrameStack: wrap the environment as VecNormalize(VecTransposeImage(env), ...)."
        )


def check_observation(observation: Any, space: spaces.Space) -> None:
    """
    What SB3 does not name when it takes an observation.

    :param observation: given to ``predict``
    :param space: of the policy, images with channels first
    :raises ValueError: no dictionary with the space's keys, an image with too few or too many dimensions
    """
    if isinstance(space, spaces.Dict):
        keys = sorted(observation) if isinstance(observation, dict) else None
        if keys != sorted(space.spaces):
            given = f"a {type(observation).__name__}" if keys is None else f"one with the keys {keys}"
            raise ValueError(f"the observation must be a dictionary with the keys {sorted(space.spaces)}, not {given}.")
    elif isinstance(observation, dict):
        return  # SB3's own check raises an error for this
    for key in image_keys(space):
        shape = np.shape(observation if key is None else observation[key])
        if len(shape) not in (3, 4):
            expected = (space if key is None else space[key]).shape or ()  # type: ignore[index]
            raise ValueError(
                f"the {key or 'observation'} of shape {shape} is no image of this agent: please use {expected} or "
                f"(n_env, {', '.join(map(str, expected))}), the channels first or last."
            )


def check_finite(what: str, value: Any, step: int, first_env: int = 0) -> None:
    """
    :param what: name of the value in the message
    :param value: [n_envs, ...], or a dictionary of such arrays
    :param step: environment steps so far
    :param first_env: number of the first environment
    :raises ValueError: an entry is NaN or infinite
    """
    for array in value.values() if isinstance(value, dict) else [value]:
        if not np.issubdtype(array.dtype, np.floating) or np.isfinite(array).all():
            continue
        env = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
        raise ValueError(f"step {step}: the {what} of environment {first_env + env} has NaN or infinite values: {array[env]}")


def check_transition(obs: Any, reward: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], step: int) -> None:
    """
    :param obs: the next observations, [n_envs, ...] or a dictionary of such arrays
    :param reward: [n_envs]
    :param dones: bool [n_envs]
    :param infos: with the final observations of episodes that have ended
    :param step: environment steps so far
    :raises ValueError: an entry of any of them is NaN or infinite
    """
    check_finite("observation", obs, step)
    check_finite("reward", reward, step)
    for env in np.flatnonzero(dones):
        final = infos[env].get("terminal_observation")
        if final is not None:
            check_finite("final observation", apply(lambda x: np.asarray(x)[None], final), step, int(env))


def explain_spaces(error: ValueError) -> ValueError:
    """:param error: SB3's when it loads an agent :return: the same, with what to do if it is about observations"""
    if "Observation spaces do not match" not in str(error):
        return error
    return ValueError(
        f"{error} (agent's, environment's). Where images differ in their channels alone, wrap the environment in "
        "VecFrameStack with as many frames as the agent was trained with."
    )
