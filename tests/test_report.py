"""The report: pages filled from results, the paper's scores, and aggregates."""

import csv
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import aggregates, paper, plots, report, tables

ROOT = Path(report.__file__).parents[1]
SWINGUP, WALKER = "dm_control/cartpole-swingup-v0", "dm_control/walker-walk-v0"
# (step, mean) of evaluations
CURVES = {0: [(10, 1.0), (20, 4.0)], 1: [(10, 3.0), (20, 6.0)]}


def write(
    folder: Path,
    curve: list[tuple[int, float]],
    seed: int = 0,
    label: str = "ezv2",
    task: str = SWINGUP,
    planned: int = 20,
    **more: Any,
) -> None:
    """A results file."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{task.replace('/', '_')}_{label}_seed{seed}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, plots.COLUMNS)
        writer.writeheader()
        for step, mean in curve:
            row = dict(task=task, algo="ezv2", label=label, seed=seed, step=step, mean=mean, std=1.26, episodes=10)
            row |= dict(train_seconds=step / 2, eval_seconds=1, recorded="", machine="m", commit="abc1234")
            writer.writerow({**row, "settings": f"steps={planned} policy=MlpPolicy", **more})


def filled(tmp_path: Path, marker: str, draw: bool = True) -> list[str]:
    """The lines of what a block asks for, of the results in ``tmp_path / "results"``."""
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n\n<!-- {marker} -->\nold\n<!-- end -->\n\nAfter.\n")
    text = report.fill(page, tmp_path / "results", draw)
    start, end = f"Before.\n\n<!-- {marker} -->\n\n", "\n\n<!-- end -->\n\nAfter.\n"
    assert text.startswith(start) and text.endswith(end)
    return text[len(start) : -len(end)].splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_per_run(tmp_path: Path) -> None:
    out = tmp_path / "results" / "one"
    write(out, CURVES[0])
    write(out, CURVES[1][:1], seed=1, commit="def5678", recorded='{"search/reused": 0.97512}')
    assert filled(tmp_path, "table: one") == [
        "| seed | 10 | 20 | training, s | commit |",
        "|---|---|---|---|---|",
        "| 0 | 1.0 ± 1 | 4.0 ± 1 | 10 | abc1234 |",
        "| 1 | 3.0 ± 1 |  | 5 | def5678 |",
    ]
    lines = filled(tmp_path, "table: one steps=20,1000 std=2 recorded=search/reused,no/such seeds=1")
    assert lines[0] == "| seed | 20 | 1,000 | training, s | search/reused | no/such | commit |"
    assert lines[2] == "| 1 |  |  | 5 | 0.975 |  | def5678 |"
    # Time up to what is shown, not to the end of the run
    assert filled(tmp_path, "table: one steps=10 seeds=0")[2] == "| 0 | 1.0 ± 1 | 5 | abc1234 |"
    write(out, [(20, 2.0)], label="other")
    write(out, [(20, 2.0)], task=WALKER)
    lines = filled(tmp_path, "table: one head=variant names=other:another only=another,ezv2")
    assert lines[0].startswith("| task | variant | seed | 10 |")
    assert [cells(line)[:3] for line in lines[2:]] == [
        [SWINGUP, "another", "0"],
        [SWINGUP, "ezv2", "0"],
        [SWINGUP, "ezv2", "1"],
        [WALKER, "ezv2", "0"],
    ]


def test_a_row_per_variant(tmp_path: Path) -> None:
    for seed, curve in CURVES.items():
        write(tmp_path / "results" / "a" / "on", curve, seed)
    write(tmp_path / "results" / "a" / "off", CURVES[0])
    write(tmp_path / "results" / "a" / "off", CURVES[1][:1], seed=1, commit="def5678")
    assert filled(tmp_path, "table: a/* form=labels by=folder head=cache") == [
        "| cache | seeds | 10 | 20 | training, s | commit |",
        "|---|---|---|---|---|---|",
        "| off | 2 | 2.0 [1.0, 3.0] | 4.0 (1 of 2) | 8 | abc1234, def5678 |",
        "| on | 2 | 2.0 [1.0, 3.0] | 5.0 [4.0, 6.0] | 10 | abc1234 |",
    ]
    lines = filled(tmp_path, "table: a/* form=labels by=folder head=cache steps=10")
    assert lines[3] == "| on | 2 | 2.0 [1.0, 3.0] | 5 | abc1234 |"


def test_a_row_per_task_beside_the_paper(tmp_path: Path) -> None:
    for seed, curve in CURVES.items():
        write(tmp_path / "results" / "p", curve, seed)
    write(tmp_path / "results" / "p", CURVES[1][:1], seed=2)
    # The last of several environments makes more steps than planned
    write(tmp_path / "results" / "p", [(10, 7.0), (24, 8.0)], label="sac")
    write(tmp_path / "results" / "p", [(30, 9.0)], task="CartPole-v1", planned=30)
    assert filled(tmp_path, "table: p form=final paper=proprio:EZ-V2,TD-MPC2 only=ezv2,sac") == [
        "| task | steps | ezv2 | sac | EZ-V2 (paper) | TD-MPC2 (paper) |",
        "|---|---|---|---|---|---|",
        "| CartPole-v1 | 30 | 9.0, 1 seed |  |  |  |",
        f"| {SWINGUP} | 20 | 5.0 [4.0, 6.0], 2 seeds (seeds at 10) | 8.0, 1 seed | 805.4 | 826.7 |",
    ]
    assert filled(tmp_path, f"table: p form=final at=10 tasks={SWINGUP} only=sac")[2] == f"| {SWINGUP} | 10 | 7.0, 1 seed |"


def test_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def draw(*arguments: Any) -> None:
        seen.append(arguments)
        drawn(*arguments)

    drawn = plots.draw
    monkeypatch.setattr(plots, "draw", draw)
    for task in (SWINGUP, WALKER, "CartPole-v1"):
        write(tmp_path / "results" / "p", CURVES[0], task=task)
    marker = "curves: p file=images/all.png x=train_seconds threshold=5 paper=proprio names=ezv2:EZV2"
    assert filled(tmp_path, marker, draw=False) == ["![Learning curves](images/all.png)"]
    assert not seen and not (tmp_path / "images").exists()
    filled(tmp_path, marker)
    assert (tmp_path / "images" / "all.png").read_bytes().startswith(b"\x89PNG")
    rows, _, by, x, threshold, references = seen[0]
    assert {row["name"] for row in rows} == {"EZV2"} and (by, x, threshold) == ("name", "train_seconds", 5)
    assert references == {SWINGUP: {"EZ-V2 (paper)": 805.4}, WALKER: {"EZ-V2 (paper)": 944.0}, "CartPole-v1": {}}
    assert filled(tmp_path, f"curves: p file=one.png tasks={WALKER}") == [f"![{WALKER}](one.png)"]


def test_dashed_lines_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    write(tmp_path, CURVES[0])
    rows = plots.read_rows([tmp_path])
    plots.draw(rows, tmp_path / "x.png", references={SWINGUP: {"paper": 805.4, "other": 7.0}, WALKER: {"no": 1.0}})
    lines = {line.get_label(): line for line in figures[0].axes[0].get_lines()}
    assert set(lines) == {"ezv2 (1 seed)", "paper", "other"}
    assert list(lines["paper"].get_ydata()) == [805.4, 805.4] and lines["paper"].get_linestyle() == "--"


@pytest.mark.parametrize(
    ("marker", "sentence"),
    [
        ("table: nowhere", "line 3: There is no folder nowhere in"),
        ("table: ", "No folder is named."),
        ("table: empty", "There are no results in"),
        ("table: p colour=red", "table has no option 'colour', but by, names, only, tasks, seeds, paper, form, head, steps"),
        ("curves: p", "curves needs file=..."),
        ("table: p form=round", "form must be one of runs, labels, final, not round."),
        ("table: p steps=many", "steps=many must be whole numbers with commas between."),
        ("table: p form=final at=1,2", "at=1,2 must be one whole number."),
        ("table: p by=size", "Runs cannot be compared by 'size', but by task,"),
        ("table: p by=none", "There are two runs of dm_control/cartpole-swingup-v0 with seed 0 named ''"),
        ("table: p only=sac", "only: there is no 'sac', but ezv2, other."),
        ("table: p seeds=7", "There are no runs that the block asks for."),
        ("table: p names=old", "names=old is not of the form old:new,old:new."),
        ("table: p form=final paper=go", "There is no benchmark 'go' of the paper, but proprio, vision, atari."),
        (
            "table: p form=final paper=proprio:PPO",
            "The paper has no scores of 'PPO' there, but of SAC, TD-MPC2, DreamerV3, EZ-V2.",
        ),
        ("aggregates: c file=x.png", "not of CartPole-v1."),
        ("aggregates: p file=x.png at=1000", "There is no task of which every one of ezv2, other has a finished run."),
    ],
)
def test_what_there_is_not_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], marker: str, sentence: str
) -> None:
    results = tmp_path / "results"
    (results / "empty").mkdir(parents=True)
    for label in ("ezv2", "other"):
        write(results / "p", CURVES[0], label=label)
    write(results / "c", CURVES[0], task="CartPole-v1")
    page = tmp_path / "page.md"
    page.write_text(f"a\n\n<!-- {marker} -->\n<!-- end -->\n")
    with pytest.raises(SystemExit) as error:
        report.main([str(page), "--results", str(results)])
    assert error.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]
    assert "<!-- end -->" in page.read_text()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a\n<!-- table: p -->\n", "the last block has no <!-- end -->."),
        ("a\n<!-- end -->\n", "line 2: <!-- end --> where a block should be."),
        ("<!-- table: p -->\n<!-- table: p -->\n<!-- end -->\n", "line 2: <!-- table: p --> where an end should be."),
    ],
)
def test_markers_come_in_pairs(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match=sentence.replace("...", ".")):
        report.fill(tmp_path / "page.md", tmp_path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "p", CURVES[0])
    page = tmp_path / "page.md"
    page.write_text("<!-- table: p -->\n<!-- end -->\n")
    line = [str(page), "--results", str(tmp_path)]
    assert report.main([*line, "--check"]) == 1 and page.read_text() == "<!-- table: p -->\n<!-- end -->\n"
    assert report.main(line) == 0 and "Blocks filled" in capsys.readouterr().out
    assert "| 0 | 1.0 ± 1 | 4.0 ± 1 | 10 | abc1234 |" in page.read_text()
    assert report.main([*line, "--check"]) == 0


def test_finished_tables_of_the_documentation_are_what_the_results_say(tmp_path: Path) -> None:
    if not report.RESULTS.exists():
        pytest.skip("the results are not in a source distribution")
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("results.md", "results_history.md")]
    blocks = {match.group(2).split()[0]: match.group() for text in pages for match in report._BLOCK.finditer(text)}
    page = tmp_path / "page.md"
    for folder in ("cartpole-500-starts", "pendulum-earlier", "swingup", "cache", "catch"):
        page.write_text(blocks[folder])
        assert report.fill(page, draw=False) == blocks[folder]


# --- the paper's scores ------------------------------------------------------------------------------------------------


def test_scores_of_the_paper() -> None:
    assert paper.score("proprio", SWINGUP) == 805.4 and paper.score("vision", SWINGUP) == 747.8
    assert paper.score("proprio", "dm_control/hopper-hop-v0", "SAC") == 0.1
    assert paper.score("atari", "ALE/Asterix-v5") == paper.score("atari", "AsterixNoFrameskip-v4") == 61810.0
    assert paper.score("atari", "ALE/UpNDown-v5", "DreamerV3") is None and paper.score("proprio", "CartPole-v1") is None
    assert paper.methods("proprio") == ["SAC", "TD-MPC2", "DreamerV3", "EZ-V2"]
    assert paper.methods("vision") == ["CURL", "DrQ-v2", "DreamerV3", "EZ-V2"]
    sizes = {"proprio": 20, "vision": 20, "atari": 26}
    assert {benchmark: len(paper._table(benchmark)) for benchmark in paper.BENCHMARKS} == sizes
    for benchmark, size in sizes.items():
        for method in paper.methods(benchmark):
            missing = 1 if (benchmark, method) == ("atari", "DreamerV3") else 0
            assert sum(method in scores for scores in paper._table(benchmark).values()) == size - missing


@pytest.mark.parametrize(
    ("method", "mean", "median"),
    [
        ("Random", 0.0, 0.0),
        ("Human", 1.0, 1.0),
        ("SimPLe", 0.443, 0.144),
        ("CURL", 0.381, 0.175),
        ("DrQ", 0.357, 0.268),
        ("SPR", 0.704, 0.415),
        ("MuZero", 0.562, 0.227),
        ("EfficientZero", 1.945, 1.090),
        ("BBF", 2.247, 0.917),
    ],
)
def test_atari_scores_give_the_printed_means(method: str, mean: float, median: float) -> None:
    # A check of every cell of these columns and of Random and Human. The table's means of EZ-V2 (2.428, 1.286) and
    # DreamerV3 are not those of its cells.
    values = [paper.normalised(task, scores[method]) for task, scores in paper._table("atari").items()]
    assert statistics.mean(values) == pytest.approx(mean, abs=0.0025)
    assert statistics.median(values) == pytest.approx(median, abs=0.0006)


def test_control_suite_scores_are_near_the_printed_means() -> None:
    # Near: the printed means are not those of the printed scores, in any column (723.2 where the scores give 727.4)
    for benchmark, printed in {
        "proprio": {"SAC": 552.0, "TD-MPC2": 740.9, "DreamerV3": 517.1, "EZ-V2": 723.2},
        "vision": {"CURL": 437.3, "DrQ-v2": 410.3, "DreamerV3": 498.5, "EZ-V2": 726.1},
    }.items():
        for method, mean in printed.items():
            values = [scores[method] for scores in paper._table(benchmark).values()]
            assert statistics.mean(values) == pytest.approx(mean, rel=0.04)
    assert statistics.median(scores["EZ-V2"] for scores in paper._table("proprio").values()) == pytest.approx(800.4)


def test_the_papers_tasks_are_those_of_the_configuration() -> None:
    yaml = pytest.importorskip("yaml")
    from sb3_ezv2.zoo import CONFIGS

    for benchmark, file in (("proprio", "ezv2.yml"), ("vision", "ezv2_vision.yml")):
        with paper.FILE.open(newline="") as scores:
            rows = [row for row in csv.DictReader(scores) if row["benchmark"].lower().startswith(benchmark)]
        entries = yaml.safe_load((CONFIGS / file).read_text())
        assert {row["env_id"] for row in rows} == {task for task in entries if task.startswith("dm_control/")}
        for row in rows:
            assert row["benchmark"].endswith(f" {entries[row['env_id']]['n_timesteps'] // 1000}k")


def test_normalised_scores() -> None:
    assert paper.normalised(SWINGUP, 805.4) == pytest.approx(0.8054)
    assert paper.normalised("PongNoFrameskip-v4", 20.8) == pytest.approx((20.8 + 20.7) / (14.6 + 20.7))


# --- aggregates --------------------------------------------------------------------------------------------------------


def test_aggregates(tmp_path: Path) -> None:
    pytest.importorskip("rliable")
    results = tmp_path / "results" / "p"
    for seed, (swingup, walker) in enumerate([(700, 900), (800, 950), (840, 910)]):
        write(results, [(20, swingup)], seed)
        if seed < 2:
            write(results, [(20, walker)], seed, task=WALKER)
    write(results, [(20, 500)], task="dm_control/hopper-hop-v0")
    for task in (SWINGUP, WALKER):
        write(results, [(20, 600.0)], label="sac", task=task)
    state = np.random.get_state()
    lines = filled(tmp_path, "aggregates: p file=x.png paper=proprio")
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), state))
    assert cells(lines[0]) == ["algorithm", "runs of each task", "mean", "median", "IQM", "optimality gap"]
    ours, sac, printed = (cells(line) for line in lines[2:5])
    # Two runs of each task: mean (0.75 + 0.925) / 2, IQM the mean of 0.8 and 0.9
    assert [cell.split()[0] for cell in ours] == ["ezv2", "2", "0.838", "0.838", "0.850", "0.163"]
    low, high = (float(end) for end in ours[2].split(" ", 1)[1].strip("[]").split(", "))
    assert (low, high) == (0.8, 0.875)
    assert sac == ["sac", "1", "0.600", "0.600", "0.600", "0.400"]
    assert printed == ["EZ-V2 (paper)", "", "0.875", "0.875", "", ""]
    assert lines[6].startswith(f"2 tasks ({SWINGUP}, {WALKER}), returns divided by 1,000. In brackets: 95% stratified")
    for sentence in (
        "One run of each task has no confidence interval: sac.",
        "Left out, because not all have a finished run of them: dm_control/hopper-hop-v0.",
        "Of ezv2 only the first 2 of up to 3 seeds are in",
    ):
        assert sentence in lines[6]
    assert lines[8] == "![mean, median, IQM, optimality gap](x.png)"
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    # The bootstrap draws the same each time
    assert filled(tmp_path, "aggregates: p file=x.png paper=proprio", draw=False) == lines


def test_one_run_of_each_task_has_no_interval(tmp_path: Path) -> None:
    pytest.importorskip("rliable")
    write(tmp_path / "results" / "p", [(20, 10.0)], task="ALE/Breakout-v5")
    lines = filled(tmp_path, "aggregates: p file=x.png paper=vision", draw=False)
    assert len(lines) == 7 and "[" not in lines[2] and "In brackets" not in lines[4]
    assert (
        lines[4] == "1 task (ALE/Breakout-v5), human-normalised scores. One run of each task has no confidence interval: ezv2."
    )


def test_intervals_grow_with_the_spread_and_contain_the_value() -> None:
    pytest.importorskip("rliable")
    rng = np.random.default_rng(0)
    matrices = {name: 0.5 + std * rng.standard_normal((5, 4)) for name, std in (("narrow", 0.01), ("wide", 0.1))}
    found = aggregates.aggregate(matrices, repetitions=500)
    widths = {}
    for name, result in found.items():
        assert result.runs == 5 and result.intervals is not None and result.intervals.shape == (2, 4)
        assert (result.intervals[0] <= result.values).all() and (result.values <= result.intervals[1]).all()
        widths[name] = result.intervals[1] - result.intervals[0]
    assert (widths["wide"] > 3 * widths["narrow"]).all()


def test_without_rliable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rliable", None)
    write(tmp_path / "p", CURVES[0])
    page = tmp_path / "page.md"
    page.write_text("<!-- aggregates: p file=x.png -->\n<!-- end -->\n")
    with pytest.raises(SystemExit):
        report.main([str(page), "--results", str(tmp_path)])
    assert "Aggregates are made by rliable, which is not installed: pip install rliable" in capsys.readouterr().err


def test_runs_that_have_only_begun_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "p", [])
    write(tmp_path / "p", CURVES[0], seed=1)
    assert [curve.seed for curve in tables.read_curves([tmp_path / "p"])] == [1]
