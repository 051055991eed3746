"""
Are the values right? Trains an agent and compares them with what they should be::

    python -m benchmarks.values --env CartPole-v1 --steps 3000 --seed 0 --threads 1

First, the network's values along episodes of the deterministic policy beside the discounted returns that followed; then,
for the stored transitions by age, values, n-step targets and search-based values, with the share of the samples
that each age gets. Where old, worse behaviour pulls values down, its n-step targets lie below the values of fresh data.
Last, the same for the stored states shortly before a termination, where the return is known.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import numpy as np
import torch as th

from benchmarks.envs import make_vec_env
from benchmarks.learn import keyword_arguments
from benchmarks.provenance import commit, machine
from benchmarks.settings import SMALL
from sb3_ezv2 import EZV2


def along_episodes(model: EZV2, env_id: str, episodes: int, seed: int, longest: int) -> None:
    """Print values and measured returns at some steps of whole episodes. :param longest: steps at most"""
    env = make_vec_env(env_id, episodes)
    env.seed(seed)
    obs = env.reset()
    observations: list[np.ndarray] = []
    rewards: list[np.ndarray] = []
    alive = np.ones(episodes, bool)
    while alive.any() and len(rewards) < longest:
        assert isinstance(obs, np.ndarray)
        action, _ = model.predict(obs, deterministic=True)
        observations.append(obs.copy())
        obs, reward, done, _ = env.step(action)
        rewards.append(np.where(alive, reward, np.nan))
        alive &= ~done
    returns = np.zeros_like(rewards)
    following = np.zeros(episodes)
    for step in reversed(range(len(rewards))):
        following = np.nan_to_num(rewards[step]) + model.gamma * following
        returns[step] = following
    flat = th.as_tensor(np.concatenate(observations))
    with th.no_grad():
        values = model.policy.averaged_network.values(flat).numpy().reshape(-1, episodes)
    lengths = np.isfinite(rewards).sum(0)
    print(f"lengths {lengths.tolist()}, undiscounted returns {np.nansum(rewards, 0).round(1).tolist()}")
    print("step: mean value / mean discounted return that followed, of the episodes that are still running")
    for step in np.unique(np.linspace(0, lengths.max() - 1, 12).astype(int)):
        running = lengths > step
        print(f"  {step:5d}: {values[step][running].mean():9.2f} / {returns[step][running].mean():9.2f}   ({running.sum()})")


def by_age(model: EZV2) -> None:
    """Print values and both kinds of targets of the stored transitions, by age."""
    buffer, reanalyzer = model.replay_buffer, model._reanalyzer
    assert buffer is not None and reanalyzer is not None
    starts = np.flatnonzero(buffer.weights > 0)
    ages = buffer.total_transitions - buffer.transitions[starts]
    edges = np.unique(np.quantile(ages, [0, 0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 1]).astype(int))
    rng = np.random.default_rng(0)
    print("ages: n, value, n-step target, mean |target - value|, search-based value; share of the data, of the samples")
    for low, high in pairwise(edges):
        group = starts[(ages >= low) & (ages <= high)]
        chosen = rng.choice(group, min(len(group), 400), replace=False)
        batch = buffer.sequences(chosen, env=model._vec_normalize_env, unroll_steps=0)
        with th.no_grad():
            values = model.policy.averaged_network.values(batch.observations[:, 0])
        targets = reanalyzer.td_values(batch)[:, 0]
        searched = model.policy.search.run(batch.observations[:, 0], None).value
        share = buffer.weights[group].sum() / buffer.weights.sum()
        horizon = buffer.horizons(batch.ages).mean()
        error = (targets - values).abs().mean()
        print(
            f"  {low:6d} to {high:6d}: {horizon:5.1f} {values.mean():9.2f} {targets.mean():9.2f} {error:8.2f} "
            f"{searched.mean():9.2f};  {len(group) / len(starts):.2f} {share:.2f}"
        )


def before_terminations(model: EZV2, steps: int = 5) -> None:
    """Print values and observed returns of the stored states before a termination. :param steps: within so many of it"""
    buffer = model.replay_buffer
    assert buffer is not None
    longest = buffer.td_steps, buffer.td_steps_min
    buffer.td_steps = buffer.td_steps_min = steps
    starts = np.flatnonzero(buffer.weights > 0)
    batch = buffer.sequences(starts, env=model._vec_normalize_env, unroll_steps=0)
    buffer.td_steps, buffer.td_steps_min = longest
    ended = (batch.bootstrap_discounts[:, 0] == 0).numpy()
    if not ended.any():
        return
    with th.no_grad():
        values = model.policy.averaged_network.values(batch.observations[ended, 0]).numpy()
    searched = model.policy.search.run(batch.observations[ended, 0], None).value.numpy()
    ages, returns = batch.ages[ended], batch.returns[ended, 0].numpy()
    print(f"within {steps} steps of a termination, by age: value, search-based value, observed return (n)")
    edges = np.unique(np.quantile(ages, np.linspace(0, 1, 5)).astype(int))
    for low, high in zip(edges[:-1], [*(edges[1:-1] - 1), edges[-1]]):
        group = (ages >= low) & (ages <= high)
        means = values[group].mean(), searched[group].mean(), returns[group].mean()
        print(f"  {low:6d} to {high:6d}: " + " ".join(f"{mean:9.2f}" for mean in means) + f"   ({group.sum()})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--longest", type=int, default=1000, help="steps of an episode at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--params", nargs="*", help="settings beyond the small ones, as in benchmarks.learn")
    options = parser.parse_args()
    th.set_num_threads(options.threads)
    settings = keyword_arguments(options.params, SMALL)
    model = EZV2("MlpPolicy", make_vec_env(options.env, 1), seed=options.seed, device="cpu", **settings)
    model.learn(options.steps)
    print(f"{options.env}, {options.steps} steps, seed {options.seed}, {settings}; {machine()}; {commit()}")
    along_episodes(model, options.env, options.episodes, 10_000 * (1 + options.seed), options.longest)
    by_age(model)
    before_terminations(model)


if __name__ == "__main__":
    main()
