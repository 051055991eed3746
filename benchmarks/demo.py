"""
The demonstration behind ``make demo``: EZV2 learns CartPole-v1 in a few minutes on two cores.

It is also an example of ordinary Stable-Baselines3 code around :class:`sb3_ezv2.EZV2`.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from benchmarks.settings import SMALL
from sb3_ezv2 import EZV2

TASK = "CartPole-v1"
BEST = 500  # the return of a whole CartPole-v1 episode


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Train, evaluate, save and draw.

    :param arguments: instead of the process's
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=f"Train EZV2 on {TASK}.")
    parser.add_argument("--steps", type=_positive, default=1500, help="environment steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    model = EZV2("MlpPolicy", TASK, seed=options.seed, **SMALL)
    # Ten copies are searched in one batch, which takes little more time than one.
    eval_env = make_vec_env(TASK, n_envs=10, seed=10_000)
    evaluation = EvalCallback(
        eval_env, n_eval_episodes=10, eval_freq=max(options.steps // 6, 1), log_path=str(options.out), verbose=0
    )
    print(f"Training EZV2 on {TASK} for {options.steps} steps.", flush=True)
    start = time.perf_counter()
    model.learn(options.steps, callback=evaluation, progress_bar=True)
    seconds = time.perf_counter() - start
    scores, _ = evaluate_policy(model, eval_env, n_eval_episodes=10, return_episode_rewards=True)
    mean, std = float(np.mean(scores)), float(np.std(scores))

    agent, picture = options.out / "cartpole.zip", options.out / "learning_curve.png"
    model.save(agent)
    env = model.get_env()
    assert env is not None
    # SB3 wraps the environment in Monitor, which keeps every training episode.
    returns, lengths = env.env_method("get_episode_rewards")[0], env.env_method("get_episode_lengths")[0]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(np.cumsum(lengths), returns, ".", color="tab:grey", label="training episodes, with exploration")
    # The callback's last evaluation may be at the last step, where the final one says more: it sees the last update too.
    means = {
        step: float(np.mean(results))
        for step, results in zip(evaluation.evaluations_timesteps, evaluation.evaluations_results, strict=True)
    } | {options.steps: mean}
    axis.plot(list(means), list(means.values()), "o-", color="tab:blue", linewidth=2, label="evaluation, mean of 10 episodes")
    axis.axhline(BEST, color="black", linewidth=0.8, linestyle="--")
    axis.set(title=f"EZV2 on {TASK}", xlabel="environment steps", ylabel="return", xlim=(0, None), ylim=(0, 1.06 * BEST))
    axis.grid(alpha=0.25)
    axis.legend(fontsize="small")
    figure.savefig(picture, dpi=110)
    eval_env.close()
    env.close()

    print(f"{options.steps} steps in {seconds:.0f} s, evaluations included.")
    print(f"Return of 10 episodes: {mean:.1f} ± {std:.1f} ({BEST} is the most possible).")
    print(f"Agent:          {agent}\nLearning curve: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
