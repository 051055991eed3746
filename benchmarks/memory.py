"""
Memory of a run's host process, when its replay buffer and its search cache are full::

    python -m benchmarks.memory --obs state image --out benchmarks/results/update/memory.jsonl

``state``: the paper's state model with 100,000 transitions, every state of which has been searched, and updates at batch 256.
``image``: the paper's Atari model with 100,000 stacked frames of 96x96x3 in 8 environments, and updates at batch 256, all in
the memory of this process. What an update takes of a device is counted by ``python -m benchmarks.image_memory``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from benchmarks.provenance import commit, machine
from benchmarks.update import IMAGE_ENVS, PAPER, PAPER_IMAGES, make_model, measure


def peak_gb() -> float:
    """:return: the most memory that this process has held"""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def state_run(transitions: int) -> None:
    """Fill the buffer and the cache, and make a few updates. :param transitions: in the buffer"""
    measure("state", {**PAPER, "buffer_size": transitions}, cache=True, updates=2, transitions=transitions)


def image_run(transitions: int) -> None:
    """Two updates with a full replay buffer. :param transitions: in the buffer"""
    model = make_model("image", {**PAPER_IMAGES, "buffer_size": transitions}, True, "cpu", transitions)
    buffer = model.replay_buffer
    assert buffer is not None
    fresh = buffer.take_fresh()
    buffer.update_priorities(fresh, np.ones(len(fresh)))  # their value errors would take half an hour
    model.learn(2 * IMAGE_ENVS, reset_num_timesteps=False)
    assert model._n_updates == 2, "an update of all environments' steps"


def run(obs: str, transitions: int) -> dict[str, Any]:
    """:param obs: ``"state"`` or ``"image"`` :return: a row"""
    before = peak_gb()
    (state_run if obs == "state" else image_run)(transitions)
    return {"obs": obs, "transitions": transitions, "libraries_gb": round(before, 3), "peak_gb": round(peak_gb(), 3)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--obs", nargs="+", choices=("state", "image"), default=["state", "image"])
    parser.add_argument("--transitions", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="file to append JSON objects to, one per line")
    options = parser.parse_args(arguments)
    th.set_num_threads(1)
    if len(options.obs) > 1:
        # A process of its own for each: a peak never falls
        rest = ["--transitions", str(options.transitions), *(["--out", str(options.out)] if options.out else [])]
        for obs in options.obs:
            subprocess.run([sys.executable, "-m", "benchmarks.memory", "--obs", obs, *rest], check=True)
        return
    row = run(options.obs[0], options.transitions)
    print(json.dumps(row), flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as file:
            file.write(json.dumps(row | {"machine": machine(), "commit": commit()}) + "\n")


if __name__ == "__main__":
    main()
