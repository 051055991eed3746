"""Observation spaces and Stable-Baselines3's wrappers of vectorized environments."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from common import BOX, FaultyEnv, SpacesEnv
from gymnasium import spaces
from sb3_agents import CONTINUOUS, DICT, DISCRETE, IMAGE, OBSERVATIONS, POLICIES, agent, batch_of, monitored, vec_env
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
    is_vecenv_wrapped,
)

from sb3_ezv2 import EZV2

GREY = spaces.Box(0, 255, (16, 16, 1), np.uint8)

SPACES = [
    BOX,
    spaces.Box(-10.0, 10.0, (2, 3), np.float64),
    spaces.Box(-np.inf, np.inf, (2,), np.float32),
    spaces.Box(0, 9, (2,), np.int64),
    spaces.Box(0, 1, (3,), np.uint8),
    spaces.Discrete(5),
    spaces.MultiBinary(4),
    spaces.MultiBinary([2, 3]),
    spaces.MultiDiscrete([3, 2, 4]),
    GREY,
    spaces.Box(0, 255, (3, 16, 18), np.uint8),
    DICT,
    spaces.Dict(a=GREY, b=spaces.MultiBinary(3), c=spaces.MultiDiscrete([2, 3]), d=IMAGE),
]


def policy_for(space: spaces.Space) -> str:
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if space.shape is not None and len(space.shape) == 3 else "MlpPolicy"


@pytest.mark.parametrize("vec_env_cls", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize("policy", POLICIES)
def test_several_environments_in_one_process_or_many(policy: str, vec_env_cls: Any) -> None:
    """They are the same environments, so the agent is the same wherever they run."""
    runs = []
    for cls in {DummyVecEnv, vec_env_cls}:
        env = cls([partial(monitored, OBSERVATIONS[policy], DISCRETE, length) for length in (3, 5)])
        env.seed(3)
        model = agent(policy, env, gradient_steps=-1, seed=None)
        model.set_random_seed(3)
        model.learn(16)
        assert model.num_timesteps == 16 and model._n_updates == 6 and model.replay_buffer is not None
        runs.append(model.replay_buffer.rewards.copy())
        assert model._episode_num == 2 + 1
        env.close()
    np.testing.assert_array_equal(runs[0], runs[-1])


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_observation_spaces(space: spaces.Space, n_envs: int) -> None:
    check_env(SpacesEnv(space, DISCRETE), warn=False)
    model = agent(policy_for(space), vec_env(n_envs, space), gradient_steps=-1).learn(15)
    assert model.num_timesteps == 15 and model._n_updates == (5 if n_envs == 1 else 6)
    env = model.get_env()
    assert env is not None
    _, lengths = evaluate_policy(model, env, n_eval_episodes=2, return_episode_rewards=True)
    assert lengths == [5, 5]


@pytest.mark.parametrize("policy", ["MlpPolicy", "MultiInputPolicy"])
def test_normalized_observations_and_rewards(tmp_path: Path, policy: str) -> None:
    """What is stored is what the environment gave; what is learned from is normalized, with the statistics of now."""
    space = OBSERVATIONS[policy]
    keys = ["speed"] if policy == "MultiInputPolicy" else None

    def environments() -> VecEnv:
        env = vec_env(2, space, CONTINUOUS)
        return env if keys is None else VecTransposeImage(env)

    env = VecNormalize(environments(), norm_obs_keys=keys, gamma=0.5)
    model = agent(policy, env, gradient_steps=-1).learn(20)
    buffer = model.replay_buffer
    assert model.get_vec_normalize_env() is env and buffer is not None
    raw, batch = buffer.sequences(np.arange(4)), buffer.sequences(np.arange(4), env=env)
    scaled = env.normalize_reward(raw.rewards.numpy())
    np.testing.assert_allclose(batch.rewards.numpy(), np.where(batch.reward_mask.numpy(), scaled, 0), rtol=1e-5)
    assert not np.allclose(raw.rewards, batch.rewards)
    normalized: list[str | None] = [None] if keys is None else [*keys]
    for key in normalized:
        one, other = (x.observations if key is None else x.observations[key] for x in (raw, batch))
        assert not np.allclose(one, other)
        stored = buffer.store.arrays[key][:4]
        np.testing.assert_array_equal(one[:, 0], stored.reshape(one[:, 0].shape))
    # the agent and the statistics, saved and loaded, evaluate without touching either
    model.save(tmp_path / "agent")
    env.save(str(tmp_path / "statistics.pkl"))
    model.save_replay_buffer(tmp_path / "replay")
    other_env = VecNormalize.load(str(tmp_path / "statistics.pkl"), environments())
    loaded = EZV2.load(tmp_path / "agent", env=other_env, device="cpu")
    loaded.load_replay_buffer(tmp_path / "replay")
    obs = batch_of(env.observation_space, 3)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    other_env.training = other_env.norm_reward = False
    count = other_env.ret_rms.count
    evaluate_policy(loaded, other_env, n_eval_episodes=2)
    assert other_env.ret_rms.count == count
    other_env.training = other_env.norm_reward = True
    loaded.learn(6, reset_num_timesteps=False)
    assert loaded.num_timesteps == 26
    # a new environment brings its own statistics
    third = VecNormalize(environments(), norm_obs_keys=keys)
    loaded.set_env(third)
    assert loaded.get_vec_normalize_env() is third
    loaded.set_env(vec_env(2, space, CONTINUOUS))
    assert loaded.get_vec_normalize_env() is None


def test_vec_monitor_counts_episodes(tmp_path: Path) -> None:
    env = VecMonitor(DummyVecEnv([partial(SpacesEnv, BOX, DISCRETE, 4)] * 2), str(tmp_path / "log"))
    model = agent(env=env).learn(24)
    assert model.ep_info_buffer is not None and [x["l"] for x in model.ep_info_buffer] == 6 * [4]
    assert len((tmp_path / "log.monitor.csv").read_text().splitlines()) == 2 + 6


@pytest.mark.parametrize("space", [BOX, spaces.Box(0.0, 1.0, (2, 3), np.float32)], ids=str)
def test_stacked_vectors(space: spaces.Space) -> None:
    env = VecFrameStack(vec_env(2, space), 3)
    model = agent(env=env, gradient_steps=-1).learn(16)
    assert space.shape is not None and model.observation_space.shape == (*space.shape[:-1], 3 * space.shape[-1])
    assert model.replay_buffer is not None and model.replay_buffer.frame_stack == 1
    evaluate_policy(model, env, n_eval_episodes=2)


@pytest.mark.parametrize("space", [IMAGE, spaces.Dict(camera=IMAGE, speed=BOX)], ids=["image", "dict"])
def test_stacked_and_transposed_images(space: spaces.Space) -> None:
    """Stacked before or after the channels come first, by hand or by the agent: the same images, each frame stored once."""
    runs = []
    for transpose_first in (False, True):
        env: Any = vec_env(2, space)
        env = VecFrameStack(VecTransposeImage(env) if transpose_first else env, 2)
        model = agent(policy_for(space), env, gradient_steps=-1).learn(16)
        assert model.replay_buffer is not None and model.replay_buffer.frame_stack == 2
        stacked = model.observation_space
        image = stacked.spaces["camera"] if isinstance(stacked, spaces.Dict) else stacked
        assert image.shape == (6, 16, 18)
        assert is_vecenv_wrapped(model.get_env(), VecTransposeImage)  # type: ignore[arg-type]
        runs.append(model.replay_buffer.rewards.copy())
        evaluate_policy(model, model.get_env(), n_eval_episodes=2)  # type: ignore[arg-type]
    np.testing.assert_array_equal(runs[0], runs[1])


@pytest.mark.parametrize(
    "wrap, space",
    [
        (lambda env: VecTransposeImage(VecNormalize(env, norm_obs=False)), IMAGE),
        (lambda env: VecNormalize(env, norm_obs=False), IMAGE),  # the agent transposes the images
        (lambda env: VecNormalize(env, norm_obs_keys=["speed"]), DICT),
        (lambda env: VecFrameStack(VecNormalize(env), 2), BOX),
    ],
    ids=["transposed", "by the agent", "dict", "stacked"],
)
def test_normalized_below_a_wrapper_that_changes_observations(wrap: Any, space: spaces.Space) -> None:
    """The observations that are stored would not be those that the agent sees."""
    with pytest.raises(ValueError, match=r"VecNormalize must be outside of .*VecNormalize\(VecTransposeImage\(env\)"):
        agent(policy_for(space), wrap(vec_env(observations=space)))
    if space is IMAGE:
        model = agent("CnnPolicy", VecNormalize(VecTransposeImage(vec_env(observations=space)), norm_obs=False)).learn(12)
        model.set_env(wrap(vec_env(observations=space)))
        with pytest.raises(ValueError, match="VecNormalize must be outside"):
            model.learn(12)


def test_vec_check_nan_speaks_first() -> None:
    env = VecCheckNan(DummyVecEnv([lambda: FaultyEnv("reward", 7)]), raise_exception=True)
    with pytest.raises(ValueError, match=r"found nan in rewards"):
        agent(env=env).learn(20)
    sound = VecCheckNan(vec_env(2, actions=CONTINUOUS), raise_exception=True)
    assert agent(env=sound).learn(14).num_timesteps == 14


def test_a_video_is_recorded(tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")

    def cart_pole() -> gym.Env:
        return gym.make("CartPole-v1", render_mode="rgb_array")

    env = VecVideoRecorder(
        DummyVecEnv([cart_pole]),
        str(tmp_path),
        record_video_trigger=lambda step: step == 4,
        video_length=4,
        name_prefix="ezv2",
    )
    model = agent(env=env).learn(12)
    assert model.num_timesteps == 12
    evaluate_policy(model, DummyVecEnv([cart_pole]), n_eval_episodes=1, warn=False)
    env.close()
    videos = list(tmp_path.glob("ezv2*.mp4"))
    assert len(videos) == 1 and videos[0].stat().st_size > 0


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_environments_by_name(env_id: str) -> None:
    model = agent(env=env_id).learn(14)
    env = model.get_env()
    assert env is not None and env.num_envs == 1 and env.get_attr("spec")[0].id == env_id
    with pytest.raises(gym.error.Error):
        agent(env="NoSuchTask-v0")
