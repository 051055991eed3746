"""Tiny settings and environments for tests of the whole algorithm."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

from sb3_ezv2 import EZV2

TINY: dict[str, Any] = dict(
    batch_size=16,
    learning_starts=40,
    n_simulations=4,
    n_sampled_actions=4,
    acting_update_interval=10,
    target_update_interval=20,
    device="cpu",
    policy_kwargs=dict(net_arch=[16], state_dim=16, n_blocks=1, action_embedding_dim=8),
)
"""Shortest runs that pass through everything."""

SMALL: dict[str, Any] = dict(
    learning_starts=300,
    batch_size=32,
    n_simulations=16,
    n_sampled_actions=8,
    acting_update_interval=25,
    target_update_interval=50,
    device="cpu",
    policy_kwargs=dict(net_arch=[64], state_dim=32, n_blocks=1, action_embedding_dim=16, projection_dim=32),
)
"""Learn small tasks in a thousand steps or so."""


def make(env: Any = "CartPole-v1", **settings: Any) -> EZV2:
    """
    :param env: any that MlpPolicy takes
    :param settings: other than :data:`TINY` and the seed 0
    """
    return EZV2("MlpPolicy", env, **{"seed": 0, **TINY, **settings})


def weights(model: EZV2) -> th.Tensor:
    """:return: everything that the policy holds, running statistics and all copies of the network, as one vector"""
    return th.cat([x.detach().float().flatten().clone() for x in model.policy.state_dict().values()])


class SpacesEnv(gym.Env):
    """
    Any spaces. The reward is 1 for Discrete action 0, or minus the mean square of a Box action.

    :param observation_space: observations are drawn from it
    :param action_space: of any kind but Dict and Tuple
    :param length: steps of an episode
    :param truncates: episodes end by truncation, otherwise by termination
    """

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, length: int = 11, truncates: bool = False):
        self.observation_space = observation_space
        self.action_space = action_space
        self.length = length
        self.truncates = truncates
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.steps += 1
        reward = -float(np.mean(np.square(action)))
        if isinstance(self.action_space, spaces.Discrete):
            reward = float(action == self.action_space.start)
        ended = self.steps >= self.length
        return self.observation_space.sample(), reward, ended and not self.truncates, ended and self.truncates, {}


BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)
"""A space of vectors for where the space does not matter."""


class FaultyEnv(SpacesEnv):
    """
    Gives NaN in the observation, the final observation or the reward.

    :param fault: ``"observation"``, ``"final observation"`` or ``"reward"``
    :param at: steps of all episodes before the fault
    """

    def __init__(self, fault: str, at: int):
        super().__init__(BOX, spaces.Discrete(2), length=5)
        self.fault, self.at = fault, at
        self.total = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        self.total += 1
        if self.total >= self.at:
            if self.fault == "reward":
                reward = float("nan")
            elif (self.fault == "observation" and not terminated) or (self.fault == "final observation" and terminated):
                obs = np.full_like(obs, np.inf)
        return obs, reward, terminated, truncated, info
