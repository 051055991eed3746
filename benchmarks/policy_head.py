"""
What the search is worth when acting: deterministic returns with fewer simulations, and of the policy head alone (0)::

    python -m benchmarks.learn --small --env CartPole-v1 --steps 3000 --eval-every 3000 --save-agent --out runs/agents
    python -m benchmarks.policy_head runs/agents/CartPole-v1_ezv2_seed0.zip --out benchmarks/results/policy-head.csv

The agents are those that ``benchmarks.learn --save-agent`` left, with their results beside them, which tell task and seed. All
numbers of simulations play from the same starts as that command's evaluations. Rows are added to the file.
"""

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.envs import make_vec_env
from benchmarks.plots import read_rows
from benchmarks.provenance import commit, machine
from sb3_ezv2 import EZV2

COLUMNS = (
    "task",
    "seed",
    "steps",
    "n_simulations",
    "mean",
    "std",
    "episodes",
    "ms_per_step",
    "machine",
    "commit",
    "trained_with",
)


def play(model: EZV2, env: DummyVecEnv, n_simulations: int) -> tuple[np.ndarray, float]:
    """
    One whole episode of the deterministic policy on each environment.

    :param model: the agent
    :param env: freshly seeded
    :param n_simulations: see :meth:`sb3_ezv2.EZV2.predict`
    :return: float64 [n_envs], undiscounted returns; milliseconds of a call of ``predict`` for all environments together
    """
    returns, running = np.zeros(env.num_envs), np.ones(env.num_envs, bool)
    obs = env.reset()
    seconds, calls = 0.0, 0
    while running.any():
        start = time.perf_counter()
        action, _ = model.predict(obs, deterministic=True, n_simulations=n_simulations)  # type: ignore[arg-type]
        seconds, calls = seconds + time.perf_counter() - start, calls + 1
        obs, reward, done, _ = env.step(action)
        returns += np.where(running, reward, 0.0)
        running &= ~done
    return returns, 1000 * seconds / calls


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policy_head", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("agents", nargs="+", type=Path, help="files of benchmarks.learn --save-agent")
    parser.add_argument("--simulations", type=int, nargs="+", default=[0, 1, 4, 16, 32], help="of each search; 0: none")
    parser.add_argument("--episodes", type=int, default=10, help="per row (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    options = parser.parse_args(arguments)
    for agent in options.agents:
        if not agent.exists() or not agent.with_suffix(".csv").exists():
            parser.error(f"{agent} and its .csv are not both there: make them with benchmarks.learn --save-agent.")
    th.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    constants = {"machine": machine(), "commit": commit()}
    if not options.out.exists():
        with open(options.out, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(COLUMNS)
    for agent in options.agents:
        trained = read_rows([agent.with_suffix(".csv")])[-1]
        model = EZV2.load(agent, device="cpu")
        env = make_vec_env(trained["task"], options.episodes)
        for n_simulations in options.simulations:
            env.seed(10_000 * (1 + trained["seed"]))  # as benchmarks.learn
            returns, milliseconds = play(model, env, n_simulations)
            row = dict(
                task=trained["task"],
                seed=trained["seed"],
                steps=trained["step"],
                n_simulations=n_simulations,
                mean=round(float(returns.mean()), 4),
                std=round(float(returns.std()), 4),
                episodes=options.episodes,
                ms_per_step=round(milliseconds, 3),
                **constants,
                trained_with=f"commit {trained['commit']}, {trained['settings']}",
            )
            with open(options.out, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS).writerow(row)
            print(
                f"{row['task']}  seed {row['seed']}  step {row['steps']}  {n_simulations:3d} simulations: "
                f"return {row['mean']:.1f} ± {row['std']:.1f}, {row['ms_per_step']:.2f} ms for {options.episodes} actions",
                flush=True,
            )
        env.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
