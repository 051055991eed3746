"""Augmentation of training images: a small random shift and a random intensity (EfficientZero 4.1, App. A.2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ezv2.observations import image_keys


class AugmentedImages(NamedTuple):
    """
    Images and the factors that they are still to be multiplied by: an update holds the images of all unrolled steps, and as
    floats they would be its largest tensor.

    :param images: [..., planes, height, width] as the environment gives them, bytes for instance
    :param factors: float32 [..., 1, 1, 1]
    """

    images: th.Tensor
    factors: th.Tensor

    def floats(self) -> th.Tensor:
        """:return: float32, in the shape, the order in memory and the units of ``images``"""
        # images * factors would convert the images to another copy first
        return th.empty_like(self.images, dtype=th.float32).copy_(self.images).mul_(self.factors)


def random_shift(images: th.Tensor, pixels: int, rng: np.random.Generator) -> th.Tensor:
    """
    Move each image by up to ``pixels`` in both directions; what comes in repeats the border.

    :param images: [B, U + 1, planes, height, width] of any dtype; all planes of an image (its frames) move together
    :param pixels: largest shift
    :param rng: of the shifts
    :return: as ``images``; in memory they lie step by step, so that the images of some steps are no copy
    """
    size, steps, planes, height, width = images.shape
    offsets = th.from_numpy(rng.integers(-pixels, pixels + 1, size=(2, size, steps, 1))).to(images.device)
    rows = (th.arange(height, device=images.device) + offsets[0]).clamp(0, height - 1)  # [B, U + 1, height]
    columns = (th.arange(width, device=images.device) + offsets[1]).clamp(0, width - 1)  # [B, U + 1, width]
    index = th.arange(size, device=images.device)[:, None, None]
    shifted = images.new_empty(steps, size, height, width, planes)
    for step in range(steps):
        # An index between slices puts its dimensions first, so the planes go last on the way
        shifted[step] = images[:, step].movedim(1, -1)[index, rows[:, step, :, None], columns[:, step, None, :]]
    return shifted.movedim(-1, 2).transpose(0, 1)


def random_intensity(images: th.Tensor, scale: float, rng: np.random.Generator) -> AugmentedImages:
    """
    Multiply each image by 1 + ``scale`` times a normal number, which is clipped to [-2, 2].

    :param images: [..., planes, height, width]
    :param scale: standard deviation of the factors
    :param rng: of the factors
    :return: the images with their factors
    """
    noise = rng.standard_normal((*images.shape[:-3], 1, 1, 1), dtype=np.float32).clip(-2, 2)
    return AugmentedImages(images, th.from_numpy(1 + np.float32(scale) * noise).to(images.device))


def augment(obs: PyTorchObs, space: spaces.Space, pixels: int, intensity: float, rng: np.random.Generator) -> Any:
    """
    Each observation gets a shift and an intensity of its own, so that the two branches of the consistency loss see two
    views; vectors stay as they are.

    :param obs: [B, U + 1, planes, height, width] as the environment gives them, or a dictionary
    :param space: of the observations
    :param pixels: largest shift; 0: none
    :param intensity: standard deviation of the factors; 0: none
    :param rng: of both
    :return: as ``obs``; images as :class:`AugmentedImages` if there is an intensity
    """
    keys = image_keys(space)

    def views(images: th.Tensor) -> th.Tensor | AugmentedImages:
        shifted = random_shift(images, pixels, rng) if pixels > 0 else images
        return random_intensity(shifted, intensity, rng) if intensity > 0 else shifted

    if isinstance(obs, dict):
        return {key: views(value) if key in keys else value for key, value in obs.items()}
    return views(obs) if keys else obs
