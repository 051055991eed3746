"""
What an agent of reacher-easy believes of every pose of the arm, at rest: the reward that its model expects, and the value::

    python -m benchmarks.reacher_map CHECKPOINT --out map.png

A column per start of the task, each with a target of its own; the angle of the shoulder from left to right, of the wrist from
bottom to top. Within the red lines the finger is on the target, the circle is the start, a cross is a local maximum of the
values outside of the target, where an agent that goes to better values stays. Prints, over all poses and targets, how often
the expected reward is on the right side of half of the largest one, and how many local maxima there are. The agent is one of
two frames per step, as in RL Zoo's settings.

The model is the one that predicts: the averaged weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch as th

from benchmarks.envs import make_env
from benchmarks.provenance import commit, machine
from sb3_ezv2 import EZV2

SHOULDER, WRIST = np.linspace(-np.pi, np.pi, 61), np.linspace(-2.79, 2.79, 55)
REPEAT = 2
"""Frames of a step, each with a reward of 0 or 1."""
FIRST_SEED = 1000


def poses(env: gym.Env[Any, Any], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    :param env: ``dm_control/reacher-easy-v0``
    :param seed: of the start
    :return: [W * S, 6] observations of all poses at rest; bool [W, S], where the finger is on the target; the start, [2]
    """
    env.reset(seed=seed)
    physics = env.unwrapped._env.physics  # type: ignore[attr-defined]
    start = physics.data.qpos.copy()
    reach = physics.named.model.geom_size[["target", "finger"], 0].sum()
    observations, on_target = [], []
    for wrist in WRIST:
        for shoulder in SHOULDER:
            with physics.reset_context():
                physics.data.qpos[:] = shoulder, wrist
                physics.data.qvel[:] = 0
            observations.append(np.concatenate([physics.position(), physics.finger_to_target(), physics.velocity()]))
            on_target.append(physics.finger_to_target_dist() <= reach)
    return np.array(observations, np.float32), np.array(on_target).reshape(len(WRIST), len(SHOULDER)), start


def local_maxima(values: np.ndarray) -> np.ndarray:
    """:param values: [W, S] :return: bool [W, S], greater than all neighbours, which the first and last shoulder have not"""
    padded = np.pad(values, ((1, 1), (0, 0)), constant_values=-np.inf)  # the wrist has limits
    padded = np.pad(padded, ((0, 0), (1, 1)), mode="edge")
    height, width = values.shape
    shifts = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    return values > np.max([padded[y : y + height, x : x + width] for y, x in shifts], axis=0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder with agent.zip")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    options = parser.parse_args(arguments)
    th.set_num_threads(1)
    model = EZV2.load(options.checkpoint / "agent.zip", device="cpu")
    network = model.policy.averaged_network
    env = make_env("dm_control/reacher-easy-v0")
    figure, axes = plt.subplots(2, options.starts, figsize=(3.2 * options.starts, 6), squeeze=False, layout="constrained")
    right, stuck = [], []
    for column in range(options.starts):
        observations, on_target, start = poses(env, FIRST_SEED + column)
        with th.no_grad():
            values = network.values(th.from_numpy(observations)).numpy().reshape(on_target.shape)
            state = network.represent(th.from_numpy(observations))
            state = network.dynamics_step(state, th.zeros(len(observations), 2))
            reward = network.reward_support.decode(network.reward_logits(state.unsqueeze(0)))[0]
        rewards = reward.numpy().reshape(on_target.shape)
        right.append(((rewards > REPEAT / 2) == on_target).mean())
        maxima = local_maxima(values) & ~on_target
        stuck.append(maxima.sum())
        for row, (name, what) in enumerate({"reward": rewards, "value": values}.items()):
            ax = axes[row, column]
            mesh = ax.pcolormesh(SHOULDER, WRIST, what, vmin=0)
            figure.colorbar(mesh, ax=ax)
            ax.contour(SHOULDER, WRIST, on_target.astype(float), levels=[0.5], colors="red")
            ax.plot(*start, "o", color="white")
            ax.set_title(f"{name}, start {column}")
        axes[1, column].plot(SHOULDER[np.nonzero(maxima)[1]], WRIST[np.nonzero(maxima)[0]], "x", color="white")
        axes[1, column].set_xlabel("shoulder")
    for row in range(2):
        axes[row, 0].set_ylabel("wrist")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=70)
    plt.close(figure)
    print(
        f"{options.checkpoint.name}, {options.starts} starts: the reward is right in {np.mean(right):.3f} of the poses; "
        f"local maxima of the values outside of the target: {', '.join(map(str, stuck))}; {machine()}; {commit()}"
    )


if __name__ == "__main__":
    main()
