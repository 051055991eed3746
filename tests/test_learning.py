"""Learning itself: these fail if any part of acting, searching, reanalysing or updating breaks."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ezv2 import EZV2


class Slide(gym.Env):
    """
    Bring a sliding mass to rest at 0. A push changes the speed, so that the best action is often not the one that
    lowers the next step's cost: it takes a model, or values, of several steps.

    :param continuous: pushes in [-1, 1], otherwise left, none, right
    """

    def __init__(self, continuous: bool):
        self.continuous = continuous
        self.observation_space = spaces.Box(-10.0, 10.0, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32) if continuous else spaces.Discrete(3)

    def _observe(self) -> np.ndarray:
        return np.array([self.x, self.v], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.x, self.v, self.steps = self.np_random.uniform(-2, 2), 0.0, 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        push = float(np.asarray(action).reshape(-1)[0]) if self.continuous else float(action) - 1
        self.v = float(np.clip(self.v + 0.3 * push, -1, 1))
        self.x = float(np.clip(self.x + self.v, -10, 10))
        self.steps += 1
        return self._observe(), -abs(self.x), False, self.steps == 20, {}


def controller(observation: np.ndarray) -> np.ndarray:
    """A good hand-written policy: proportional-derivative. :param observation: [B, 2] :return: [B] pushes"""
    return np.clip(-1.0 * observation[:, 0] - 2.0 * observation[:, 1], -1, 1)


class _Controller:
    def __init__(self, continuous: bool):
        self.continuous = continuous

    def predict(self, observation: np.ndarray, *args: Any, **kwargs: Any) -> tuple[np.ndarray, None]:
        push = controller(observation)
        return (push[:, None] if self.continuous else np.round(push).astype(int) + 1), None


class _Nothing(_Controller):
    def predict(self, observation: np.ndarray, *args: Any, **kwargs: Any) -> tuple[np.ndarray, None]:
        return (np.zeros((len(observation), 1)) if self.continuous else np.ones(len(observation), int)), None


def score(policy: Any, continuous: bool) -> float:
    env = make_vec_env(lambda: Slide(continuous), n_envs=20, seed=7)
    mean, _ = evaluate_policy(policy, env, n_eval_episodes=20, deterministic=True, warn=False)
    assert isinstance(mean, float)
    return mean


@pytest.mark.parametrize("continuous", [False, True], ids=["Discrete", "Box"])
@pytest.mark.parametrize("settings", [{}, dict(value_target="search"), dict(reanalyze_cache=False)], ids=str)
def test_learns_to_slide(continuous: bool, settings: dict[str, Any]) -> None:
    model = EZV2(
        "MlpPolicy",
        Slide(continuous),
        seed=0,
        device="cpu",
        learning_starts=200,
        batch_size=32,
        gamma=0.95,
        n_simulations=16,
        n_sampled_actions=8,
        learning_rate=1e-3,
        acting_update_interval=50,
        target_update_interval=100,
        policy_kwargs=dict(net_arch=[64], state_dim=32, n_blocks=1, action_embedding_dim=16, projection_dim=32),
        **settings,
    )
    nothing, good = score(_Nothing(continuous), continuous), score(_Controller(continuous), continuous)
    before = score(model, continuous)
    model.learn(900)
    learned = score(model, continuous)
    # four fifths of the way from doing nothing to the controller, which an untrained agent is far from
    bar = nothing + 0.8 * (good - nothing)
    assert before < bar < learned, f"nothing {nothing:.1f}, before {before:.1f}, learned {learned:.1f}, controller {good:.1f}"
