"""
What EZV2 in RL Zoo costs: a study's wall time, its memory from trial to trial, and the start of Python.

    python -m benchmarks.zoo study
    python -m benchmarks.zoo memory
    python -m benchmarks.zoo startup

Each prints its result and appends a row for each value to ``benchmarks/results/zoo.csv``. ``startup`` needs the package
installed.
"""

import argparse
import csv
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import commit, machine

RESULTS = Path(__file__).resolve().parent / "results" / "zoo.csv"

STUDY = "--algo ezv2 --env CartPole-v1 -optimize --n-startup-trials 1 --sampler tpe --pruner median --no-optim-plots"


def study(trials: int, steps: int, seed: int) -> dict[str, float]:
    """Wall time of the command in a process of its own, imports included, in seconds."""
    arguments = f"{STUDY} --n-trials {trials} -n {steps} --n-evaluations 2 --seed {seed}".split()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "sb3_ezv2.zoo", "train", *arguments, "-f", folder], check=True)
        return {"wall time, s": time.perf_counter() - start}


def memory(trials: int, steps: int, seed: int) -> dict[str, float]:
    """Resident memory of the process after each trial, in MB."""
    from sb3_ezv2 import zoo

    zoo.register()
    from rl_zoo3.exp_manager import ExperimentManager
    from rl_zoo3.train import train

    sizes: list[float] = []
    objective = ExperimentManager.objective

    def measured(self: Any, trial: Any) -> float:
        # At a trial's start all that belongs to the one before is gone
        sizes.append(resident_memory())
        return objective(self, trial)

    ExperimentManager.objective = measured  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        # One more, at whose start the last is gone, and before RL Zoo's report on the study imports what it needs
        arguments = f"{STUDY} --n-trials {trials + 1} -n {steps} --n-evaluations 2 --seed {seed} --pruner none".split()
        sys.argv = ["train", *arguments, "-f", folder]
        train()
    return {f"memory after {trial} trials, MB": size for trial, size in enumerate(sizes)}


def resident_memory() -> float:
    """In MB, from Linux' /proc; what the allocator keeps of freed memory is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def startup(repeats: int) -> dict[str, float]:
    """Median time of ``python -c pass`` with the .pth file at work and switched off, taking turns, in milliseconds."""
    times: dict[str, list[float]] = {"": [], "1": []}
    for _ in range(repeats):
        for switch, seconds in times.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", "pass"], env={**os.environ, "SB3_EZV2_NO_ZOO": switch}, check=True)
            seconds.append(time.perf_counter() - start)
    on, off = (1000 * statistics.median(seconds) for seconds in times.values())
    code = (
        "import time; start = time.perf_counter(); import sb3_ezv2_zoo_hook; sb3_ezv2_zoo_hook.install(); "
        "print(1000 * (time.perf_counter() - start))"
    )
    environment = {**os.environ, "SB3_EZV2_NO_ZOO": "1"}
    runs = [
        float(subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout)
        for _ in range(repeats)
    ]
    return {
        "Python's start, ms": on,
        "Python's start with SB3_EZV2_NO_ZOO=1, ms": off,
        "the hook, ms": statistics.median(runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["study", "memory", "startup"])
    parser.add_argument("--trials", type=int, help="default: 4 for the time, 10 for the memory")
    parser.add_argument("--steps", type=int, default=1000, help="of each trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=50, help="starts of Python")
    args = parser.parse_args()
    settings = f"{args.trials or 4} trials of {args.steps} steps"
    start = time.perf_counter()
    if args.what == "study":
        values = study(args.trials or 4, args.steps, args.seed)
    elif args.what == "memory":
        settings = f"{args.trials or 10} trials of {args.steps} steps"
        values = memory(args.trials or 10, args.steps, args.seed)
    else:
        settings = f"median of {args.repeats} starts"
        values = startup(args.repeats)
    wall = time.perf_counter() - start
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(["what", "value", "settings", "seed", "wall_seconds", "machine", "commit"])
        for what, value in values.items():
            print(f"{what}: {value:.2f}")
            writer.writerow([what, f"{value:.2f}", settings, args.seed, f"{wall:.1f}", machine(), commit()])


if __name__ == "__main__":
    main()
