"""
Aggregates over tasks as Agarwal et al. recommend them (https://arxiv.org/abs/2108.13264): mean, median, interquartile mean and
optimality gap of normalised scores, with stratified bootstrap confidence intervals, by their library ``rliable``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks import paper
from benchmarks.tables import Curve, budget, markdown, ordered

METRICS = ("mean", "median", "IQM", "optimality gap")
REPETITIONS = 10_000


@dataclass(frozen=True)
class Aggregate:
    """
    Of one algorithm.

    :param runs: of each task
    :param values: shape (4,), in the order of :data:`METRICS`
    :param intervals: shape (2, 4), the ends of the 95% confidence intervals; None for a single run of each task
    """

    runs: int
    values: np.ndarray
    intervals: np.ndarray | None


def scores(curves: Sequence[Curve], at: int | None = None) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """
    Normalised scores at the end of the budget.

    :param curves: the runs
    :param at: the budget in steps; None: the steps that a task's first run was to make
    :return: by name: scores of shape (runs, tasks); the tasks; what was left out, a sentence each
    :raises ValueError: no task has a run of every name that reached the budget, or a task has no normalisation
    """
    names, tasks = ordered(curve.name for curve in curves), ordered(curve.task for curve in curves)
    # by name and task: scores in the order of the seeds
    table: dict[str, dict[str, list[float]]] = {name: {task: [] for task in tasks} for name in names}
    for curve in sorted(curves, key=lambda curve: curve.seed):
        if (row := curve.at(budget(curves, curve.task, at))) is not None:
            table[curve.name][curve.task].append(paper.normalised(curve.task, row["mean"]))
    common = [task for task in tasks if all(table[name][task] for name in names)]
    if not common:
        raise ValueError(f"There is no task of which every one of {', '.join(names)} has a finished run.")
    left_out = []
    if len(common) < len(tasks):
        missing = ", ".join(task for task in tasks if task not in common)
        left_out.append(f"Left out, because not all have a finished run of them: {missing}.")
    matrices = {}
    for name in names:
        runs = min(len(table[name][task]) for task in common)
        most = max(len(table[name][task]) for task in common)
        if runs < most:
            left_out.append(f"Of {name} only the first {runs} of up to {most} seeds are in, so that all tasks have as many.")
        matrices[name] = np.array([table[name][task][:runs] for task in common]).T
    return matrices, common, left_out


def aggregate(matrices: Mapping[str, np.ndarray], repetitions: int = REPETITIONS) -> dict[str, Aggregate]:
    """
    :param matrices: by name: normalised scores of shape (runs, tasks)
    :param repetitions: of the bootstrap
    :return: the aggregates by name
    :raises ImportError: rliable is not installed
    """
    try:
        from rliable import library, metrics
    except ImportError as error:
        raise ImportError(
            f"Aggregates are made by rliable, which is not installed: pip install rliable, or 'sb3-ezv2[zoo]' ({error})."
        ) from error

    def of(matrix: np.ndarray) -> np.ndarray:
        functions = (
            metrics.aggregate_mean,
            metrics.aggregate_median,
            metrics.aggregate_iqm,
            metrics.aggregate_optimality_gap,
        )
        return np.array([function(matrix) for function in functions])

    result = {}
    # rliable draws from numpy's global generator whatever generator it is given
    state = np.random.get_state()
    try:
        for name, matrix in matrices.items():
            intervals = None
            if len(matrix) > 1:
                np.random.seed(0)
                intervals = library.get_interval_estimates({name: matrix}, of, reps=repetitions)[1][name]
            result[name] = Aggregate(len(matrix), of(matrix), intervals)
    finally:
        np.random.set_state(state)
    return result


def printed(tasks: Sequence[str], benchmark: str, method: str) -> tuple[float, float] | None:
    """
    :param tasks: environment ids
    :param benchmark: of :mod:`benchmarks.paper`
    :param method: of the paper
    :return: mean and median over the tasks of the paper's normalised scores; None if it lacks one of them
    :raises ValueError: no such benchmark or method
    """
    values = [paper.score(benchmark, task, method) for task in tasks]
    known = [paper.normalised(task, value) for task, value in zip(tasks, values) if value is not None]
    return (float(np.mean(known)), float(np.median(known))) if len(known) == len(tasks) else None


def table(
    aggregates: Mapping[str, Aggregate],
    tasks: Sequence[str],
    benchmark: str | None = None,
    methods: Sequence[str] = (paper.OURS,),
) -> str:
    """
    :param aggregates: from :func:`aggregate`
    :param tasks: that they are over
    :param benchmark: of :mod:`benchmarks.paper`; None: without the paper's scores
    :param methods: of the paper; it has no scores of single runs, so that only means and medians can be made
    :return: the table and a paragraph that says what is in it
    :raises ValueError: no such benchmark or method
    """
    lines: list[list[object]] = [["algorithm", "runs of each task", *METRICS]]
    for name, found in aggregates.items():
        cells: list[object] = [name, found.runs]
        for index, value in enumerate(found.values):
            ends = "" if found.intervals is None else " [{:.3f}, {:.3f}]".format(*found.intervals[:, index])
            cells.append(f"{value:.3f}{ends}")
        lines.append(cells)
    for method in methods if benchmark else ():
        means = printed(tasks, benchmark or "", method)
        if means is not None:
            lines.append([f"{method} (paper)", "", f"{means[0]:.3f}", f"{means[1]:.3f}", "", ""])
    is_control_suite = all(task.startswith("dm_control/") for task in tasks)
    scale = "returns divided by 1,000" if is_control_suite else "human-normalised scores"
    single = [name for name, found in aggregates.items() if found.intervals is None]
    sentences = [f"{len(tasks)} task{'s' * (len(tasks) > 1)} ({', '.join(tasks)}), {scale}."]
    if len(single) < len(aggregates):
        sentences.append(
            f"In brackets: 95% stratified bootstrap confidence intervals over runs, {REPETITIONS:,} resamples; "
            "of few runs they are too narrow."
        )
    if single:
        sentences.append(f"One run of each task has no confidence interval: {', '.join(single)}.")
    return markdown(lines) + "\n\n" + " ".join(sentences)


def draw(aggregates: Mapping[str, Aggregate], picture: Path) -> None:
    """
    A panel per metric, a line per algorithm: its value, and the confidence interval if it has one.

    :param aggregates: from :func:`aggregate`
    :param picture: the image file to write
    """
    figure = Figure(figsize=(12, 1.2 + 0.45 * len(aggregates)), layout="constrained")
    axes = figure.subplots(1, len(METRICS), sharey=True)
    for index, (axis, metric) in enumerate(zip(axes, METRICS)):
        for height, found in enumerate(aggregates.values()):
            colour = matplotlib.colormaps["tab10"](height % 10)
            if found.intervals is not None:
                low, high = found.intervals[:, index]
                axis.barh(height, high - low, left=low, height=0.5, color=colour, alpha=0.35)
            axis.plot([found.values[index]] * 2, [height - 0.25, height + 0.25], color=colour, linewidth=1.5)
        axis.set_title(metric + (" (lower is better)" if metric == "optimality gap" else ""), fontsize="medium")
        axis.set_xlabel("normalised score")
        # From 0, and to 1 at least: limits around the values would make any difference look large
        axis.set_xlim(min(0.0, axis.get_xlim()[0]), max(1.0, axis.get_xlim()[1]))
        axis.grid(alpha=0.25, axis="x")
    axes[0].set_yticks(range(len(aggregates)))
    axes[0].set_yticklabels(
        [f"{name} ({found.runs} run{'s' * (found.runs > 1)} of each task)" for name, found in aggregates.items()]
    )
    axes[0].set_ylim(len(aggregates) - 0.5, -0.5)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
