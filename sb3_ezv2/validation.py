"""Settings and spaces, checked before anything is built: each fault is one sentence that says what to do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces

UNSUPPORTED_OPTIONS = {
    "action_noise": "EZV2 explores by the noise of its search, so action_noise does not apply: remove it.",
    "use_sde": "EZV2 explores by the noise of its search, so gSDE (use_sde) does not apply: remove it.",
    "sde_sample_freq": "EZV2 explores by the noise of its search, so gSDE (sde_sample_freq) does not apply: remove it.",
    "use_sde_at_warmup": "EZV2 explores by the noise of its search, so gSDE (use_sde_at_warmup) does not apply: remove it.",
    "optimize_memory_usage": "EZV2's replay stores every observation once, so optimize_memory_usage does not apply.",
    "n_steps": "EZV2 calls the length of its value windows td_steps, not n_steps.",
}


def check_options(options: dict[str, Any]) -> None:
    """
    :param options: keyword arguments of the constructor that EZV2 does not have
    :raises TypeError: there is one
    """
    for name in options:
        raise TypeError(UNSUPPORTED_OPTIONS.get(name, f"EZV2 has no argument {name!r}."))


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
    elif not isinstance(action_space, spaces.Discrete):
        raise ValueError(f"EZV2 supports Discrete and Box action spaces, not {action_space}.")
    if not isinstance(observation_space, (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)):
        raise ValueError(
            f"EZV2 supports Box, Discrete, MultiBinary and MultiDiscrete observation spaces, not {observation_space}: "
            "flatten it with gymnasium.wrappers.FlattenObservation."
        )
    if isinstance(observation_space, spaces.MultiDiscrete) and len(observation_space.shape) > 1:
        raise ValueError(f"MultiDiscrete observations must have one dimension, not the shape {observation_space.shape}.")


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
        "target_update_interval",
    ):
        _check_integer(name, settings[name], 1)
    for name in ("learning_starts", "final_gradient_steps"):
        _check_integer(name, settings[name], 0)
    _check_integer("gradient_steps", settings["gradient_steps"], -1)
    for name, least in (("td_steps_age", 1), ("mixed_value_start", 0), ("fresh_transitions", 0)):
        if settings[name] is not None:
            _check_integer(name, settings[name], least, " or None")
    if settings["td_steps_min"] > settings["td_steps"]:
        raise ValueError(
            f"td_steps_min ({settings['td_steps_min']}) must not be above td_steps ({settings['td_steps']}): the windows "
            "shrink with age."
        )
    if settings["batch_size"] * settings["unroll_steps"] < 2:
        raise ValueError("batch_size and unroll_steps cannot both be 1: batch norm needs more than one state.")
    for name in ("gamma", "policy_action_fraction", "warmup_fraction"):
        _check_number(name, settings[name], 0, 1)
    _check_number("tau", settings["tau"], 0, 1, open_low=True)
    for name in ("flat_std_scale", "max_grad_norm"):
        _check_number(name, settings[name], 0, math.inf, open_low=True)
    for name in (
        "c_visit",
        "c_scale",
        "priority_alpha",
        "priority_beta",
        "reward_coef",
        "policy_coef",
        "vf_coef",
        "consistency_coef",
        "ent_coef",
    ):
        _check_number(name, settings[name], 0, math.inf)
    if not callable(settings["learning_rate"]):
        _check_number("learning_rate", settings["learning_rate"], 0, math.inf, open_low=True)
    _check_choice("value_target", settings["value_target"], ("mixed", "td", "search"))
    _check_choice("policy_target", settings["policy_target"], ("auto", "candidates", "best_action"))
    if not isinstance(settings["reanalyze_cache"], bool):
        raise ValueError(f"reanalyze_cache must be True or False, not {settings['reanalyze_cache']!r}.")


def _check_integer(name: str, value: Any, least: int, alternative: str = "") -> None:
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


def check_finite(what: str, array: np.ndarray, step: int) -> None:
    """
    :param what: name of the array in the message
    :param array: [n_envs, ...]
    :param step: environment steps so far
    :raises ValueError: an entry is NaN or infinite
    """
    if not np.issubdtype(array.dtype, np.floating) or np.isfinite(array).all():
        return
    env = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
    raise ValueError(f"step {step}: the {what} of environment {env} has NaN or infinite values: {array[env]}")
