"""Markdown tables of the results of :mod:`benchmarks.learn`: a row per run, per variant, or per task."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import paper
from benchmarks.plots import COLUMNS, Row, read_rows

#: What runs can be compared by: a column of the results, the folder they are in, or nothing.
COMPARED_BY = (*COLUMNS, "folder", "none")


@dataclass(frozen=True)
class Curve:
    """
    One run.

    :param name: what it is called among those that it is compared with
    :param task: environment id
    :param seed: of the run
    :param planned: environment steps that it was to make
    :param rows: its evaluations in order of steps, at least one
    """

    name: str
    task: str
    seed: int
    planned: int
    rows: tuple[Row, ...]

    @property
    def last(self) -> Row:
        """The last evaluation."""
        return self.rows[-1]

    def at(self, step: int) -> Row | None:
        """
        :param step: of an evaluation; at the planned end also one that came some steps later, as with several environments
        :return: the evaluation, or None if the run has not come so far
        """
        exact = next((row for row in self.rows if row["step"] == step), None)
        return self.last if exact is None and step == self.planned <= self.last["step"] else exact


def read_curves(folders: Iterable[Path], by: str = "label", names: Mapping[str, str] | None = None) -> list[Curve]:
    """
    :param folders: of results files
    :param by: one of :data:`COMPARED_BY`; what the runs are called by
    :param names: other names for these
    :return: the runs, in the order of folders and files
    :raises ValueError: a folder without results, or two runs that nothing tells apart
    """
    if by not in COMPARED_BY:
        raise ValueError(f"Runs cannot be compared by '{by}', but by {', '.join(COMPARED_BY)}.")
    curves: list[Curve] = []
    for folder in folders:
        files = sorted(folder.glob("*.csv"))
        if not files:
            raise ValueError(f"There are no results in {folder}.")
        for file in files:
            rows = sorted(read_rows([file]), key=lambda row: row["step"])
            if not rows:
                continue  # of a run that has only begun
            first = rows[0]
            given = folder.name if by == "folder" else "" if by == "none" else str(first[by])
            name = (names or {}).get(given, given)
            planned = re.match(r"steps=(\d+) ", first["settings"])
            steps = int(planned.group(1)) if planned else rows[-1]["step"]
            curve = Curve(name, first["task"], first["seed"], steps, tuple(rows))
            if any((other.name, other.task, other.seed) == (name, curve.task, curve.seed) for other in curves):
                raise ValueError(
                    f"There are two runs of {curve.task} with seed {curve.seed} named '{name}': compare by=folder."
                )
            curves.append(curve)
    return curves


def ordered(values: Iterable[str]) -> list[str]:
    """:return: each value once, in the order of appearance"""
    return list(dict.fromkeys(values))


def markdown(lines: Sequence[Sequence[object]]) -> str:
    """
    :param lines: the cells of each line, the head first
    :return: the table
    """
    head, *rows = ("| " + " | ".join(map(str, cells)) + " |" for cells in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rows])


def _evaluations(curves: Iterable[Curve], steps: Sequence[int] | None) -> list[int]:
    """The steps that are columns."""
    return list(steps) if steps else sorted({row["step"] for curve in curves for row in curve.rows})


def _last_shown(curve: Curve, columns: Sequence[int]) -> Row:
    """:return: the latest evaluation that has a column; of a run without one, its last"""
    shown = (curve.at(step) for step in sorted(columns, reverse=True))
    return next((row for row in shown if row is not None), curve.last)


def _seconds(curves: Sequence[Curve], columns: Sequence[int]) -> str:
    """Mean seconds of training, up to the evaluations that are shown."""
    return f"{np.mean([_last_shown(curve, columns)['train_seconds'] for curve in curves]):.0f}"


def _commits(curves: Iterable[Curve]) -> str:
    return ", ".join(ordered(row["commit"] for curve in curves for row in curve.rows))


def runs_table(
    curves: Sequence[Curve],
    head: str = "label",
    steps: Sequence[int] | None = None,
    std_digits: int = 0,
    recorded: Collection[str] = (),
) -> str:
    """
    A row per run: the mean return and standard deviation over the episodes of its evaluations.

    :param curves: the runs
    :param head: what they are called by, for the table's head
    :param steps: of the evaluations that are shown; None: all
    :param std_digits: digits of the standard deviation after the point
    :param recorded: names of logged values, shown as they were at the last of these evaluations
    :return: the table
    """
    tasks, names = (ordered(values) for values in ([curve.task for curve in curves], [curve.name for curve in curves]))
    columns = _evaluations(curves, steps)
    first = ["task"] * (len(tasks) > 1) + [head] * (len(names) > 1)
    lines: list[list[object]] = [[*first, "seed", *(f"{step:,}" for step in columns), "training, s", *recorded, "commit"]]
    for curve in sorted(curves, key=lambda curve: (tasks.index(curve.task), names.index(curve.name), curve.seed)):
        cells: list[object] = [curve.task] * (len(tasks) > 1) + [curve.name] * (len(names) > 1) + [curve.seed]
        for row in map(curve.at, columns):
            cells.append("" if row is None else f"{row['mean']:.1f} ± {row['std']:.{std_digits}f}")
        cells.append(_seconds([curve], columns))
        values = json.loads(_last_shown(curve, columns)["recorded"] or "{}")
        cells += ["" if values.get(name) is None else f"{values[name]:.3g}" for name in recorded]
        lines.append([*cells, _commits([curve])])
    return markdown(lines)


def _mean_and_range(values: Sequence[float]) -> str:
    """``5.0 [4.0, 6.0]``; a single value by itself."""
    around = f" [{min(values):.1f}, {max(values):.1f}]" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{around}"


def labels_table(curves: Sequence[Curve], head: str = "label", steps: Sequence[int] | None = None) -> str:
    """
    A row per variant: the mean over its seeds, with the lowest and the highest. Where some seeds have no evaluation it
    says of how many the mean is.

    :param curves: the runs
    :param head: what the variants are called by, for the table's head
    :param steps: of the evaluations that are shown; None: all
    :return: the table
    """
    tasks = ordered(curve.task for curve in curves)
    columns = _evaluations(curves, steps)
    cells: list[object] = ["task"] * (len(tasks) > 1)
    lines = [[*cells, head, "seeds", *(f"{step:,}" for step in columns), "training, s", "commit"]]
    for task in tasks:
        for name in ordered(curve.name for curve in curves if curve.task == task):
            seeds = [curve for curve in curves if (curve.task, curve.name) == (task, name)]
            cells = [task] * (len(tasks) > 1) + [name, len(seeds)]
            for step in columns:
                means = [row["mean"] for curve in seeds if (row := curve.at(step)) is not None]
                some = f" ({len(means)} of {len(seeds)})" if 0 < len(means) < len(seeds) else ""
                cells.append(_mean_and_range(means) + some if means else "")
            lines.append([*cells, _seconds(seeds, columns), _commits(seeds)])
    return markdown(lines)


def budget(curves: Iterable[Curve], task: str, at: int | None) -> int:
    """
    :param curves: the runs
    :param task: of them
    :param at: the steps if they are given
    :return: the steps after which the runs of a task are compared: those that the first of them was to make
    """
    return next(curve.planned for curve in curves if curve.task == task) if at is None else at


def final_table(
    curves: Sequence[Curve], at: int | None = None, benchmark: str | None = None, methods: Sequence[str] = (paper.OURS,)
) -> str:
    """
    A row per task: the mean over the seeds at the end of the budget, with the lowest and the highest, and the paper's scores.

    :param curves: the runs; those of a task that have not reached its budget are told by the step they are at
    :param at: the budget in steps; None: the steps that the task's first run was to make
    :param benchmark: of :mod:`benchmarks.paper`; None: without the paper's scores
    :param methods: of the paper
    :return: the table
    :raises ValueError: no such benchmark or method
    """
    names = ordered(curve.name for curve in curves)
    columns = list(methods) if benchmark else []
    lines: list[list[object]] = [["task", "steps", *names, *(f"{method} (paper)" for method in columns)]]
    for task in ordered(curve.task for curve in curves):
        steps = budget(curves, task, at)
        cells: list[object] = [task, f"{steps:,}"]
        for name in names:
            seeds = [curve for curve in curves if (curve.task, curve.name) == (task, name)]
            means = [row["mean"] for curve in seeds if (row := curve.at(steps)) is not None]
            there = f"{_mean_and_range(means)}, {len(means)} seed{'s' * (len(means) > 1)}" if means else ""
            on_the_way = [f"{curve.last['step']:,}" for curve in seeds if curve.at(steps) is None]
            waiting = f"(seeds at {', '.join(on_the_way)})" if on_the_way else ""
            cells.append(" ".join(part for part in (there, waiting) if part))
        scores = [paper.score(benchmark, task, method) for method in columns] if benchmark else []
        lines.append([*cells, *("" if score is None else f"{score:.1f}" for score in scores)])
    return markdown(lines)
