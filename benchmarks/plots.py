"""
Learning curves and summary tables from the CSV files of :mod:`benchmarks.learn`.

``python -m benchmarks.plots benchmarks/results/cartpole -o curves.png --threshold 475``
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

#: Columns of a results file, in order. One row is one evaluation.
COLUMNS = (
    "task",
    "algo",
    "label",
    "seed",
    "step",
    "mean",
    "std",
    "episodes",
    "train_seconds",
    "eval_seconds",
    "recorded",
    "machine",
    "commit",
    "settings",
)
_INTEGERS = ("seed", "step", "episodes")
_FLOATS = ("mean", "std", "train_seconds", "eval_seconds")

Row = dict[str, Any]


def read_rows(paths: Iterable[str | Path]) -> list[Row]:
    """
    Read results files.

    :param paths: CSV files, or folders whose CSV files are all read
    :return: one dictionary per evaluation, numbers converted
    """
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.glob("*.csv")) if path.is_dir() else [path]
    rows: list[Row] = []
    for file in files:
        with open(file, newline="", encoding="utf-8") as handle:
            reader = csv.DictReader(handle)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise ValueError(f"{file} is no results file of benchmarks.learn: it lacks the column '{missing[0]}'.")
            for line in reader:
                row: Row = dict(line)
                row.update({name: int(line[name]) for name in _INTEGERS})
                row.update({name: float(line[name]) for name in _FLOATS})
                rows.append(row)
    return rows


def _grouped(rows: Iterable[Row], key: str) -> dict[Any, list[Row]]:
    """Rows by the value of a column, in order of appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _seeds(rows: Iterable[Row]) -> dict[int, list[Row]]:
    """Rows by seed, each seed's in order of steps."""
    return {seed: sorted(group, key=lambda row: row["step"]) for seed, group in sorted(_grouped(rows, "seed").items())}


def draw(
    rows: Sequence[Row],
    picture: str | Path,
    by: str = "label",
    x: str = "step",
    threshold: float | None = None,
    references: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """
    Draw learning curves: one panel per task, one colour per group, thin lines for the seeds, a thick one for their
    mean and a band from their minimum to their maximum.

    :param rows: from :func:`read_rows`
    :param picture: the image file to write; its ending decides the format
    :param by: the column whose values are compared
    :param x: ``"step"`` or ``"train_seconds"``
    :param threshold: if given, a horizontal line
    :param references: by task: known returns with their names, dashed horizontal lines with a place in the legend
    """
    if not rows:
        raise ValueError("There are no evaluations to draw.")
    tasks = _grouped(rows, "task")
    columns = 2 if len(tasks) == 4 else min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    # A Figure by itself, without pyplot: pictures go to files, a display need not exist.
    figure = Figure(figsize=(5.6 * columns, 3.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    names = list(_grouped(rows, by))
    colours = {name: matplotlib.colormaps["tab10"](index % 10) for index, name in enumerate(names)}
    for axis, (task, of_task) in zip(axes.flat, tasks.items(), strict=False):
        for name, of_name in _grouped(of_task, by).items():
            seeds = _seeds(of_name)
            for seed_rows in seeds.values():
                several = len(seeds) > 1
                axis.plot(
                    [row[x] for row in seed_rows],
                    [row["mean"] for row in seed_rows],
                    color=colours[name],
                    linewidth=0.8 if several else 2.0,
                    alpha=0.5 if several else 1.0,
                    marker=None if several else "o",
                    markersize=3,
                    label=None if several else f"{name} (1 seed)",
                )
            if len(seeds) > 1:
                # Only where every seed was evaluated: a mean over fewer seeds would jump when one of them ends.
                common = sorted(set.intersection(*({row["step"] for row in group} for group in seeds.values())))
                table = {seed: {row["step"]: row for row in group} for seed, group in seeds.items()}
                # means, xs: [seeds, evaluations]
                means = np.array([[table[seed][step]["mean"] for step in common] for seed in seeds])
                xs = np.array([[table[seed][step][x] for step in common] for seed in seeds]).mean(axis=0)
                label = f"{name} ({len(seeds)} seeds)"
                axis.plot(xs, means.mean(axis=0), color=colours[name], linewidth=2.2, marker="o", markersize=3.5, label=label)
                axis.fill_between(xs, means.min(axis=0), means.max(axis=0), color=colours[name], alpha=0.15, linewidth=0)
        if threshold is not None:
            axis.axhline(threshold, color="grey", linewidth=0.8, linestyle="--")
        for (name, value), grey in zip((references or {}).get(task, {}).items(), ("black", "dimgrey", "darkgrey", "silver")):
            axis.axhline(value, color=grey, linewidth=1.2, linestyle="--", label=name)
        axis.set_title(task)
        axis.set_xlabel("environment steps" if x == "step" else "seconds of training")
        axis.set_ylabel(f"mean return of {', '.join(str(n) for n in _grouped(of_task, 'episodes'))} episodes")
        axis.grid(alpha=0.25)
        axis.legend(fontsize="small")
    for axis in list(axes.flat)[len(tasks) :]:
        axis.set_visible(False)
    picture = Path(picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def summary(rows: Sequence[Row], by: str = "label", threshold: float | None = None) -> str:
    """
    A Markdown table with a line per seed.

    :param rows: from :func:`read_rows`
    :param by: the column whose values are compared
    :param threshold: if given, two columns more: the first step at which the mean return reaches it, and the first
        step from which every later evaluation reaches it
    :return: the table
    """
    head = ["task", by, "seed", "steps", "final mean ± std", "best mean", "worst mean", "training s", "evaluation s"]
    if threshold is not None:
        head += [f"first ≥ {threshold:g}", f"held ≥ {threshold:g} from"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task, of_task in _grouped(rows, "task").items():
        for name, of_name in _grouped(of_task, by).items():
            for seed, of_seed in _seeds(of_name).items():
                last, means = of_seed[-1], [row["mean"] for row in of_seed]
                cells = [task, name, seed, last["step"], f"{last['mean']:.1f} ± {last['std']:.1f}"]
                cells += [f"{max(means):.1f}", f"{min(means):.1f}"]
                cells += [f"{last['train_seconds']:.0f}", f"{last['eval_seconds']:.0f}"]
                if threshold is not None:
                    reached = [mean >= threshold for mean in means]
                    first = of_seed[reached.index(True)]["step"] if any(reached) else "-"
                    # After the last failure; index len(means) says that the last evaluation failed.
                    held = max((index + 1 for index, good in enumerate(reached) if not good), default=0)
                    cells += [first, of_seed[held]["step"] if held < len(of_seed) else "-"]
                lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description="Compare results of benchmarks.learn.")
    parser.add_argument("results", nargs="+", help="CSV files, or folders of them")
    parser.add_argument("-o", "--output", help="the picture to write; without it only the table is printed")
    parser.add_argument("--by", default="label", choices=COLUMNS, help="the column whose values are compared")
    parser.add_argument("--x", default="step", choices=("step", "train_seconds"), help="the horizontal axis")
    parser.add_argument("--threshold", type=float, help="a return to reach: a line in the picture, two columns in the table")
    options = parser.parse_args(arguments)
    try:
        rows = read_rows(options.results)
        if not rows:
            raise ValueError("There are no evaluations in " + ", ".join(options.results) + ".")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(summary(rows, options.by, options.threshold))
    if options.output:
        draw(rows, options.output, options.by, options.x, options.threshold)
        print(f"\nCurves: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
