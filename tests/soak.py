"""
The long form of the tests of surviving: ``make soak``, about a quarter of an hour on two cores.

Kills a training process at random moments and loads what it leaves, interrupts training by Ctrl-C, breaks off and continues
runs, damages files, limits their size, and watches memory, open files and threads. Prints what was tried and what failed; the
exit status is 1 if anything did.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch as th
from resume_tools import CASES, STEPS, go_on
from stable_baselines3.common.env_util import make_vec_env
from test_guards import check_consistent
from test_long_runs import live, make, memory_growth
from test_saving import bad_files, kill_while_training

from sb3_ezv2 import EZV2


def kills(count: int, folder: Path) -> tuple[int, list[str]]:
    """SIGKILL at random moments of training and saving. :return: kills, and what went wrong"""
    lost = []
    for trial in range(count):
        path, known = kill_while_training(folder / str(trial), random.uniform(0, 1.0))
        try:
            assert path is not None, "no file was left"
            model = EZV2.load_checkpoint(path, env="CartPole-v1", device="cpu")
            assert model.num_timesteps >= known, f"step {model.num_timesteps} was left, but step {known} had been saved"
            assert model.replay_buffer is not None and model.replay_buffer.total_transitions == model.num_timesteps
            model.learn(8, reset_num_timesteps=False)
            check_consistent(model)
        except Exception as error:
            lost.append(f"kill {trial}: {type(error).__name__}: {error}")
    return count, lost


def interrupts(count: int, folder: Path) -> tuple[int, list[str]]:
    """Ctrl-C at random moments of one long training. :return: interrupts, and what went wrong"""
    wrong = []
    model = make(make_vec_env("CartPole-v1", 2), gradient_steps=2)
    for trial in range(count):
        timer = threading.Timer(random.uniform(0.2, 1.0), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            model.learn(1_000_000, reset_num_timesteps=trial == 0)
            wrong.append(f"interrupt {trial}: learn() ended by itself")
        except KeyboardInterrupt:
            try:
                check_consistent(model)
                assert model.replay_buffer is not None and model.replay_buffer.total_transitions == model.num_timesteps
            except AssertionError:
                wrong.append(f"interrupt {trial}: {traceback.format_exc()}")
    return count, wrong


def resumes(count: int, folder: Path) -> tuple[int, list[str]]:
    """Runs broken off at random moments and in random ways. :return: breaks, and what was not as in the whole run"""
    wrong, breaks = [], 0
    whole = {}
    for trial in range(count):
        name = sorted(CASES)[trial % len(CASES)]
        if name not in whole:
            whole[name] = go_on(name, folder, [])
        part = folder / str(trial)
        part.mkdir()
        stops = sorted((at, random.choice(("middle", "step", "rollout"))) for at in random.sample(range(2, STEPS - 4), 4))
        result: dict = {}
        for _ in range(len(stops) + 1):
            result = result or go_on(name, part, stops)
            breaks += 1
        different = [key for key in whole[name] if result.get(key) != whole[name][key]]
        if different:
            wrong.append(f"{name}, broken off at {stops}: {', '.join(different)}")
    return breaks, wrong


def bad_inputs(count: int, folder: Path) -> tuple[int, list[str]]:
    """Damaged files: an agent, or a ValueError. :return: loads, and what crashed otherwise"""
    crashes = []
    paths = [path for path, _ in bad_files(make().learn(50), folder).values()]
    content = bytearray((folder / "good.zip").read_bytes())
    for trial in range(count):
        damaged = bytearray(content)
        kind = trial % 3
        start = random.randrange(len(content))
        if kind == 0:
            del damaged[start:]
        elif kind == 1:
            damaged[start] ^= 1 << random.randrange(8)
        else:
            damaged[start : start + 500] = random.randbytes(min(500, len(content) - start))
        path = folder / f"damaged{trial}.zip"
        path.write_bytes(damaged)
        paths.append(path)
    for path in paths:
        try:
            EZV2.load_checkpoint(path, env="CartPole-v1", device="cpu")
        except ValueError:
            pass
        except Exception as error:
            crashes.append(f"{path.name}: {type(error).__name__}: {error}")
    return len(paths), crashes


def full_disks(count: int, folder: Path) -> tuple[int, list[str]]:
    """Files that may not grow as large as they would. :return: savings, and files that were not as before"""
    wrong = []
    model = make().learn(60)
    path = folder / "agent.zip"
    model.save_checkpoint(path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for trial in range(count):
        resource.setrlimit(resource.RLIMIT_FSIZE, (random.randrange(len(before) - 100), limits[1]))
        try:
            model.save_checkpoint(path)
            wrong.append(f"saving {trial} did not fail")
        except OSError:
            pass
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if path.read_bytes() != before or len(list(folder.iterdir())) != 1:
            wrong.append(f"saving {trial} left something else")
    return count, wrong


def memory(steps: int, folder: Path) -> tuple[int, list[str]]:
    """:return: steps, and what grew"""
    growth, seen = memory_growth(steps, max(1, steps // 60))
    print(f"    memory from {seen[0] / 1e6:.1f} to {seen[-1] / 1e6:.1f} MB, last third over first {growth / 1e6:+.1f} MB")
    return steps, [f"{growth / 1e6:.1f} MB"] if growth > 4e6 else []


def cycles(count: int, folder: Path) -> tuple[int, list[str]]:
    """:return: cycles of making, training and deleting, and what grew"""
    counts = live(count)
    first, last = counts[min(5, count - 1)], counts[-1]
    print(f"    after cycle {min(6, count)}: open files, threads, bytes {first}; after the last {last}")
    names = ("open files", "threads", "bytes")
    return count, [n for n, a, b, room in zip(names, first, last, (0, 0, 6_000_000)) if b > a + room]


PARTS: dict[str, tuple[Callable[[int, Path], tuple[int, list[str]]], int, str]] = {
    "kills": (kills, 50, "agents lost"),
    "interrupts": (interrupts, 50, "agents broken"),
    "resumes": (resumes, 21, "differences"),
    "bad inputs": (bad_inputs, 300, "crashes"),
    "full disks": (full_disks, 50, "files lost"),
    "cycles": (cycles, 50, "growths"),
    "steps": (memory, 50_000, "growths"),
}


def main() -> int:
    """:return: exit status"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--share", type=float, default=1.0, help="share of the numbers of trials (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the random moments (default: another one each time)")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    random.seed(seed)
    th.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process may have been told to ignore it
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    print(f"seed {seed}")
    failed = False
    for name in options.only:
        function, count, what = PARTS[name]
        start = time.perf_counter()
        moments = random.getstate()
        with tempfile.TemporaryDirectory() as folder:
            tried, wrong = function(max(3, round(options.share * count)), Path(folder))
        random.setstate(moments)
        print(f"{name}: {tried} tried, {what}: {len(wrong)}   ({time.perf_counter() - start:.0f} s)", flush=True)
        for line in wrong:
            print(f"    {line}", flush=True)
        failed = failed or bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
