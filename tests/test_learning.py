"""Learning itself: these fail if any part of acting, searching, reanalysing or updating breaks."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from common import SMALL
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ezv2 import EZV2


class Reach(gym.Env):
    """
    Go to 0 and stay: a reward of 1 near 0, none elsewhere, and the start is 3 to 7 steps away. The next reward says
    nothing about most actions, so that it takes values of later states.

    :param continuous: moves in [-1, 1], otherwise left, none, right
    """

    def __init__(self, continuous: bool):
        self.continuous = continuous
        self.observation_space = spaces.Box(-4.0, 4.0, (1,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32) if continuous else spaces.Discrete(3)

    def _observe(self) -> np.ndarray:
        return np.array([self.x], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.x, self.steps = self.np_random.uniform(1, 2) * self.np_random.choice([-1, 1]), 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        move = float(np.asarray(action).reshape(-1)[0]) if self.continuous else float(action) - 1
        self.x = float(np.clip(self.x + 0.3 * move, -4, 4))
        self.steps += 1
        return self._observe(), float(abs(self.x) < 0.3), False, self.steps == 20, {}


def controller(observation: np.ndarray) -> np.ndarray:
    """The best policy, nearly. :param observation: [B, 1] :return: [B] moves"""
    return np.clip(-observation[:, 0] / 0.3, -1, 1)


class _Controller:
    def __init__(self, continuous: bool):
        self.continuous = continuous

    def predict(self, observation: np.ndarray, *args: Any, **kwargs: Any) -> tuple[np.ndarray, None]:
        push = controller(observation)
        return (push[:, None] if self.continuous else np.round(push).astype(int) + 1), None


def score(policy: Any, continuous: bool) -> float:
    env = make_vec_env(lambda: Reach(continuous), n_envs=20, seed=7)
    mean, _ = evaluate_policy(policy, env, n_eval_episodes=20, deterministic=True, warn=False)
    assert isinstance(mean, float)
    return mean


# Search-based values alone grow by little per refresh of the target network, so that they need more of them.
SEARCH = dict(value_target="search", target_update_interval=10)


@pytest.mark.parametrize(
    "continuous, steps, bar, settings",
    [
        (False, 1200, 0.9, {}),
        (True, 1200, 0.9, {}),
        (True, 1200, 0.9, dict(reanalyze_cache=False)),
        (False, 1500, 0.5, SEARCH),
        (True, 1500, 0.5, SEARCH),
    ],
    ids=["Discrete", "Box", "Box without cache", "Discrete, search-based values", "Box, search-based values"],
)
def test_learns_to_reach(continuous: bool, steps: int, bar: float, settings: dict[str, Any]) -> None:
    model = EZV2("MlpPolicy", Reach(continuous), seed=0, gamma=0.95, **{**SMALL, **settings})
    best = score(_Controller(continuous), continuous)
    before = score(model, continuous)
    model.learn(steps)
    learned = score(model, continuous)
    assert before < 0.3 * best and learned > bar * best, f"before {before:.1f}, learned {learned:.1f}, best {best:.1f}"
