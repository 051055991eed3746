"""The benchmarks' image environments, and the memory they count. What needs ale-py or OpenGL skips where it is missing."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_checker import check_env

from benchmarks import learn
from benchmarks.catch import CatchPixels, play
from benchmarks.image_memory import Counter
from sb3_ezv2 import EZV2


def test_catch() -> None:
    env = CatchPixels()
    check_env(env)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (40, 40, 1)
    # 4x4 pixels of the ball and as many of the paddle, and a border that stays black
    assert (obs == 255).sum() == 32 and (obs[4:-4, 4:-4] == 255).sum() == 32
    assert (play(perfect=True, episodes=20) == 5).all()
    assert play(perfect=False, episodes=200).mean() == pytest.approx(-3.8, abs=0.4)


def test_catch_is_trained_and_measured(tmp_path: Path) -> None:
    sizes = "policy_kwargs:dict(channels=4,n_downsamples=3,head_channels=2,projection_dim=4,net_arch=[8])"
    command = ["--env", "benchmarks.catch:CatchPixels-v0", "--policy", "CnnPolicy", "--steps", "24", "--eval-every", "12"]
    command += ["--episodes", "2", "--threads", "1", "--out", str(tmp_path), "--params", "batch_size:4", "learning_starts:12"]
    assert learn.main([*command, "n_simulations:2", sizes]) == 0
    with next(tmp_path.glob("*.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["12", "24"] and "CnnPolicy" in rows[0]["settings"]


def test_counted_memory() -> None:
    with Counter() as counter:
        x = th.zeros(1000)
        y = x.view(10, 100) + 1  # a view has no storage of its own
        assert counter.live == counter.peak == 8000
        del x
        assert counter.live == 4000
        th.zeros(2000)
    assert y.shape == (10, 100) and counter.live == 4000 and counter.peak == 12000


def test_an_atari_update_fits_into_2_gb() -> None:
    # In a process of its own: where torch.compile was at work before, 2.3 GB are counted
    code = "import json; from benchmarks.image_memory import count; print(json.dumps([count(256), count(64)]))"
    command, root = [sys.executable, "-c", code], Path(__file__).parent.parent
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    peaks, quarter = json.loads(printed)
    assert 1.5 < peaks["the largest"] < 2
    assert peaks["the largest"] == max(peaks.values())
    # what is there anyway (four models, the momentum) is small
    assert quarter["the largest"] < peaks["the largest"] / 2.5


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "BreakoutNoFrameskip-v4"])
def test_atari(env_id: str) -> None:
    """Four frames per step, no sticky actions; a lost life ends an episode but not the game; whole games are counted."""
    pytest.importorskip("ale_py", reason="Atari needs ale-py: pip install 'sb3-ezv2[atari]'")
    pytest.importorskip("cv2", reason="Atari needs opencv: pip install 'sb3-ezv2[atari]'")
    from benchmarks.atari import make_atari, make_atari_vec

    env = make_atari(env_id)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (96, 96, 3) and obs.dtype == np.uint8 and env.observation_space.shape == obs.shape
    ale = env.unwrapped.ale  # type: ignore[attr-defined]
    assert ale.getFloat("repeat_action_probability") == 0
    frames = ale.getEpisodeFrameNumber()
    env.step(0)
    assert ale.getEpisodeFrameNumber() == frames + 4
    rng = np.random.default_rng(0)
    evaluation = make_atari(env_id, training=False)
    evaluation.reset(seed=0)
    over = False
    while not over:
        _, _, over, _, info = evaluation.step(int(rng.integers(4)))
        assert over == (info["lives"] == 0)
    episodes, rewards = 0, set()
    games: list[Any] = []
    while not games:
        _, reward, terminated, truncated, info = env.step(int(rng.integers(4)))
        rewards.add(float(reward))
        if terminated or truncated:
            episodes += 1
            games += [info["episode"]] if "episode" in info else []
            env.reset()
    assert episodes == 5 and rewards <= {0.0, 1.0}  # Breakout has five lives
    assert games[0]["l"] > 100

    vec = make_atari_vec(env_id, 2)
    sizes = dict(channels=4, head_channels=2, projection_dim=4, net_arch=[8])
    model = EZV2("CnnPolicy", vec, learning_starts=8, batch_size=4, n_simulations=2, buffer_size=500, policy_kwargs=sizes)
    model.learn(12)
    assert model.replay_buffer is not None and model.replay_buffer.frame_stack == 4
    assert model.replay_buffer.store.arrays[None].shape[1:] == (3, 96, 96)


PIXELS = """
import gymnasium as gym, numpy as np, shimmy
from gymnasium.wrappers import AddRenderObservation, RepeatAction, ResizeObservation
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack
from sb3_ezv2 import EZV2

def build():
    env = gym.make("dm_control/cartpole-swingup-v0", render_mode="rgb_array", render_kwargs=dict(camera_id=0))
    return ResizeObservation(RepeatAction(AddRenderObservation(env, render_only=True), 2), (64, 64))

env = VecFrameStack(DummyVecEnv([build]), 4)
sizes = dict(channels=4, n_downsamples=3, head_channels=2, projection_dim=4, net_arch=[8])
model = EZV2("CnnPolicy", env, learning_starts=8, batch_size=4, n_simulations=2, n_sampled_actions=2, policy_kwargs=sizes)
model.learn(12)
assert model.replay_buffer.store.arrays[None].shape[1:] == (3, 64, 64)
assert model.replay_buffer.store.arrays[None][:9].std() > 0
print("learned from pixels")
"""


def test_control_suite_from_pixels() -> None:
    """In a process of its own: the library that renders is chosen when dm_control is first imported."""
    pytest.importorskip("shimmy", reason="the control suite needs shimmy: pip install 'sb3-ezv2[dmc]'")
    pytest.importorskip("dm_control", reason="the control suite needs dm_control: pip install 'sb3-ezv2[dmc]'")
    pytest.importorskip("cv2", reason="resizing needs opencv: pip install 'sb3-ezv2[atari]'")
    for library in ("egl", "osmesa"):
        probe = "from dm_control import _render; _render.Renderer(64, 64)"
        settings = {**os.environ, "MUJOCO_GL": library}
        if subprocess.run([sys.executable, "-c", probe], env=settings, capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("no OpenGL library: install EGL (a GPU's driver) or OSMesa (apt-get install libosmesa6)")
    done = subprocess.run([sys.executable, "-c", PIXELS], env=settings, capture_output=True, text=True)
    assert "learned from pixels" in done.stdout, done.stderr[-2000:]
