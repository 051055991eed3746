"""Random actions while learning: how often, for how long, and never into the next episode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from common import BOX, TINY, SpacesEnv
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from sb3_ezv2 import EZV2
from sb3_ezv2.exploration import RandomActions

SPACE = spaces.Box(-1.0, 1.0, (2,), np.float32)


def runs(taken: list[Any]) -> list[int]:
    """:return: how often each action that is not None was taken one after the other"""
    lengths: list[int] = []
    last = None
    for action in taken:
        if action is not None and last is not None and np.array_equal(action, last):
            lengths[-1] += 1
        elif action is not None:
            lengths.append(1)
        last = action
    return lengths


def test_how_long_an_action_is_repeated() -> None:
    """A random action begins where none is repeated; n has a probability proportional to 1 / n**2."""
    chooser, rng = RandomActions(1), np.random.default_rng(0)
    SPACE.seed(0)
    taken = [chooser.choose(0.25, 6, SPACE, rng).get(0) for _ in range(40_000)]
    lengths = np.array(runs(taken))
    weights = 1 / np.arange(1, 7) ** 2
    found = np.bincount(lengths, minlength=7)[1:] / len(lengths)
    np.testing.assert_allclose(found, weights / weights.sum(), atol=0.015)
    free = 40_000 - (lengths - 1).sum()  # steps at which one could begin
    assert len(lengths) / free == pytest.approx(0.25, abs=0.01)


def test_each_environment_has_its_own() -> None:
    chooser, rng = RandomActions(3), np.random.default_rng(0)
    steps = [chooser.choose(0.1, 10, SPACE, rng) for _ in range(3000)]
    shares = [np.mean([env in step for step in steps]) for env in range(3)]
    assert max(shares) - min(shares) < 0.05 and {len(step) for step in steps} == {0, 1, 2, 3}
    assert not any(np.array_equal(step[0], step[1]) for step in steps if 0 in step and 1 in step)


def test_an_episode_ends_it() -> None:
    chooser, rng = RandomActions(2), np.random.default_rng(0)
    chooser.left[:] = 5
    chooser.actions = [np.zeros(2), np.ones(2)]
    chooser.end_episodes(np.array([True, False]))
    chosen = chooser.choose(0.0, 10, SPACE, rng)
    assert list(chosen) == [1] and (chosen[1] == 1).all() and chooser.left.tolist() == [0, 4]


@pytest.mark.parametrize("space", [SPACE, spaces.Discrete(4), spaces.MultiDiscrete([2, 3])], ids=str)
def test_without_repetition_each_step_is_drawn_alone(space: spaces.Space) -> None:
    chooser, rng = RandomActions(2), np.random.default_rng(1)
    space.seed(1)
    found = [chooser.choose(0.5, 1, space, rng) for _ in range(50)]
    again = np.random.default_rng(1)
    space.seed(1)
    for chosen in found:
        envs = np.flatnonzero(again.random(2) < 0.5)
        assert list(chosen) == envs.tolist() and all(np.array_equal(chosen[int(env)], space.sample()) for env in envs)


STEPS = 2020


class Taken(gym.Wrapper[Any, Any, Any, Any]):
    """Remembers the actions of each episode."""

    def __init__(self, env: gym.Env[Any, Any]):
        super().__init__(env)
        self.episodes: list[list[np.ndarray]] = []

    def reset(self, **kwargs: Any) -> Any:
        self.episodes.append([])
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        self.episodes[-1].append(np.array(action))
        return super().step(action)


@pytest.mark.parametrize("action_space", [spaces.Discrete(10_000, start=5), spaces.Box(-1.0, 3.0, (2,), np.float32)], ids=str)
def test_an_agent_repeats_them_within_an_episode(action_space: spaces.Space) -> None:
    env = Taken(SpacesEnv(BOX, action_space, length=40))
    settings = {**TINY, "learning_starts": 20, "gradient_steps": 0}
    model = EZV2("MlpPolicy", env, seed=0, exploration_eps=0.2, exploration_repeat=10, **settings)
    model.learn(STEPS)
    lengths = [length for episode in env.episodes for length in runs(list(episode))]
    assert lengths.count(2) > lengths.count(4) > 0 and max(lengths) > 5
    # what is stored is what was done
    buffer = model.replay_buffer
    assert buffer is not None
    stored = buffer.actions[np.flatnonzero(buffer.kinds[: int(buffer.written[0])] == 0)].reshape(STEPS, -1)
    done = np.stack([action for episode in env.episodes for action in episode]).reshape(STEPS, -1)
    done = done - 5 if isinstance(action_space, spaces.Discrete) else (done + 1) / 2 - 1
    np.testing.assert_allclose(stored, done, atol=1e-6)
    # none was carried over the end of an episode
    borders = list(zip(env.episodes[1:], env.episodes))
    assert len(borders) >= 20 and not any(len(new) and np.array_equal(new[0], old[-1]) for new, old in borders[1:])


def test_loaded_with_more_environments(tmp_path: Path) -> None:
    settings = {**TINY, "learning_starts": 5, "gradient_steps": 0}
    model = EZV2("MlpPolicy", "Pendulum-v1", seed=0, exploration_eps=0.9, exploration_repeat=30, **settings)
    model.learn(40).save(tmp_path / "agent")
    model = EZV2.load(tmp_path / "agent", env=make_vec_env("Pendulum-v1", 3, seed=0))
    model.learn(60)
    assert model._random_actions is not None and model._random_actions.left.shape == (3,)
