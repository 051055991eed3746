"""
Fill a page of results from the CSV files of :mod:`benchmarks.learn`.

``python -m benchmarks.report docs/results.md``

Everything between a line ``<!-- table: FOLDER... OPTION=VALUE... -->`` and the next ``<!-- end -->`` is replaced by what it
asks for; the rest of the page stays as it is. ``curves:`` makes a picture and ``aggregates:`` a table and a picture. A folder
is one below ``benchmarks/results``, or a pattern (``paper/*``). The options are explained in the benchmarks' README.
``--check`` changes nothing and tells whether the page says what the results do.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import aggregates, paper, plots, tables
from benchmarks.tables import Curve, ordered

RESULTS = Path(__file__).parent / "results"

_BLOCK = re.compile(r"<!-- (table|curves|aggregates): (.*?) -->\n(.*?)<!-- end -->", re.DOTALL)
_MARKER = re.compile(r"<!-- (?:(?:table|curves|aggregates): .*?|end) -->")

#: Options of every block, and of each kind.
_SELECTION = ("by", "names", "only", "tasks", "seeds", "paper")
_OPTIONS = {
    "table": (*_SELECTION, "form", "head", "steps", "at", "std", "recorded"),
    "curves": (*_SELECTION, "file", "x", "threshold"),
    "aggregates": (*_SELECTION, "file", "at"),
}
FORMS = ("runs", "labels", "final")


@dataclass(frozen=True)
class Block:
    """
    What a marker asks for.

    :param kind: ``"table"``, ``"curves"`` or ``"aggregates"``
    :param folders: of results
    :param options: by name, as they are written
    """

    kind: str
    folders: tuple[Path, ...]
    options: dict[str, str]

    def parts(self, name: str) -> list[str]:
        """:return: an option's parts between commas"""
        return [part for part in self.options.get(name, "").split(",") if part]

    def numbers(self, name: str) -> list[int]:
        """
        :return: an option's numbers
        :raises ValueError: it has others
        """
        try:
            return [int(part) for part in self.parts(name)]
        except ValueError as error:
            raise ValueError(f"{name}={self.options[name]} must be whole numbers with commas between.") from error

    def number(self, name: str) -> int | None:
        """
        :return: an option's number; None if it is not there
        :raises ValueError: it is none
        """
        found = self.numbers(name)
        if len(found) > 1 or (name in self.options and not found):
            raise ValueError(f"{name}={self.options[name]} must be one whole number.")
        return found[0] if found else None

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """
        :return: an option's value; the first choice if it is not there
        :raises ValueError: it is none of the choices
        """
        value = self.options.get(name, choices[0])
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value}.")
        return value

    def paper(self) -> tuple[str | None, list[str]]:
        """:return: of ``paper=proprio:EZ-V2,SAC`` the benchmark and the methods; without methods EZ-V2 alone"""
        benchmark, _, methods = self.options.get("paper", "").partition(":")
        return benchmark or None, [name for name in methods.split(",") if name] or [paper.OURS]

    def curves(self) -> list[Curve]:
        """
        :return: the runs that the block is about
        :raises ValueError: there are none
        """
        pairs = [pair.partition(":") for pair in self.parts("names")]
        if not all(new for _, _, new in pairs):
            raise ValueError(f"names={self.options['names']} is not of the form old:new,old:new.")
        by = self.options.get("by", "label")
        curves = tables.read_curves(self.folders, by, {old: new for old, _, new in pairs})
        for option, values in (("only", [c.name for c in curves]), ("tasks", [c.task for c in curves])):
            if missing := [name for name in self.parts(option) if name not in values]:
                raise ValueError(f"{option}: there is no '{missing[0]}', but {', '.join(ordered(values))}.")
        curves = [
            curve
            for curve in curves
            if (not self.parts("only") or curve.name in self.parts("only"))
            and (not self.parts("tasks") or curve.task in self.parts("tasks"))
            and (not self.parts("seeds") or curve.seed in self.numbers("seeds"))
        ]
        if not curves:
            raise ValueError("There are no runs that the block asks for.")
        # In the order in which they are asked for
        order = self.parts("only") or ordered(curve.name for curve in curves)
        return sorted(curves, key=lambda curve: order.index(curve.name))


