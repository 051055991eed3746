"""Observations as tensors or, for ``Dict`` spaces, dictionaries of them: one function for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space

Observations = TypeVar("Observations")


def apply(function: Callable[[Any], Any], obs: Observations) -> Observations:
    """
    :param function: of one array or tensor
    :param obs: one, a named tuple of them (augmented images with their factors), or a dictionary of either
    :return: the function's result, or its results in a tuple or dictionary like ``obs``
    """
    if isinstance(obs, dict):
        return {key: apply(function, value) for key, value in obs.items()}  # type: ignore[return-value]
    return type(obs)(*map(function, obs)) if isinstance(obs, tuple) else function(obs)


def batch_size(obs: Any) -> int:
    """:param obs: [B, ...], or a dictionary of such arrays or tensors :return: B"""
    return len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)


def device_of(obs: Any) -> th.device:
    """:param obs: a tensor, or a dictionary of tensors :return: where they are"""
    return next(iter(obs.values())).device if isinstance(obs, dict) else obs.device


def image_keys(space: spaces.Space) -> list[str | None]:
    """:return: keys of a ``Dict`` space's images; ``[None]`` for a space that is an image itself"""
    if isinstance(space, spaces.Dict):
        return [key for key, member in space.spaces.items() if is_image_space(member)]
    return [None] if is_image_space(space) else []
