"""Storage of observations by slot: any space, and the frames of stacked images once each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize, unwrap_vec_wrapper

from sb3_ezv2.observations import image_keys


def frames_per_observation(env: VecEnv | None) -> int:
    """:return: ``n_stack`` of the environment's ``VecFrameStack`` of images, 1 if there is none"""
    if env is None or not image_keys(env.observation_space):
        return 1
    stack = unwrap_vec_wrapper(env, VecFrameStack)
    return 1 if stack is None else stack.stacked_obs.n_stack


def observation_nbytes(space: spaces.Space, frame_stack: int = 1) -> int:
    """:return: bytes that one observation takes in an :class:`ObservationStore`"""
    images = image_keys(space)
    total = 0
    for key, member in _members(space).items():
        size = int(np.prod(_shape(member))) * np.dtype(member.dtype).itemsize
        total += size // frame_stack if key in images else size
    return total


class ObservationStore:
    """
    Observations of the slots of ``n_envs`` rings of ``ring`` slots each.

    Where images are stacks of ``frame_stack`` frames (along the first axis, the newest last), each slot holds the newest frame
    alone, and the others are those of the slots before. Frames before an episode's first one are all zero
    (``VecFrameStack``) or all equal to it (Gymnasium's ``FrameStackObservation``): whichever the episode's first
    observation shows. Everything else is stored as it comes.

    :param space: of the observations, images with channels first
    :param n_envs: number of rings
    :param ring: slots of each
    :param frame_stack: frames of an image
    :raises ValueError: an image's planes are no multiple of the frames
    """

    def __init__(self, space: spaces.Space, n_envs: int, ring: int, frame_stack: int = 1):
        self.ring = ring
        self.frame_stack = frame_stack
        self.is_dict = isinstance(space, spaces.Dict)
        self.shapes = {key: _shape(member) for key, member in _members(space).items()}
        self.stacked = image_keys(space) if frame_stack > 1 else []
        if frame_stack > 1 and not self.stacked:
            raise ValueError(f"frame_stack={frame_stack} is for images, but there are none in {space}: leave it out.")
        for key in self.stacked:
            if self.shapes[key][0] % frame_stack != 0:
                raise ValueError(f"an image of shape {self.shapes[key]} cannot be a stack of {frame_stack} frames.")
        size = n_envs * ring
        self.arrays: dict[str | None, np.ndarray] = {}
        for key, member in _members(space).items():
            shape = self.shapes[key]
            if key in self.stacked:
                shape = (shape[0] // frame_stack, *shape[1:])
            # Memory of zeros costs nothing before it is written to
            self.arrays[key] = np.zeros((size, *shape), member.dtype)
        if self.stacked:
            # frames of the same episode before a slot's, as far as its stack goes
            self.history = np.zeros(size, np.min_scalar_type(frame_stack))
            self.repeats = np.zeros(size, bool)  # the frames before the episode are its first one, otherwise zeros

    def map_rows(self, function: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        """:param function: of an array with a row for each slot :return: the attributes that hold such arrays, mapped"""
        mapped: dict[str, Any] = {"arrays": {key: function(array) for key, array in self.arrays.items()}}
        if self.stacked:
            mapped.update(history=function(self.history), repeats=function(self.repeats))
        return mapped

    def write(self, slots: np.ndarray, obs: Any, begins: np.ndarray) -> None:
        """
        :param slots: int64 [n], one of each of n environments
        :param obs: [n, ...], or a dictionary of such arrays
        :param begins: bool [n], the first observations of their episodes
        :raises ValueError: a stack's older frames are not those of the observations before
        """
        values = {key: np.reshape(obs[key] if self.is_dict else obs, (len(slots), *self.shapes[key])) for key in self.shapes}
        if not self.stacked:
            for key, value in values.items():
                self.arrays[key][slots] = value
            return
        before = self._back(slots, np.ones_like(slots))
        self.history[slots] = np.where(begins, 0, np.minimum(self.history[before] + 1, self.frame_stack - 1))
        padding = np.zeros(len(slots), bool)
        for key, value in values.items():
            array = self.arrays[key]
            if key in self.stacked:
                padding |= value[:, : -array.shape[1]].reshape(len(slots), -1).any(1)
                value = value[:, -array.shape[1] :]
            array[slots] = value
        self.repeats[slots] = np.where(begins, padding, self.repeats[before])
        for key in self.stacked:
            if not np.array_equal(self._read_stack(key, slots), values[key]):
                raise ValueError(
                    f"the {self.frame_stack} frames of an observation are not those of the observations before it: they "
                    "cannot be stored once. If the training environment was reset or stepped outside of learn(), for instance "
                    "to evaluate, use another one for that. Otherwise give replay_buffer_kwargs=dict(frame_stack=1), or stack "
                    "the frames last of all wrappers."
                )

    def read(self, slots: np.ndarray, device: th.device, env: VecNormalize | None = None) -> Any:
        """
        :param slots: int64 [...]
        :param device: where the observations go
        :param env: normalises them, if given
        :return: tensors [..., observation], or a dictionary of them
        """
        if env is not None and env.norm_obs:
            return self._normalized(slots, device, env)
        result = {}
        for key, array in self.arrays.items():
            if key in self.stacked:
                # Neighbours share frames: each goes to the device once
                source, empty = self._sources(slots)
                unique, inverse = np.unique(source, return_inverse=True)
                frames = th.from_numpy(array[unique]).to(device)[th.from_numpy(inverse.reshape(-1)).to(device)]
                frames = frames.unflatten(0, source.shape)
                if empty.any():
                    frames[th.from_numpy(empty).to(device)] = 0
                result[key] = frames.flatten(slots.ndim, slots.ndim + 1)
            else:
                result[key] = th.from_numpy(array[slots]).to(device)
        return result if self.is_dict else result[None]

    def _normalized(self, slots: np.ndarray, device: th.device, env: VecNormalize) -> Any:
        flat = {key: self._read_stack(key, slots) if key in self.stacked else self.arrays[key][slots] for key in self.arrays}
        flat = {key: value.reshape(-1, *self.shapes[key]) for key, value in flat.items()}
        normalized: Any = env.normalize_obs(flat if self.is_dict else flat[None])  # type: ignore[arg-type]

        def tensor(key: str | None, value: np.ndarray) -> th.Tensor:
            return th.from_numpy(value.reshape(*slots.shape, *self.shapes[key])).to(device)

        return {key: tensor(key, value) for key, value in normalized.items()} if self.is_dict else tensor(None, normalized)

    def _back(self, slots: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """The slots so many steps before, in the same rings."""
        return slots // self.ring * self.ring + (slots % self.ring - steps) % self.ring

    def _sources(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """:return: int64 [..., frames], where the frames are; bool [..., frames], those that are zeros instead"""
        back = np.arange(self.frame_stack - 1, -1, -1)
        history = self.history[slots][..., None].astype(np.int64)
        return self._back(slots[..., None], np.minimum(back, history)), (back > history) & ~self.repeats[slots][..., None]

    def _read_stack(self, key: str | None, slots: np.ndarray) -> np.ndarray:
        source, empty = self._sources(slots)
        frames = self.arrays[key][source]
        frames[empty] = 0
        return frames.reshape(*slots.shape, *self.shapes[key])


def _members(space: spaces.Space) -> dict[str | None, spaces.Space]:
    if isinstance(space, spaces.Dict):
        return {key: member for key, member in space.spaces.items()}
    return {None: space}


def _shape(space: spaces.Space) -> tuple[int, ...]:
    shape = get_obs_shape(space)
    assert isinstance(shape, tuple)
    return shape