def parse(kind: str, words: str, results: Path) -> Block:
    """
    :param kind: of the block
    :param words: the rest of the marker
    :param results: folder of the folders
    :return: what it asks for
    :raises ValueError: no such folder or option
    """
    folders: list[Path] = []
    options: dict[str, str] = {}
    for word in shlex.split(words):
        name, is_option, value = word.partition("=")
        if is_option:
            if name not in _OPTIONS[kind]:
                raise ValueError(f"{kind} has no option '{name}', but {', '.join(_OPTIONS[kind])}.")
            options[name] = value
        else:
            found = sorted(path for path in results.glob(word) if path.is_dir())
            if not found:
                raise ValueError(f"There is no folder {word} in {results}.")
            folders += found
    if not folders:
        raise ValueError("No folder is named.")
    if kind != "table" and "file" not in options:
        raise ValueError(f"{kind} needs file=..., the picture to write, relative to the page.")
    return Block(kind, tuple(folders), options)


def _table(block: Block, page: Path | None) -> str:
    curves, steps = block.curves(), block.numbers("steps") or None
    head = block.options.get("head", block.options.get("by", "label"))
    form = block.choice("form", FORMS)
    if form == "runs":
        return tables.runs_table(curves, head, steps, block.number("std") or 0, block.parts("recorded"))
    if form == "labels":
        return tables.labels_table(curves, head, steps)
    return tables.final_table(curves, block.number("at"), *block.paper())


def _curves(block: Block, page: Path | None) -> str:
    curves = block.curves()
    benchmark, methods = block.paper()
    tasks = ordered(curve.task for curve in curves)
    references = {
        task: {f"{method} (paper)": score for method in methods if (score := paper.score(benchmark, task, method)) is not None}
        for task in tasks
        if benchmark
    }
    x, threshold = block.choice("x", ("step", "train_seconds")), block.number("threshold")
    if page is not None:
        rows = [{**row, "name": curve.name} for curve in curves for row in curve.rows]
        plots.draw(rows, page.parent / block.options["file"], "name", x, threshold, references)
    return f"![{tasks[0] if len(tasks) == 1 else 'Learning curves'}]({block.options['file']})"


def _aggregates(block: Block, page: Path | None) -> str:
    matrices, tasks, left_out = aggregates.scores(block.curves(), block.number("at"))
    found = aggregates.aggregate(matrices)
    if page is not None:
        aggregates.draw(found, page.parent / block.options["file"])
    text = " ".join([aggregates.table(found, tasks, *block.paper()), *left_out])
    return f"{text}\n\n![{', '.join(aggregates.METRICS)}]({block.options['file']})"


_MAKERS: dict[str, Callable[[Block, Path | None], str]] = {"table": _table, "curves": _curves, "aggregates": _aggregates}


def fill(page: Path, results: Path = RESULTS, draw: bool = True) -> str:
    """
    :param page: a Markdown file
    :param results: folder of the folders of results
    :param draw: make the pictures
    :return: the page's text with its blocks filled; the file stays as it is
    :raises ValueError: a marker without the other, or one that asks for what there is not, with its line
    :raises ImportError: rliable is needed and not installed
    """
    text = page.read_text(encoding="utf-8")

    def line(position: int) -> str:
        return f"{page}, line {text.count(chr(10), 0, position) + 1}"

    is_open = False
    for marker in _MARKER.finditer(text):
        if is_open != (marker.group() == "<!-- end -->"):
            raise ValueError(f"{line(marker.start())}: {marker.group()} where {'an end' if is_open else 'a block'} should be.")
        is_open = not is_open
    if is_open:
        raise ValueError(f"{page}: the last block has no <!-- end -->.")

    def filled(match: re.Match[str]) -> str:
        kind, words = match.group(1), match.group(2)
        try:
            content = _MAKERS[kind](parse(kind, words, results), page if draw else None)
        except ValueError as error:
            raise ValueError(f"{line(match.start())}: {error}") from error
        return f"<!-- {kind}: {words} -->\n\n{content}\n\n<!-- end -->"

    return _BLOCK.sub(filled, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    The command line; see the module's docstring.

    :param arguments: instead of the process's
    :return: exit status: 0, or 1 if ``--check`` found a page that is behind the results
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Fill a page from the results.")
    parser.add_argument("page", type=Path, help="Markdown file with blocks to fill")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the folders of results")
    parser.add_argument("--check", action="store_true", help="only tell whether the page is what the results say")
    options = parser.parse_args(arguments)
    try:
        before = options.page.read_text(encoding="utf-8")
        after = fill(options.page, options.results, draw=not options.check)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    if options.check:
        print(f"{options.page} " + ("is what the results say." if after == before else "is not what the results say."))
        return int(after != before)
    options.page.write_text(after, encoding="utf-8")
    print(f"Blocks filled in {options.page}: {len(_BLOCK.findall(after))}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
