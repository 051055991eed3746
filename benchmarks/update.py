"""
How long an update takes, split into its parts, beside the arithmetic floor::

    python -m benchmarks.update --json
    python -m benchmarks.update --obs state --threads 2 --out benchmarks/results/update/state.jsonl

``state``: the paper's state model (Walker Run: 24 observations, 6 action dimensions; batch 256, unroll 5, K = 16, 32
simulations). ``image``: four stacked frames of 96x96x3 in 8 environments, with the paper's Atari networks and 16
simulations. Both with the search cache off, as in the paper, and on; ``--small`` takes the networks that a CPU can train.
All times are medians in milliseconds over the updates of one run. A printed row has

- ``sample_ms``: the replay buffer's; ``targets_ms``: values at the windows' ends and the cache; ``search_ms``
- ``forward_backward_ms``; ``optimizer_ms``: clipping, the optimizer and the Polyak copy
- ``update_ms``: all of it, with what has no column of its own
- ``floor_ms``: the counted FLOPs of the matrix products and convolutions of an update (searches included) over the rate of
  a large matrix product, measured here in the same run

With the cache on, every stored state has been searched before the clock starts. A row of ``--out`` has more: the forward and
the backward pass, augmentation, priorities and logging, the states searched, acting, steps and updates per second, the peak of
the memory, and where it was measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack
from torch.utils.flop_counter import FlopCounterMode

import sb3_ezv2.ezv2 as algorithm
from benchmarks.provenance import commit, machine
from benchmarks.settings import SMALL, SMALL_IMAGES
from sb3_ezv2 import EZV2
from sb3_ezv2.losses import Targets, compute_losses
from sb3_ezv2.reanalyze import Reanalyzer
from sb3_ezv2.replay_buffer import RUNNING
from sb3_ezv2.search import NATIVE_MAX_ROOTS
from sb3_ezv2.unroll import COMPILE_MODES

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

COLLECTED = {"state": 2_000, "image": 400}
"""Steps of random actions before the first update."""

COLUMNS = (
    "obs", "device", "batch", "cache", "sample_ms", "targets_ms", "search_ms", "forward_backward_ms", "optimizer_ms",
    "update_ms", "floor_ms",
)  # fmt: skip
"""What is printed."""


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


class Clock:
    """
    Medians of what functions take.

    :param device: is waited for at both ends of a call
    """

    def __init__(self, device: th.device):
        self.device = device
        self.times: dict[str, list[float]] = {}
        self._replaced: list[tuple[Any, str, Any]] = []

    def _now(self) -> float:
        if self.device.type == "cuda":
            th.cuda.synchronize(self.device)
        return 1e3 * time.perf_counter()

    def watch(self, owner: Any, name: str) -> None:
        """Replace ``owner.name`` by itself with a clock. :param name: milliseconds per call are kept under it"""
        function: Callable[..., Any] = getattr(owner, name)
        self._replaced.append((owner, name, function))

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            result = function(*args, **kwargs)
            self.times.setdefault(name, []).append(self._now() - start)
            return result

        setattr(owner, name, wrapper)

    def stop(self) -> None:
        """Put everything back."""
        for owner, name, function in reversed(self._replaced):
            setattr(owner, name, function)
        self._replaced = []

    def median(self, name: str) -> float:
        """:return: of the calls; 0 if there were none"""
        return statistics.median(self.times.get(name, [0.0]))


def matrix_rate(device: th.device, dtype: th.dtype, size: int = 1536) -> float:
    """:return: FLOPs per millisecond of the fastest of some large matrix products"""
    a, b = (th.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock, owner = Clock(device), SimpleNamespace(product=lambda: a @ b)
    clock.watch(owner, "product")
    for _ in range(8):
        owner.product()
    return 2 * size**3 / min(clock.times["product"])


def count_flops(model: EZV2) -> tuple[float, float]:
    """:return: FLOPs of an update without its searches, and of the search of one state"""
    assert model.replay_buffer is not None and model._reanalyzer is not None
    search, batch = model._reanalyzer.search, model.replay_buffer.sample(model.batch_size)
    roots = 4 * NATIVE_MAX_ROOTS  # more than the C++ model searches, whose FLOPs are not seen
    with FlopCounterMode(display=False) as of_search:
        search.run(batch.observations.flatten(0, 1)[:roots], np.random.default_rng(0))
    model.policy.set_training_mode(True)
    with FlopCounterMode(display=False) as of_rest:
        targets = model._reanalyzer.td_values(batch)
        size, steps = targets.shape
        count = model._reanalyzer.search.num_root_actions if model.policy.network.discrete else 1
        candidates = (
            None if model.policy.network.discrete else targets.new_zeros(size, steps, 1, model.policy.network.action_dim)
        )
        dummy = Targets(targets, batch.value_mask, targets.new_ones(size, steps, count) / count, candidates)
        losses = compute_losses(model.policy.network, batch, dummy, np.random.default_rng(0))
        losses.total.backward()
    model.policy.optimizer.zero_grad()
    model.policy.set_training_mode(False)
    return of_rest.get_total_flops(), of_search.get_total_flops() / min(roots, size * steps)


def make_model(obs: str, settings: dict[str, Any], cache: bool, device: str, transitions: int | None) -> EZV2:
    """:return: an agent with so many transitions in its replay buffer that is about to make its first update"""
    images = obs == "image"
    env: VecEnv | gym.Env = VecFrameStack(DummyVecEnv([NoisyFrames] * IMAGE_ENVS), 4) if images else Noise()
    collected = max(COLLECTED[obs], transitions or 0) if images else COLLECTED[obs]
    model = EZV2(
        "CnnPolicy" if images else "MlpPolicy",
        env,
        seed=0,
        learning_starts=collected,
        reanalyze_cache=cache,
        device=device,
        **{"buffer_size": 2_000 if images else 100_000, "target_update_interval": 400, **settings},
    ).learn(collected)
    buffer, rng = model.replay_buffer, np.random.default_rng(0)
    assert buffer is not None
    for _ in range(collected, transitions or 0, model.n_envs):  # the rest of states without an environment
        step = [
            rng.standard_normal((1, *x.shape), dtype=np.float32).clip(-1, 1)
            for x in (Noise.observation_space, Noise.action_space)
        ]
        buffer.add(step[0], step[0], step[1], rng.random(1), np.zeros(1, bool), [{}])
    return model


def measure(
    obs: str, settings: dict[str, Any], cache: bool, updates: int, device: str = "cpu", transitions: int | None = None
) -> dict[str, Any]:
    """
    :param obs: ``"state"`` or ``"image"``
    :param settings: of EZV2
    :param cache: its ``reanalyze_cache``
    :param updates: how many to time
    :param device: where the networks are
    :param transitions: in the replay buffer before; None: as many as :data:`COLLECTED` says
    :return: the row, see the module's docstring
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = make_model(obs, settings, cache, device, transitions)
    buffer, reanalyzer = model.replay_buffer, model._reanalyzer
    assert buffer is not None and reanalyzer is not None
    bfloat16 = model.policy.trains_in_bfloat16
    rate = matrix_rate(model.device, th.bfloat16 if bfloat16 else th.float32)
    model.learn((1 if obs == "image" else 3) * model.n_envs, reset_num_timesteps=False)
    rest, per_state = count_flops(model)
    if cache:
        stored = np.flatnonzero((buffer.stamps >= 0) & (buffer.kinds == RUNNING))
        for start in range(0, len(stored), 256):
            reanalyzer.targets(buffer.sequences(stored[start : start + 256], unroll_steps=0), 0, np.random.default_rng(0))

    clock, policy = Clock(model.device), model.policy
    # Reanalyzer: the class, since each learn() makes one
    watched = [
        (buffer, "sample"), (buffer, "update_priorities"), (Reanalyzer, "targets"), (reanalyzer.search, "run"),
        (policy, "augment"),
        (algorithm, "compute_losses"), (th.Tensor, "backward"), (th.nn.utils, "clip_grad_norm_"), (policy.optimizer, "step"),
        (policy, "follow"), (model, "_set_fresh_priorities"), (model, "_count"), (model, "_sample_action"), (model, "_update"),
    ]  # fmt: skip
    for owner, name in watched:
        clock.watch(owner, name)
    searched: list[float] = []
    try:
        for _ in range(updates):
            runs, model._stats = len(clock.times.get("run", [])), {}
            model.learn(model.n_envs, reset_num_timesteps=False, log_interval=10**9)
            if len(clock.times.get("run", [])) == runs:
                clock.times.setdefault("run", []).append(0.0)
            searched.append(float(model._stats["search/searched_states"][0]))
    finally:
        clock.stop()
    median = clock.median
    followers = len(clock.times["follow"]) / len(clock.times["_update"])  # copies that follow the network at each update
    row = {
        "obs": obs,
        "device": model.device.type,
        "batch": model.batch_size,
        "cache": cache,
        "sample_ms": median("sample"),
        "targets_ms": median("targets") - median("run"),
        "search_ms": median("run"),
        "forward_backward_ms": median("compute_losses") + median("backward"),
        "optimizer_ms": median("clip_grad_norm_") + median("step") + followers * median("follow"),
        "update_ms": median("_update") + median("_set_fresh_priorities"),
        "floor_ms": (rest + statistics.median(searched) * per_state) / rate,
        # not printed
        "forward_ms": median("compute_losses"),
        "backward_ms": median("backward"),
        "augment_ms": median("augment"),
        "priorities_ms": median("update_priorities") + median("_set_fresh_priorities"),
        "logging_ms": median("_count"),
        "floor_without_search_ms": rest / rate,
        "gflop_per_s": rate / 1e6,
        "searched_states": statistics.median(searched),
        "transitions": buffer.size(),
        "acting_ms": median("_sample_action"),
        "acting_steps_per_s": 1e3 * model.n_envs / median("_sample_action"),
        "updates_per_s": 1e3 / median("_update"),
        "n_envs": model.n_envs,
        "n_simulations": model.n_simulations,
    }
    if model.device.type == "cuda":
        row["peak_memory_gb"] = th.cuda.max_memory_allocated() / 1e9
    else:
        row["peak_memory_gb"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e9
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--obs", nargs="+", choices=("state", "image"), default=["state", "image"])
    parser.add_argument("--cache", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--threads", type=int, default=th.get_num_threads())
    parser.add_argument("--updates", type=int, default=10, help="updates to time (default: %(default)s)")
    parser.add_argument("--transitions", type=int, help="in the replay buffer before (default: 2000, of images 400)")
    parser.add_argument("--small", action="store_true", help="the small networks of the learning benchmarks instead")
    parser.add_argument("--batch-size", type=int, help="instead of the paper's 256")
    parser.add_argument("--bfloat16", action="store_true", help="train_dtype and search_dtype bfloat16")
    parser.add_argument("--compile", choices=COMPILE_MODES, help="train_compile")
    parser.add_argument("--device", default="cpu", help="where the networks are (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON objects, one per line")
    parser.add_argument("--out", type=Path, help="file to append JSON objects with all columns to, one per line")
    options = parser.parse_args(arguments)
    th.set_num_threads(options.threads)
    for obs in options.obs:
        paper, small = (PAPER_IMAGES, SMALL_IMAGES) if obs == "image" else (PAPER, SMALL)
        settings = dict(small if options.small else paper)
        if options.batch_size is not None:
            settings["batch_size"] = options.batch_size
        if options.bfloat16:
            settings["policy_kwargs"] = {**settings["policy_kwargs"], "train_dtype": "bfloat16", "search_dtype": "bfloat16"}
        if options.compile:
            settings["policy_kwargs"] = {**settings["policy_kwargs"], "train_compile": options.compile}
        for cache in options.cache:
            row = measure(obs, settings, cache == "on", options.updates, options.device, options.transitions)
            printed = {name: row[name] for name in COLUMNS}
            print(json.dumps(printed) if options.json else ", ".join(f"{k} {v}" for k, v in printed.items()), flush=True)
            if options.out is not None:
                row |= {
                    "model": "small" if options.small else "paper",
                    "dtype": "bfloat16" if options.bfloat16 else "float32",
                    "compile": options.compile,
                    "threads": options.threads,
                    "updates": options.updates,
                    "machine": machine(),
                    "commit": commit(),
                }
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
