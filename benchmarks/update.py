"""
How long an update takes, split into its parts::

    python -m benchmarks.update --threads 2 --out benchmarks/results/update.csv

The paper's state model (Walker Run: 24 observations, 6 action dimensions; batch 256, unroll 5, K = 16, 32 simulations) by
default, with the cache off, as in the paper, and on. Medians over the updates of one run. Images::

    python -m benchmarks.update --images --out benchmarks/results/update-images.csv

are four stacked frames of 96x96x3 in 8 environments, with the paper's Atari networks and 16 simulations, or with ``--small``
those that a CPU can train; the row has the steps collected and the updates made per second, and the peak of the memory.
"""

from __future__ import annotations

import argparse
import csv
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack

import sb3_ezv2.ezv2 as algorithm
from benchmarks.provenance import commit, machine
from benchmarks.settings import SMALL, SMALL_IMAGES
from sb3_ezv2 import EZV2

PAPER: dict[str, Any] = {
    "batch_size": 256,
    "td_steps": 5,
    "tau": 1.0,
    "mixed_value_start": 40_000,
    "fresh_transitions": 20_000,
    "target_update_interval": 400,
    "policy_kwargs": {"value_support": (299.0, 51, "h"), "reward_support": (2.0, 51, "h"), "reward_scale": 1.0},
}
"""What differs between the defaults and the paper's update (EfficientZero V2 Table 3, App. G)."""


PAPER_IMAGES: dict[str, Any] = {
    "batch_size": 256,
    "n_simulations": 16,
    "n_sampled_actions": 8,
    "td_steps": 5,
    "tau": 1.0,
    "policy_kwargs": {
        "value_prefix": True,
        "value_support": (58705.58, 601, "h"),
        "reward_support": (58705.58, 601, "h"),
        "reward_scale": 1.0,
    },
}
"""The same for Atari (EfficientZero App. A.1)."""

IMAGE_ENVS = 8


class NoisyFrames(gym.Env):
    """Random frames in the shape of the paper's Atari."""

    observation_space = spaces.Box(0, 255, (96, 96, 3), np.uint8)
    action_space = spaces.Discrete(18)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self._frame(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._frame(), float(self.np_random.random() < 0.1), self.steps == 500, False, {}

    def _frame(self) -> np.ndarray:
        return self.np_random.integers(256, size=(96, 96, 3), dtype=np.uint8)


class Noise(gym.Env):
    """Random observations and rewards in the shapes of the control suite's Walker: only the time matters here."""

    observation_space = spaces.Box(-np.inf, np.inf, (24,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (6,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.standard_normal(24, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        reward = float(self.np_random.random())
        return self.np_random.standard_normal(24, dtype=np.float32), reward, False, self.steps == 500, {}


def timed(owner: Any, name: str, times: dict[str, list[float]]) -> None:
    """Replace ``owner.name`` by itself with a clock. :param times: gets milliseconds per call under that name"""
    function: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        times.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
        return result

    setattr(owner, name, wrapper)


def measure(
    settings: dict[str, Any], cache: bool, updates: int, images: bool = False, device: str = "cpu"
) -> dict[str, float]:
    """
    :param settings: of EZV2
    :param cache: its ``reanalyze_cache``
    :param updates: how many to time
    :param images: four stacked frames in 8 environments instead of one with vectors
    :param device: where the networks are
    :return: medians in milliseconds; ``rest`` is what no other part accounts for. Images: also what is made per second of
        acting and of updating, and how much memory the device, or else the process, took at most beyond that before
    """
    warm, first = (1, 400) if images else (3, 2000)
    env: VecEnv | gym.Env = VecFrameStack(DummyVecEnv([NoisyFrames] * IMAGE_ENVS), 4) if images else Noise()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = EZV2(
        "CnnPolicy" if images else "MlpPolicy",
        env,
        seed=0,
        learning_starts=first,
        buffer_size=100_000 if not images else 2_000,
        reanalyze_cache=cache,
        device=device,
        **settings,
    )
    model.learn(first + warm * model.n_envs)
    assert model.replay_buffer is not None and model._reanalyzer is not None
    times: dict[str, list[float]] = {}
    compute_losses = algorithm.compute_losses
    timed(model.replay_buffer, "sample", times)
    timed(model._reanalyzer, "targets", times)
    timed(algorithm, "compute_losses", times)
    timed(th.Tensor, "backward", times)
    timed(model.policy.optimizer, "step", times)
    timed(model, "_sample_action", times)
    timed(model, "_update", times)
    try:
        model.learn(updates * model.n_envs, reset_num_timesteps=False)
    finally:
        algorithm.compute_losses = compute_losses
    median = {name: statistics.median(values) for name, values in times.items()}
    parts = {
        "sample_ms": median["sample"],
        "search_and_targets_ms": median["targets"],
        "forward_ms": median["compute_losses"],
        "backward_ms": median["backward"],
        "optimizer_ms": median["step"],
    }
    rest = median["_update"] - sum(parts.values())
    result = {**parts, "rest_ms": rest, "update_ms": median["_update"], "acting_ms": median["_sample_action"]}
    if images:
        result["steps_per_second_of_acting"] = 1e3 * model.n_envs / result["acting_ms"]
        result["updates_per_second"] = 1e3 / result["update_ms"]
        if model.device.type == "cuda":
            result["peak_memory_gb"] = th.cuda.max_memory_allocated() / 1e9
        else:
            result["peak_memory_gb"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e9
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=th.get_num_threads())
    parser.add_argument("--updates", type=int, default=20, help="updates to time")
    parser.add_argument("--small", action="store_true", help="the small networks of the learning benchmarks instead")
    parser.add_argument("--images", action="store_true", help="Atari's observations and networks instead of vectors")
    parser.add_argument("--device", default="cpu", help="where the networks are (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    rows = []
    paper, small = (PAPER_IMAGES, SMALL_IMAGES) if options.images else (PAPER, SMALL)
    for cache in (False, True):
        row = {
            "model": ("small" if options.small else "paper") + (" images" if options.images else ""),
            "threads": options.threads,
            "cache": cache,
            **{
                name: round(value, 2)
                for name, value in measure(
                    small if options.small else paper, cache, options.updates, options.images, options.device
                ).items()
            },
            "updates": options.updates,
            "machine": machine(),
            "commit": commit(),
        }
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows.append(row)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        new = not options.out.exists()
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
