"""
Do values carry over to other episodes? Fits a new network of a saved agent's kind to the returns of its stored episodes::

    python -m benchmarks.held_out CHECKPOINT --gamma 0.98 --noise 0 0.3 --out held-out.csv

Representation and value head learn the discounted returns that followed each state of four fifths of the episodes, by the
value's cross-entropy and batches as large as the agent's, and are read on every fifth episode and the last: R² on both, after
some numbers of updates. Returns of an episode that was cut short count only where what is missing weighs less than 2%.
``--noise`` is that of the inputs while fitting, in standard deviations. Observations are vectors, as they were stored.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from benchmarks.provenance import commit, machine, write_rows
from sb3_ezv2 import EZV2, MlpPolicy
from sb3_ezv2.replay_buffer import RUNNING, TERMINATED, SequenceReplayBuffer

HELD_OUT = 5
"""Every so many episodes one is not fitted."""
MISSING = 0.02


def episodes(buffer: SequenceReplayBuffer, gamma: float) -> Iterator[tuple[th.Tensor, th.Tensor]]:
    """
    :param buffer: of vectors
    :param gamma: discount
    :return: of each stored episode that has ended, observations [T, F] and their discounted returns [T]
    """
    longest = math.ceil(math.log(MISSING) / math.log(gamma))
    for env in range(buffer.n_envs):
        slots = env * buffer.ring + np.arange(buffer.ring)
        slots = slots[buffer.stamps[slots] >= 0]
        slots = slots[np.argsort(buffer.stamps[slots])]
        for episode in np.unique(buffer.episodes[slots]):
            own = slots[buffer.episodes[slots] == episode]
            end, running = buffer.kinds[own[-1]], own[buffer.kinds[own] == RUNNING]
            returns = np.zeros(len(running))
            following = 0.0
            for step in reversed(range(len(running))):
                following = buffer.rewards[running[step]] + gamma * following
                returns[step] = following
            known = 0 if end == RUNNING else len(running) if end == TERMINATED else len(running) - longest
            if known > 0:
                observations = buffer.sequences(running[:known], unroll_steps=0).observations[:, 0]
                yield observations.float().flatten(1), th.from_numpy(returns[:known]).float()


def explained(values: th.Tensor, returns: th.Tensor) -> float:
    """:return: R² of the values"""
    return float(1 - (values - returns).square().mean() / returns.var(correction=0))


def fit(
    model: EZV2,
    train: tuple[th.Tensor, th.Tensor],
    test: tuple[th.Tensor, th.Tensor],
    noise: float,
    updates: list[int],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """
    :param model: whose kind of network is fitted, from new weights
    :param train: observations [N, F] and returns [N]
    :param test: the same of other episodes
    :param noise: of the normalised observations while fitting
    :param updates: after which the network is read
    :param seed: of weights, batches and noise
    :return: a row each time
    """
    th.manual_seed(seed)
    network: Any = model.policy._make_network()
    network.set_reward_scale(float(model.policy.network.value_support.scale))
    network.normalizer.update(train[0])
    inputs, held = network.normalizer(train[0]), network.normalizer(test[0])
    parameters = [*network.representation.parameters(), *network.value_head.parameters()]
    optimizer_class: Any = model.policy.optimizer_class
    optimizer = optimizer_class(parameters, lr=model.lr_schedule(1), **model.policy.optimizer_kwargs)
    start = time.perf_counter()
    for update in range(1, max(updates) + 1):
        network.train()
        rows = th.randint(len(inputs), (model.batch_size,))
        x = inputs[rows] + noise * th.randn(len(rows), inputs.shape[1])
        logits = network.value_head(network.representation(x))
        loss = network.value_support.cross_entropy(logits, train[1][rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update in updates:
            network.eval()
            with th.no_grad():
                fitted, others = (
                    network.value_support.decode(network.value_head(network.representation(x))) for x in (inputs, held)
                )
            scores = dict(train_r2=round(explained(fitted, train[1]), 3), test_r2=round(explained(others, test[1]), 3))
            yield dict(noise=noise, updates=update, **scores, seconds=round(time.perf_counter() - start, 1))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder with agent.zip and replay_buffer.pkl")
    parser.add_argument("--gamma", type=float, help="discount of the returns (default: the agent's)")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0])
    parser.add_argument("--updates", type=int, nargs="+", default=[250, 500, 1000, 2000, 3000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    options = parser.parse_args(arguments)
    th.set_num_threads(1)
    model = EZV2.load(options.checkpoint / "agent.zip", device="cpu")
    if not (isinstance(model.policy, MlpPolicy) and isinstance(model.observation_space, spaces.Box)):
        parser.error("only agents with vectors as observations can be looked at.")
    model.load_replay_buffer(options.checkpoint / "replay_buffer.pkl")
    assert model.replay_buffer is not None
    gamma = model.gamma if options.gamma is None else options.gamma
    if not 0 < gamma < 1:
        parser.error(f"--gamma must lie between 0 and 1, not {gamma}.")
    found = list(episodes(model.replay_buffer, gamma))
    if len(found) < 2:
        parser.error(f"{len(found)} episodes have returns that are known: at least 2 are needed; a lower --gamma may help.")
    held = [index % HELD_OUT == HELD_OUT - 1 or index == len(found) - 1 for index in range(len(found))]

    def join(wanted: bool) -> tuple[th.Tensor, th.Tensor]:
        chosen = [pair for pair, is_held in zip(found, held) if is_held == wanted]
        return th.cat([x for x, _ in chosen]), th.cat([x for _, x in chosen])

    train, test = join(False), join(True)
    print(f"{held.count(False)} episodes with {len(train[0])} states, and {held.count(True)} with {len(test[0])}")
    made = dict(gamma=gamma, seed=options.seed, steps=model.num_timesteps, machine=machine(), commit=commit())
    rows = []
    for noise in options.noise:
        for row in fit(model, train, test, noise, options.updates, options.seed):
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append({**row, **made})
    if options.out is not None:
        write_rows(options.out, rows)


if __name__ == "__main__":
    main()
