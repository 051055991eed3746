"""States of environments, taken out in the middle of an episode and put into new ones."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from resume_tools import Pictures, Stubborn
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_ezv2.env_states import restore_env_states, save_env_states
from sb3_ezv2.wrappers import Resumable


def play(env: VecEnv, actions: list[np.ndarray]) -> list[Any]:
    """:return: what the environments give for these actions, of each step"""
    seen = []
    for action in actions:
        observations, rewards, dones, infos = env.step(action)
        ends = [info.get("terminal_observation") for info in infos]
        episodes = [(info["episode"]["r"], info["episode"]["l"]) for info in infos if "episode" in info]
        seen.append((observations, rewards, dones, ends, episodes))
    return seen


def check(make_env: Any, steps: int = 57, problems: str = "") -> None:
    """Environments that were put into the state of others give what the others give."""
    env, other = make_env(), make_env()
    rng = np.random.default_rng(0)
    env.action_space.seed(0)
    actions = [np.stack([env.action_space.sample() for _ in range(env.num_envs)]) for _ in range(2 * steps)]
    env.seed(int(rng.integers(1000)))
    env.reset()
    play(env, actions[:steps])
    model: Any = SimpleNamespace(action_space=env.action_space)
    saved = save_env_states(env, model)
    expected = play(env, actions[steps:])
    other.reset()
    reason = restore_env_states(other, model, saved["states"])
    if problems:
        assert reason == "it could not be saved" and all(problems in problem for problem in saved["problems"])
    else:
        assert reason is None and not saved["problems"]
        np.testing.assert_equal(play(other, actions[steps:]), expected)
    env.close()
    other.close()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "MountainCarContinuous-v0", "Acrobot-v1", "Taxi-v4"])
def test_gymnasium(env_id: str) -> None:
    if env_id not in gym.registry:
        pytest.skip("not in this version of Gymnasium")
    check(lambda: make_vec_env(env_id, 2))


def test_wrappers_of_vectorized_environments() -> None:
    check(lambda: VecFrameStack(VecNormalize(VecMonitor(DummyVecEnv([partial(gym.make, "Pendulum-v1")] * 2))), 3))
    check(lambda: VecFrameStack(make_vec_env(Pictures, 2), 4))


def test_processes() -> None:
    check(lambda: VecNormalize(make_vec_env("CartPole-v1", 2, vec_env_cls=SubprocVecEnv)))
    check(lambda: make_vec_env(Stubborn, 2, vec_env_cls=SubprocVecEnv, wrapper_class=Resumable))
    check(lambda: make_vec_env(Stubborn, 2, vec_env_cls=SubprocVecEnv), problems="open file")
    check(lambda: SubprocVecEnv([Stubborn] * 2), problems="without a gymnasium.Wrapper")


def test_what_cannot_be_pickled() -> None:
    check(lambda: make_vec_env(Stubborn, 2), problems="resume_tools.Stubborn: an attribute is or holds an open file")
    check(lambda: make_vec_env(Stubborn, 2, wrapper_class=Resumable))

    class Two(gym.Wrapper):
        """Holds a second environment, which would come back at its start."""

        def __init__(self, env: gym.Env):
            super().__init__(env)
            self.others = [gym.make("CartPole-v1")]

    check(lambda: make_vec_env("CartPole-v1", 2, wrapper_class=Two), problems="another environment")


def test_atari() -> None:
    pytest.importorskip("ale_py")
    check(lambda: VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", 2), 4), steps=40)
    check(lambda: make_vec_env("ALE/Pong-v5", 1, env_kwargs=dict(frameskip=4)), steps=20)  # with sticky actions


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Humanoid-v5"])
def test_mujoco(env_id: str) -> None:
    pytest.importorskip("mujoco")
    check(lambda: make_vec_env(env_id, 2), steps=30)


def test_control_suite() -> None:
    pytest.importorskip("shimmy")
    pytest.importorskip("dm_control")

    def flat(**kwargs: Any) -> VecEnv:
        def one() -> gym.Env:
            return gym.wrappers.FlattenObservation(gym.make("dm_control/cartpole-swingup-v0"))

        return make_vec_env(one, 2, **kwargs)

    check(lambda: flat(wrapper_class=Resumable), steps=30)
    check(lambda: flat(), steps=30, problems="DmControl")
