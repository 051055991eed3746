"""
Atari as the paper plays it: colour, 96x96, every action for four frames, no-op starts, no sticky actions, four frames stacked.

    python -m benchmarks.atari --env ALE/Pong-v5 --minutes 10 --out benchmarks/results/atari-pong.csv

trains for a bounded time with small networks and batches and writes the losses: on a CPU far too little to play, enough to see
whether the model learns.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch as th
from gymnasium.wrappers import AtariPreprocessing
from stable_baselines3.common.atari_wrappers import ClipRewardEnv, EpisodicLifeEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from benchmarks.provenance import commit, machine
from benchmarks.settings import SMALL_IMAGES
from sb3_ezv2 import EZV2

COLUMNS = ("train/reward_loss", "train/value_loss", "train/policy_loss", "train/consistency_loss", "train/value_error")


def make_atari(env_id: str, training: bool = True) -> gym.Env:
    """
    :param env_id: ``ALE/Pong-v5``, ``PongNoFrameskip-v4`` or the like
    :param training: a lost life ends an episode (without a reset of the game), and rewards are clipped to their signs
    :return: observations uint8 [96, 96, 3]; the ``Monitor`` inside sees whole games and raw scores
    :raises ImportError: ale-py or opencv is missing
    """
    try:
        import ale_py
        import cv2  # noqa: F401  (AtariPreprocessing resizes with it)
    except ImportError as error:
        raise ImportError(f"{env_id} needs ale-py and opencv: pip install 'sb3-ezv2[atari]' ({error}).") from error
    gym.register_envs(ale_py)
    # The frame skip is AtariPreprocessing's, which takes the maximum of the last two frames; the ids have others of their own
    env = gym.make(env_id, frameskip=1, repeat_action_probability=0.0, max_num_frames_per_episode=108_000)
    # terminal_on_life_loss would reset the whole game at every lost life
    env = AtariPreprocessing(env, noop_max=30, frame_skip=4, screen_size=96, terminal_on_life_loss=False, grayscale_obs=False)
    env = Monitor(env)
    return ClipRewardEnv(EpisodicLifeEnv(env)) if training else env


def make_atari_vec(env_id: str, n_envs: int, training: bool = True, frames: int = 4) -> VecFrameStack:
    """:return: ``n_envs`` games whose observations are stacks of ``frames`` frames; see :func:`make_atari`"""
    return VecFrameStack(DummyVecEnv([lambda: make_atari(env_id, training)] * n_envs), frames)


class _Losses(BaseCallback):
    """Writes the means of the losses since the last row, and stops in time."""

    def __init__(self, path: Path, every: int, seconds: float, constants: dict[str, Any]):
        super().__init__()
        self.path, self.every, self.end, self.constants = path, every, time.monotonic() + seconds, constants
        self.start = time.monotonic()
        self.next_row = every
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(["step", "updates", "seconds", *COLUMNS, *constants])

    def _on_rollout_start(self) -> None:
        updates = self.model._n_updates  # type: ignore[attr-defined]
        if updates < self.next_row:
            return
        self.next_row += self.every
        stats = self.model._stats  # type: ignore[attr-defined]
        means = [round(float(stats[name][0]) / stats[name][1], 5) for name in COLUMNS]
        self.model._stats = {}  # type: ignore[attr-defined]
        row = [self.num_timesteps, updates, round(time.monotonic() - self.start), *means]
        print(", ".join(f"{name} {value}" for name, value in zip(["step", "updates", "seconds", *COLUMNS], row)), flush=True)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([*row, *self.constants.values()])

    def _on_step(self) -> bool:
        return time.monotonic() < self.end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=int, default=20, help="updates between rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    env = make_atari_vec(options.env, 1)
    model = EZV2(
        "CnnPolicy",
        env,
        seed=options.seed,
        device=options.device,
        buffer_size=20_000,
        learning_starts=500,
        gamma=0.997**4,
        verbose=1,
        **SMALL_IMAGES,
    )
    constants = dict(task=options.env, seed=options.seed, settings=SMALL_IMAGES, machine=machine(), commit=commit())
    model.learn(100_000, callback=_Losses(options.out, options.every, 60 * options.minutes, constants), log_interval=10**9)


if __name__ == "__main__":
    main()
