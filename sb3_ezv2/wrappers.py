"""A wrapper for environments whose states cannot be saved otherwise."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import gymnasium as gym
from gymnasium.utils.env_checker import data_equivalence


class Resumable(gym.Wrapper[Any, Any, Any, Any]):
    """
    Remembers what rebuilds the running episode: the random generator before its reset, and the actions since.

    Many simulators cannot be pickled in the middle of an episode, nearly all can be replayed. Checkpoints
    (:mod:`sb3_ezv2.checkpoint`) of a training run in environments with this wrapper go on in the middle of an episode.
    It must be outside of all wrappers with a state: ``make_vec_env(env_id, wrapper_class=Resumable)`` does that.

    :param env: uses no random numbers but those of its ``np_random``
    """

    def __init__(self, env: gym.Env[Any, Any]):
        super().__init__(env)
        self._generator: Any = None
        self._reset_arguments: dict[str, Any] = {}
        self._actions: list[Any] = []
        self._observation: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._generator = None if seed is not None else deepcopy(self.env.unwrapped.np_random)
        self._reset_arguments = {"seed": seed, "options": options}
        self._actions = []
        self._observation, info = self.env.reset(seed=seed, options=options)
        return self._observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._actions.append(deepcopy(action))
        result = self.env.step(action)
        self._observation = result[0]
        return result

    def snapshot(self) -> dict[str, Any]:
        """What :meth:`restore` needs, as one picklable dictionary."""
        return {
            "generator": deepcopy(self._generator),
            "reset_arguments": self._reset_arguments,
            "actions": list(self._actions),
            "observation": deepcopy(self._observation),
        }

    def restore(self, snapshot: dict[str, Any]) -> bool:
        """
        Replay the episode of ``snapshot``.

        :param snapshot: what :meth:`snapshot` returned, in this process or an earlier one
        :return: whether the environment is again where it was; False if it does not repeat itself
        """
        if snapshot["generator"] is not None:
            self.env.unwrapped.np_random = deepcopy(snapshot["generator"])
        self.reset(**snapshot["reset_arguments"])
        over = False
        for action in snapshot["actions"]:
            if over:
                return False
            _, _, terminated, truncated, _ = self.step(action)
            over = terminated or truncated
        return not over and bool(data_equivalence(self._observation, snapshot["observation"], exact=True))
