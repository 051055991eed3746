"""The smallest agents that still do everything, for tests of how EZV2 fits into Stable-Baselines3."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from common import BOX, SpacesEnv
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ezv2 import EZV2, CnnPolicy

IMAGE = spaces.Box(0, 255, (16, 18, 3), np.uint8)
"""Channels last, as environments give them."""

DICT = spaces.Dict(camera=IMAGE, speed=spaces.Box(-1.0, 1.0, (2,), np.float32), gear=spaces.Discrete(3))

OBSERVATIONS: dict[str, spaces.Space] = {"MlpPolicy": BOX, "CnnPolicy": IMAGE, "MultiInputPolicy": DICT}
POLICIES = list(OBSERVATIONS)

HEADS: dict[str, Any] = dict(net_arch=[8], projection_dim=8, action_embedding_dim=4)
IMAGE_SIZES: dict[str, Any] = dict(**HEADS, channels=4, n_downsamples=2, head_channels=2)
STATE_SIZES: dict[str, Any] = dict(**HEADS, state_dim=8, n_blocks=1)

SMALLEST: dict[str, Any] = dict(
    batch_size=8,
    learning_starts=10,
    unroll_steps=2,
    td_steps=3,
    td_steps_min=2,
    n_simulations=2,
    n_sampled_actions=2,
    acting_update_interval=4,
    target_update_interval=8,
    buffer_size=1000,
    device="cpu",
    seed=0,
)

DISCRETE = spaces.Discrete(3)
CONTINUOUS = spaces.Box(-2.0, 2.0, (2,), np.float32)


def monitored(observations: spaces.Space = BOX, actions: spaces.Space = DISCRETE, length: int = 5) -> Monitor:
    """:return: an environment whose episodes have this length"""
    return Monitor(SpacesEnv(observations, actions, length))


def vec_env(
    n_envs: int = 1, observations: spaces.Space = BOX, actions: spaces.Space = DISCRETE, length: int = 5, seed: int = 0
) -> VecEnv:
    """:return: environments whose episodes have this length"""
    env = DummyVecEnv([partial(monitored, observations, actions, length) for _ in range(n_envs)])
    env.seed(seed)
    return env


def agent(policy: Any = "MlpPolicy", env: Any = None, **settings: Any) -> EZV2:
    """
    :param policy: name or class
    :param env: None: one environment of the observations that the policy is for
    :param settings: other than :data:`SMALLEST`; ``policy_kwargs`` are added to the sizes
    """
    if env is None:
        env = vec_env(observations=OBSERVATIONS[policy])
    sizes = IMAGE_SIZES if policy in ("CnnPolicy", "MultiInputPolicy", CnnPolicy) else STATE_SIZES
    kwargs = {**SMALLEST, **settings}
    kwargs["policy_kwargs"] = {**sizes, **settings.get("policy_kwargs", {})}
    return EZV2(policy, env, **kwargs)


def batch_of(space: spaces.Space, n: int) -> Any:
    """:return: n observations as a ``VecEnv`` gives them"""
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([x[key] for x in samples]) for key in space.spaces}
    return np.stack(samples)
