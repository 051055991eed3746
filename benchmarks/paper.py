"""
The scores that the paper prints: ``paper_scores.csv``, Tables 1 and 2 of EfficientZero V2 (https://arxiv.org/abs/2403.00564).

A row per task and benchmark, with the paper's name of the task, its environment id and a column per method; an empty cell is
not printed there. The rows of means and medians are not kept: of several methods (EZ-V2, DreamerV3 and all of
the control suite) the tables' own cells have other ones.
"""

import csv
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("paper_scores.csv")

#: The kinds of benchmarks, the first words of the file's names of them.
BENCHMARKS = ("proprio", "vision", "atari")

#: The method that the paper is about.
OURS = "EZ-V2"

#: The highest return of a task of the control suite: 1,000 steps with a reward of at most 1.
CONTROL_SUITE_BEST = 1000.0


@cache
def _table(benchmark: str) -> dict[str, dict[str, float]]:
    """:return: by environment id: the printed scores by method"""
    if benchmark not in BENCHMARKS:
        raise ValueError(f"There is no benchmark '{benchmark}' of the paper, but {', '.join(BENCHMARKS)}.")
    with FILE.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"].lower().startswith(benchmark)]
    methods = [name for name in rows[0] if name not in ("benchmark", "task", "env_id")]
    return {row["env_id"]: {name: float(row[name]) for name in methods if row[name]} for row in rows}


def _id(task: str) -> str:
    """The id of the file: ``ALE/Pong-v5`` for ``PongNoFrameskip-v4``."""
    game, is_old_id, _ = task.partition("NoFrameskip-v")
    return f"ALE/{game}-v5" if is_old_id else task


def methods(benchmark: str) -> list[str]:
    """
    :param benchmark: one of :data:`BENCHMARKS`
    :return: names of the methods that the paper has scores of
    :raises ValueError: no such benchmark
    """
    return list(dict.fromkeys(name for scores in _table(benchmark).values() for name in scores))


def score(benchmark: str, task: str, method: str = OURS) -> float | None:
    """
    :param benchmark: one of :data:`BENCHMARKS`
    :param task: environment id
    :param method: one of :func:`methods`
    :return: the printed score; None if there is none
    :raises ValueError: no such benchmark or method
    """
    if method not in methods(benchmark):
        raise ValueError(f"The paper has no scores of '{method}' there, but of {', '.join(methods(benchmark))}.")
    return _table(benchmark).get(_id(task), {}).get(method)


def normalised(task: str, value: float) -> float:
    """
    :param task: environment id of the control suite or of an Atari game of the paper
    :param value: a return
    :return: the return divided by 1,000 (control suite), or as a share of the way from random to human play (Atari)
    :raises ValueError: another task, for which nothing is agreed
    """
    if task.startswith("dm_control/"):
        return value / CONTROL_SUITE_BEST
    random, human = score("atari", task, "Random"), score("atari", task, "Human")
    if random is None or human is None:
        raise ValueError(f"Scores are aggregated over tasks of the control suite or the paper's Atari games, not of {task}.")
    return (value - random) / (human - random)
