"""
Where the policy of Box actions ends when the values of a search are noisy, without a model or an environment::

    python -m benchmarks.candidates --out benchmarks/results/candidates/noise.csv

In one state the best action is known: q(a) = -|a - optimum|^2 and noise, whose standard deviation is a multiple of that of q
over the candidates (``inf``: nothing but noise). Each update draws root candidates as a search does, takes the one with the
highest q and makes a step with Eq. 9 and the entropy bonus. A noise of 0 would be a search that never errs.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch as th

from benchmarks.provenance import commit, machine, write_rows
from sb3_ezv2.distributions import SquashedGaussian

CANDIDATES, STATES, ENT_COEF, LEARNING_RATE = 16, 64, 5e-3, 3e-3


def train(
    fraction: float, std_scale: float, dimensions: int, noise: float, optimum: float, updates: int = 1_200, seed: int = 0
) -> dict[str, Any]:
    """
    :param fraction: share of the candidates from the policy, the rest from its flattened version
    :param std_scale: standard deviation of the flattened policy, as a multiple of the policy's
    :param dimensions: of the action
    :param noise: standard deviation of the values' noise, as a multiple of that of the values
    :param optimum: the best action, in every dimension
    :return: of the final policy: its mode and its standard deviation before tanh, the mean distance of its actions from the
        optimum, and the share of forces beyond 0.9
    """
    rng = th.Generator().manual_seed(seed)
    params = th.zeros(2 * dimensions, requires_grad=True)
    optimizer = th.optim.Adam([params], lr=LEARNING_RATE)
    scale = th.ones(CANDIDATES, 1)
    scale[max(1, round(fraction * CANDIDATES)) :] = std_scale
    for _ in range(updates):
        policy = SquashedGaussian(params.expand(STATES, 1, -1))
        with th.no_grad():
            actions = policy.sample(th.randn(STATES, CANDIDATES, dimensions, generator=rng), scale)
            q = -(actions - optimum).square().sum(-1) if noise < math.inf else th.zeros(STATES, CANDIDATES)
            spread = q.std(1, keepdim=True).mean() * noise if noise < math.inf else 1.0
            best = (q + spread * th.randn(q.shape, generator=rng)).argmax(1)
            best_action = actions[th.arange(STATES), best].unsqueeze(1)
        entropy = policy.entropy(th.randn(4, STATES, 1, dimensions, generator=rng)).mean()
        loss = -policy.log_prob(best_action).mean() - ENT_COEF * entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with th.no_grad():
        policy = SquashedGaussian(params)
        actions = policy.sample(th.randn(20_000, dimensions, generator=rng))
    return {
        "mode": round(float(th.tanh(policy.mean).mean()), 2),
        "std": round(float(policy.std.mean()), 2),
        "distance": round(float((actions - optimum).abs().mean()), 2),
        "full_forces": round(float((actions.abs() > 0.9).float().mean()), 2),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--flat-std-scale", type=float, default=3.0)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.1, 0.3, 1.0, 3.0, math.inf])
    parser.add_argument("--optima", type=float, nargs="+", default=[0.3, 1.0])
    parser.add_argument("--updates", type=int, default=1_200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    options = parser.parse_args(arguments)
    th.set_num_threads(1)
    rows = []
    for optimum in options.optima:
        for dimensions in options.dimensions:
            for noise in options.noise:
                for fraction in options.fractions:
                    setting = dict(optimum=optimum, dimensions=dimensions, noise=noise, fraction=fraction)
                    start = time.perf_counter()
                    found = train(fraction, options.flat_std_scale, dimensions, noise, optimum, options.updates, options.seed)
                    made = dict(
                        flat_std_scale=options.flat_std_scale, seed=options.seed, updates=options.updates,
                        seconds=round(time.perf_counter() - start, 1), machine=machine(), commit=commit(),
                    )  # fmt: skip
                    rows.append({**setting, **found, **made})
                    print("  ".join(f"{name} {value}" for name, value in {**setting, **found}.items()), flush=True)
    if options.out is not None:
        write_rows(options.out, rows)


if __name__ == "__main__":
    main()
