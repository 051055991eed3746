"""
How long a batched search takes, beside DeepMind's mctx in the same run::

    python -m benchmarks.search --threads 1 --json
    python -m benchmarks.search --threads 2 --models state --bfloat16 --no-mctx

Sizes are roots x simulations x actions for discrete actions; a fourth number, the candidates at inner nodes, means sampled
Box actions. Two models: "free" costs next to nothing, so that what is left is the search itself, and keeps a state of 128
floats that depends on every action, so that no compiler can drop it; "state" is the paper's (24 observations, 6 action
dimensions, 3 blocks). mctx has no sampled actions: there it searches as many discrete ones at every node.

Times are medians in milliseconds of whole searches, from observations to actions and improved policies, this
implementation's and mctx's in turn, five in a row. ``tree_ms`` is the tree alone, ``network_ms`` (not in the JSON) what the
model took of ``ours_ms``: its steps and the evaluation of the observations, but 0 where the whole search runs in C++. With one
thread the process is bound to one core, JAX included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from benchmarks.provenance import commit, machine
from sb3_ezv2.ctree import Tree
from sb3_ezv2.distributions import CategoricalSupport, SupportSpec
from sb3_ezv2.networks import Ezv2Network
from sb3_ezv2.search import GumbelSearch, SearchSettings

STATE_DIM, ACTION_DIM, OBSERVATIONS = 128, 6, 24
BLOCK = 5
"""Searches of one kind in a row."""

FREE = ("1536x32x16x2", "1536x16x18", "256x32x16x2", "16x32x16x2", "4x32x16x2", "1x32x16x2")
STATE = ("1536x32x16x2", "256x32x16x2", "16x32x16x2", "4x32x16x2", "1x32x16x2", "1x16x18")


class Size(NamedTuple):
    """Of a search. :param inner_actions: those of the other nodes; as many as at the root if ``discrete``"""

    roots: int
    simulations: int
    actions: int
    inner_actions: int
    discrete: bool

    @property
    def considered(self) -> int:
        """Actions that enter sequential halving: the paper's 8 of the discrete ones, all candidates of Box actions."""
        return min(self.actions, 8) if self.discrete else self.actions


def parse_size(text: str) -> Size:
    """:raises argparse.ArgumentTypeError: no three or four positive numbers"""
    parts = text.split("x")
    if len(parts) not in (3, 4) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROOTSxSIMULATIONSxACTIONS or ROOTSxSIMULATIONSxACTIONSxINNER")
    roots, simulations, actions, *inner = [int(part) for part in parts]
    return Size(roots, simulations, actions, inner[0] if inner else actions, not inner)


