"""
Work through a list of runs of ``benchmarks.learn``.

``python -m benchmarks.queue benchmarks/queue.txt --workers 2 --hours 8``

Each line of the file is a command line of ``benchmarks.learn`` without its first words, in the order of what it
teaches; empty lines and those that begin with ``#`` are skipped. Every seed of a line is a run of its own. Runs that
are finished are skipped, those that were stopped, by the time limit, by Ctrl-C or by a crash of the machine, go on
where they were. A line's own ``--threads`` and ``--save-every`` have precedence over the queue's. ``--list`` only says
how far each is. What the runs print goes to ``<out>/<name>.log``.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.learn import UNFINISHED, Run, parse
from benchmarks.plots import read_rows

#: Seconds that a run gets at the end of the time limit to save itself.
GRACE = 120


@dataclass
class Job:
    """
    One run of the list.

    :param arguments: of ``benchmarks.learn``, with one seed
    :param run: the same, parsed
    """

    arguments: list[str]
    run: Run

    def steps_done(self) -> int:
        """:return: step of the last evaluation that was written"""
        rows = read_rows([self.run.csv]) if self.run.csv.exists() else []
        return int(rows[-1]["step"]) if rows else 0

    def is_finished(self) -> bool:
        """:return: whether the evaluation at its end was written"""
        return self.steps_done() >= self.run.steps

    def start(self, seconds: float, threads: int, save_every: float) -> "subprocess.Popen[bytes]":
        """
        :param seconds: until it shall save itself and end
        :param threads: of torch, unless the line says another number
        :param save_every: seconds between checkpoints, unless the line says other ones
        :return: the process
        """
        command = [sys.executable, "-m", "benchmarks.learn", "--threads", str(threads), "--save-every", str(save_every)]
        # argparse takes the last of two: what the line says has precedence, but for the end of all runs
        command += [*self.arguments, "--time-limit", str(seconds)]
        self.run.out.mkdir(parents=True, exist_ok=True)
        with (self.run.out / f"{self.run.name}.log").open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def read_jobs(path: Path) -> list[Job]:
    """
    :param path: the list
    :return: its runs, in order
    :raises ValueError: a line that ``benchmarks.learn`` would refuse, or two runs with one result file
    """
    jobs: list[Job] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        try:
            runs = parse(words)
        except (ValueError, ImportError, SystemExit) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        for run in runs:
            # argparse takes the last of two --seeds
            job = Job([*words, "--seeds", str(run.seed)], run)
            if any(other.run.csv == run.csv for other in jobs):
                raise ValueError(f"{path}, line {number}: {run.csv} would be written by two runs; give one a --label.")
            jobs.append(job)
    return jobs


def work(jobs: Sequence[Job], workers: int, hours: float, threads: int, save_every: float) -> int:
    """
    Run what is unfinished, ``workers`` runs at a time.

    :return: number of runs that are not finished
    """
    end = time.monotonic() + 3600 * hours
    waiting = [job for job in jobs if not job.is_finished()]
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    try:
        while running or (waiting and time.monotonic() < end):
            while waiting and len(running) < workers and time.monotonic() < end:
                job = waiting.pop(0)
                process = job.start(max(1.0, end - time.monotonic()), threads, save_every)
                running.append((job, process))
                print(f"{time.strftime('%H:%M')} {job.run.name} from step {job.steps_done()}", flush=True)
            time.sleep(0.2)
            for job, process in [pair for pair in running if pair[1].poll() is not None]:
                running.remove((job, process))
                ended = {0: "is finished", UNFINISHED: "was stopped and can go on"}
                how = ended.get(process.returncode, f"failed with status {process.returncode}: see {job.run.name}.log")
                print(f"{time.strftime('%H:%M')} {job.run.name} {how}", flush=True)
    finally:
        # Ctrl-C reached the runs as well, and they save themselves
        for _, process in running:
            process.terminate()
        for job, process in running:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                print(f"{job.run.name} did not end within {GRACE} s: its last checkpoint counts", flush=True)
    return sum(not job.is_finished() for job in jobs)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    The command line; see the module's docstring.

    :param arguments: instead of the process's
    :return: exit status: 0, or that of ``benchmarks.learn`` for unfinished runs
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.queue", description="Work through a list of runs.")
    parser.add_argument("file", type=Path, help="the list: a command line of benchmarks.learn per line")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (default: %(default)s)")
    parser.add_argument("--hours", type=float, default=8.0, help="when to save everything and stop (default: %(default)s)")
    parser.add_argument("--save-every", type=float, default=600.0, help="seconds between checkpoints (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="only say how far each run is")
    options = parser.parse_args(arguments)
    for name in ("workers", "threads", "hours", "save_every"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(options, name)}.")
    try:
        jobs = read_jobs(options.file)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.list:
        for job in jobs:
            print(f"{job.steps_done():>8} of {job.run.steps:>8}  {job.run.out}/{job.run.name}")
        return 0
    # As Ctrl-C: the runs save themselves
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    left = work(jobs, options.workers, options.hours, options.threads, options.save_every)
    print(f"{len(jobs) - left} of {len(jobs)} runs are finished.")
    return UNFINISHED if left else 0


if __name__ == "__main__":
    sys.exit(main())
