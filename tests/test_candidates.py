"""benchmarks.candidates: what it says of policies that are trained by noisy searches."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from benchmarks import candidates


def test_without_noise_the_best_action_is_found() -> None:
    for fraction in (0.25, 1.0):
        found = candidates.train(fraction, 3.0, dimensions=2, noise=0.0, optimum=0.3)
        assert abs(found["mode"] - 0.3) < 0.05 and found["std"] < 0.3 and found["distance"] < 0.2 and found["full_forces"] == 0


def test_noise_alone_widens_the_policy_with_its_flattened_version() -> None:
    quarter, all_of_it = (candidates.train(x, 3.0, dimensions=1, noise=math.inf, optimum=0.0) for x in (0.25, 1.0))
    assert quarter["std"] > 2 > 1.6 > all_of_it["std"]
    assert quarter["full_forces"] > 0.5 > all_of_it["full_forces"]


def test_rows(tmp_path: Path) -> None:
    options = ["--fractions", "0.5", "--dimensions", "1", "--noise", "1", "--optima", "0.3", "0.5", "--updates", "3"]
    candidates.main([*options, "--out", str(tmp_path / "results" / "rows.csv")])
    with open(tmp_path / "results" / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["optimum"] for row in rows] == ["0.3", "0.5"] and all(row["commit"] for row in rows)