class FreeModel:
    """
    The next state is the state plus a hundredth of the action; the other outputs lie ready, others for each call.

    Small tensor operations cost more than their arithmetic here, and are not what is measured.
    """

    def __init__(self, size: Size):
        self.discrete = size.discrete
        self.category_sizes: tuple[int, ...] = ()
        self.action_dim = size.actions if size.discrete else ACTION_DIM
        self.state_dim = STATE_DIM
        self.training = False
        self.reward_support = CategoricalSupport(SupportSpec(299.0, 51, "h"))
        generator = th.Generator().manual_seed(0)
        outputs = size.actions if size.discrete else 2 * ACTION_DIM
        self.values = th.randn(size.simulations, size.roots, generator=generator).unbind()
        self.policies = th.randn(size.simulations, size.roots, outputs, generator=generator).unbind()
        self.calls = 0

    def eval(self) -> FreeModel:
        return self

    def initial_inference(self, obs: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        self.calls = 0
        return obs, self.values[0], self.policies[0]

    def recurrent_inference(self, state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        new = th.add(state, action.view(-1, 1) if self.discrete else action[:, :1], alpha=0.01)
        value, policy = self.values[self.calls], self.policies[self.calls]
        self.calls += 1
        return new, value, value, policy


def state_network(size: Size) -> Ezv2Network:
    """The paper's state model, with last layers that are not zero."""
    th.manual_seed(0)
    observations = spaces.Box(-np.inf, np.inf, (OBSERVATIONS,))
    actions = spaces.Discrete(size.actions) if size.discrete else spaces.Box(-1.0, 1.0, (ACTION_DIM,))
    supports = SupportSpec(299.0, 51, "h"), SupportSpec(2.0, 51, "h")
    network = Ezv2Network(observations, actions, FlattenExtractor(observations), [256], STATE_DIM, 3, 64, 512, *supports)
    for head in (network.value_head, network.reward_head, network.policy_head):
        last = head.mlp[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.05)
    return network.eval()


def tree_search(size: Size) -> Callable[[], None]:
    """:return: a search without model and driver: the outputs lie ready"""
    rng = np.random.default_rng(0)
    B, S, K, M = size.roots, size.simulations, size.actions, size.inner_actions
    tree = Tree(B, S, K, M, num_considered=size.considered, discount=0.997, num_threads=th.get_num_threads())
    reward, value = rng.normal(size=(2, S, B)).astype(np.float32)
    logits = list(rng.normal(size=(S, B, M)).astype(np.float32)) if size.discrete else [None] * S
    zeros = np.zeros((B, K), np.float32)
    gumbel = rng.gumbel(size=(B, K)).astype(np.float32) if size.discrete else zeros

    def run() -> None:
        tree.reset(value[0], zeros, gumbel)
        tree.select()
        for s in range(S):
            tree.step(reward[s], value[s], logits[s])
        tree.best_action(), tree.policy(), tree.root_value()

    return run


def our_search(
    size: Size, model: Any, bfloat16: bool, clock: Callable[[], float] = time.perf_counter
) -> tuple[Callable[[], None], list[float], GumbelSearch]:
    """:return: a search, a list of which the last entry becomes the seconds spent in PyTorch's model, the searcher"""
    settings = SearchSettings(size.simulations, size.considered if size.discrete else size.actions, size.inner_actions)
    search = GumbelSearch(model, settings, bfloat16=bfloat16)
    rng = np.random.default_rng(0)
    generator = th.Generator().manual_seed(0)
    obs = th.randn(size.roots, STATE_DIM if isinstance(model, FreeModel) else OBSERVATIONS, generator=generator)
    seconds = [0.0]
    traced_step = search._traced.step

    def clocked(*example: Any) -> Callable[..., Any]:
        step = traced_step(*example)

        def run_step(*args: Any) -> Any:
            start = clock()
            result = step(*args)
            seconds[-1] += clock() - start
            return result

        return run_step

    search._traced.step = clocked  # type: ignore[method-assign, assignment]
    initial = model.initial_inference

    def clocked_initial(observations: Any) -> Any:
        start = clock()
        result = initial(observations)
        seconds[-1] += clock() - start
        return result

    model.initial_inference = clocked_initial

    def run() -> None:
        seconds.append(0.0)
        search.run(obs, rng)

    return run, seconds, search


def mctx_search(size: Size) -> Callable[[], None]:
    """:return: a search by mctx with the free model"""
    import jax
    import jax.numpy as jnp
    import mctx

    def recurrent(params: Any, key: Any, action: Any, state: Any) -> Any:
        new = state + 0.01 * action[:, None]
        output = mctx.RecurrentFnOutput(
            reward=new[:, 0],
            discount=jnp.full(size.roots, 0.997),
            prior_logits=new[:, 2 : 2 + size.actions],
            value=new[:, 1],
        )
        return output, new

    @jax.jit
    def policy(key: Any, obs: Any) -> Any:
        root = mctx.RootFnOutput(prior_logits=obs[:, 2 : 2 + size.actions], value=obs[:, 1], embedding=obs)
        output = mctx.gumbel_muzero_policy(
            params=(),
            rng_key=key,
            root=root,
            recurrent_fn=recurrent,
            num_simulations=size.simulations,
            max_num_considered_actions=size.considered,
        )
        return output.action, output.action_weights, output.search_tree.node_values[:, 0], output.search_tree.embeddings

    obs = jax.random.normal(jax.random.PRNGKey(0), (size.roots, STATE_DIM))
    key = jax.random.PRNGKey(1)

    def run() -> None:
        jax.block_until_ready(policy(key, obs))

    return run


def measure(size: Size, kind: str, mctx: bool, bfloat16: bool, budget: float, clock: Callable[[], float]) -> dict[str, Any]:
    """
    :param kind: "free" or "state"
    :param budget: seconds to measure for, about
    :param clock: in seconds
    :return: a row
    """
    model: Any = FreeModel(size) if kind == "free" else state_network(size)
    ours, seconds, search = our_search(size, model, bfloat16, clock)
    runs: dict[str, Callable[[], None]] = {"ours_ms": ours, "tree_ms": tree_search(size)}
    if mctx and kind == "free":
        runs["mctx_ms"] = mctx_search(size)
    for run in runs.values():
        for _ in range(3):
            run()
    del seconds[:]
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    # In blocks, so that neither evicts the other's memory from the caches within its own searches
    while len(times["ours_ms"]) < 5 or (time.perf_counter() - begin < budget and len(times["ours_ms"]) < 2000):
        for name, run in runs.items():
            for _ in range(BLOCK):
                start = clock()
                run()
                times[name].append(1e3 * (clock() - start))
    median = {name: round(statistics.median(values), 4) for name, values in times.items()}
    assert search._workspace is not None
    return {
        "roots": size.roots,
        "simulations": size.simulations,
        "actions": size.actions,
        "inner_actions": size.inner_actions,
        "threads": th.get_num_threads(),
        "model": kind,
        "ours_ms": median["ours_ms"],
        "tree_ms": median["tree_ms"],
        "mctx_ms": median.get("mctx_ms"),
        "network_ms": round(1e3 * statistics.median(seconds), 4),
        "tree_mb": search._workspace.tree.nbytes / 1e6,
        "runs": len(times["ours_ms"]),
    }


COLUMNS = ("roots", "simulations", "actions", "inner_actions", "threads", "model", "ours_ms", "tree_ms", "mctx_ms")


def describe(row: dict[str, Any]) -> str:
    """One line for people."""
    size = " x ".join(str(row[name]) for name in ("roots", "simulations", "actions"))
    text = f"{row['model']:5} {size:15} inner {row['inner_actions']:2}"
    text += f"  ours {row['ours_ms']:9.3f} ms  tree {row['tree_ms']:7.3f} ms"
    if row["mctx_ms"] is not None:
        text += f"  mctx {row['mctx_ms']:9.3f} ms  ours/mctx {row['ours_ms'] / row['mctx_ms']:5.2f}"
    if row["network_ms"] > 0:
        rest = row["ours_ms"] - row["network_ms"]
        text += f"  network {row['network_ms']:8.3f} ms  rest {rest:6.3f} ms ({100 * rest / row['ours_ms']:.0f}%)"
    return text + f"  trees {row['tree_mb']:.1f} MB  ({row['runs']} runs)"


def main(arguments: list[str] | None = None) -> int:
    """:return: exit status"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=("free", "state"), default=["free", "state"])
    parser.add_argument("--sizes", nargs="+", type=parse_size, help="instead of the default ones")
    parser.add_argument("--bfloat16", action="store_true", help="see GumbelSearch")
    parser.add_argument("--no-mctx", action="store_true")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time of the process, for machines that are not quiet",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to, with machine, commit and what else is known")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be positive, not {options.threads}.")
    mctx = not options.no_mctx
    if options.threads == 1 and arguments is None:
        # Before JAX is imported. It keeps threads for more than matrix products; bound to one core they take turns.
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    th.set_num_threads(options.threads)
    if mctx:
        try:
            import mctx as _  # noqa: F401
        except ImportError:
            print("mctx is not installed: nothing to compare with (pip install mctx)")
            mctx = False
    for kind in options.models:
        sizes = options.sizes or [parse_size(text) for text in (FREE if kind == "free" else STATE)]
        for size in sizes:
            clock = time.perf_counter if options.clock == "wall" else time.process_time
            row = measure(size, kind, mctx, options.bfloat16, options.seconds, clock)
            print(json.dumps({name: row[name] for name in COLUMNS}) if options.json else describe(row), flush=True)
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a") as file:
                    more = {"clock": options.clock, "bfloat16": options.bfloat16, "machine": machine(), "commit": commit()}
                    file.write(json.dumps({**row, **more}) + "\n")
    if not options.json:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"peak memory of the process {peak:.0f} MB; {machine()}; {commit()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
