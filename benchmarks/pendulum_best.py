"""
The best possible returns of Pendulum-v1 from the starts that the evaluations use::

    python -m benchmarks.pendulum_best --seeds 0 1 2 3 4

Returns depend on the start more than on the agent: hanging still costs twice what half-way up does. Dynamic programming
over a grid of angles and speeds, with the true dynamics, tells what a perfect agent would get.
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.envs import make_vec_env

STEPS = 200
ANGLES, SPEEDS = 161, 161
TORQUES = np.linspace(-2, 2, 41)


def step(angle: np.ndarray, speed: np.ndarray, torque: float | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gymnasium's Pendulum-v1. :return: angle, speed, reward, each of the arguments' shape"""
    wrapped = (angle + np.pi) % (2 * np.pi) - np.pi
    reward = -(wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = np.clip(speed + (15 * np.sin(angle) + 3 * torque) * 0.05, -8, 8)
    return angle + speed * 0.05, speed, reward


def interpolate(values: np.ndarray, angle: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """Bilinear. :param values: [ANGLES, SPEEDS] over [-pi, pi] x [-8, 8] :return: of the arguments' shape"""
    row = (angle + np.pi) % (2 * np.pi) / (2 * np.pi) * (ANGLES - 1)
    column = (speed + 8) / 16 * (SPEEDS - 1)
    i, j = np.minimum(row.astype(int), ANGLES - 2), np.minimum(column.astype(int), SPEEDS - 2)
    a, b = row - i, column - j
    near = (1 - a) * values[i, j] + a * values[i + 1, j]
    return (1 - b) * near + b * ((1 - a) * values[i, j + 1] + a * values[i + 1, j + 1])


def q_values(values: np.ndarray, angle: np.ndarray, speed: np.ndarray, torques: np.ndarray) -> np.ndarray:
    """:return: [torques, ...] reward and value of the next state"""
    outcomes = [step(angle, speed, torque) for torque in torques]
    return np.stack([reward + interpolate(values, *state) for *state, reward in outcomes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--episodes", type=int, default=10)
    options = parser.parse_args()
    grid = np.meshgrid(np.linspace(-np.pi, np.pi, ANGLES), np.linspace(-8, 8, SPEEDS), indexing="ij")
    to_go = [np.zeros((ANGLES, SPEEDS))]  # values with so many steps left
    for _ in range(STEPS):
        to_go.append(q_values(to_go[-1], *grid, TORQUES[::5]).max(0))
    for seed in options.seeds:
        env = make_vec_env("Pendulum-v1", options.episodes)
        env.seed(10_000 * (1 + seed))  # as benchmarks.learn
        obs = np.asarray(env.reset(), float)
        angle, speed = np.arctan2(obs[:, 1], obs[:, 0]), obs[:, 2]
        returns = np.zeros(options.episodes)
        for left in range(STEPS, 0, -1):
            torque = TORQUES[q_values(to_go[left - 1], angle, speed, TORQUES).argmax(0)]
            angle, speed, reward = step(angle, speed, torque)
            returns += reward
        print(f"seed {seed}: mean {returns.mean():.1f}, episodes {' '.join(f'{x:.0f}' for x in returns)}")


if __name__ == "__main__":
    main()
