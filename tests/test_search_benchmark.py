"""benchmarks/search.py at tiny sizes."""

import json

import pytest

from benchmarks import search

KEYS = ["roots", "simulations", "actions", "inner_actions", "threads", "model", "ours_ms", "tree_ms", "mctx_ms"]


def test_json_has_a_row_for_each_size_and_model(tmp_path, capsys):
    out = tmp_path / "folder" / "rows.jsonl"
    arguments = ["--sizes", "70x4x3", "3x4x5x2", "--no-mctx", "--seconds", "0.01", "--json", "--out", str(out)]
    assert search.main(arguments) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(row) for row in rows] == [KEYS] * 4
    assert [(row["model"], row["roots"], row["inner_actions"]) for row in rows] == [
        (model, roots, inner) for model in ("free", "state") for roots, inner in ((70, 3), (3, 2))
    ]
    for row in rows:
        assert row["threads"] == 1 and row["mctx_ms"] is None
        assert 0 < row["tree_ms"] < row["ours_ms"]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: row[key] for key in KEYS} for row in written] == rows
    for row in written:
        assert row["machine"] and row["commit"] and row["tree_mb"] > 0 and row["runs"] >= 5
        assert row["network_ms"] < row["ours_ms"]
        # Up to 64 roots of the state model are searched in C++ from beginning to end
        assert (row["network_ms"] == 0) == (row["model"] == "state" and row["roots"] == 3)


def test_beside_mctx(capsys):
    pytest.importorskip("mctx")
    assert search.main(["--sizes", "2x3x4", "--models", "free", "--seconds", "0.01"]) == 0
    text = capsys.readouterr().out
    assert "ours/mctx" in text and "peak memory" in text


@pytest.mark.parametrize("wrong", [["--sizes", "3x4"], ["--sizes", "0x4x5"], ["--threads", "0"], ["--models", "none"]])
def test_bad_input_is_refused(capsys, wrong):
    with pytest.raises(SystemExit):
        search.main(wrong)
    assert len(capsys.readouterr().err.splitlines()[-1]) < 200
