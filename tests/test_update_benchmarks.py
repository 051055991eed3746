"""The benchmarks of the update: their columns, their counts, and the memory of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch as th

import sb3_ezv2.ezv2 as algorithm
from benchmarks import memory, update

SIZES = dict(net_arch=[8], state_dim=8, n_blocks=1, projection_dim=8, action_embedding_dim=4)
KEYS = [
    "obs", "device", "batch", "cache", "sample_ms", "targets_ms", "search_ms", "forward_backward_ms", "optimizer_ms",
    "update_ms", "floor_ms",
]  # fmt: skip


def test_a_printed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(update, "COLLECTED", {"state": 150})
    monkeypatch.setattr(update, "PAPER", {"batch_size": 8, "n_simulations": 2, "policy_kwargs": SIZES})
    compute_losses, clip = algorithm.compute_losses, th.nn.utils.clip_grad_norm_
    command = ["--obs", "state", "--threads", "1", "--updates", "2", "--json", "--out", str(tmp_path / "rows.jsonl")]
    update.main(command)
    assert algorithm.compute_losses is compute_losses and th.nn.utils.clip_grad_norm_ is clip
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(row) for row in rows] == [KEYS, KEYS] and [row["cache"] for row in rows] == [False, True]
    for row in rows:
        assert row["obs"] == "state" and row["device"] == "cpu" and row["batch"] == 8
        parts = sum(row[name] for name in KEYS[4:9])
        assert 0 < row["floor_ms"] < row["update_ms"] and 0 < parts <= 1.5 * row["update_ms"]
        assert row["targets_ms"] > 0
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    # off: at most B * (U + 1) states; on: all had been searched but the newest
    assert 40 < kept[0]["searched_states"] <= 48 and kept[1]["searched_states"] <= 2 and "commit" in kept[1]
    assert kept[0]["transitions"] > 150 and kept[0]["acting_steps_per_s"] > 0


def test_counted_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose products can be added up by hand, up to those of its small parts."""
    monkeypatch.setattr(update, "COLLECTED", {"state": 150})
    model = update.make_model("state", {"batch_size": 16, "n_simulations": 3, "policy_kwargs": SIZES}, True, "cpu", 250)
    assert model.replay_buffer is not None and model.replay_buffer.size() == 250
    model.learn(3, reset_num_timesteps=False)
    rest, per_state = update.count_flops(model)
    weights = {
        name: sum(p.numel() for p in part.parameters() if p.dim() == 2) for name, part in model.policy.network.named_children()
    }
    heads = weights["value_head"] + weights["policy_head"]
    per_step = weights["dynamics"] + weights["reward_head"] + heads
    assert per_state == pytest.approx(2 * (weights["representation"] + heads + 3 * per_step))
    # forward once, backward twice (less for the first layer of what has no gradient beyond it)
    unrolled = 16 * (weights["representation"] + 5 * (weights["dynamics"] + weights["reward_head"]) + 6 * heads)
    projected = 16 * 5 * (weights["projection"] + weights["projection_predictor"])
    no_gradient = 16 * 5 * (weights["representation"] + weights["projection"])
    ends = 16 * 6 * (weights["representation"] + weights["value_head"])
    assert rest == pytest.approx(2 * (3 * (unrolled + projected) + no_gradient + ends), rel=0.03)


def test_memory_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory.main(["--obs", "image", "--transitions", "200", "--out", str(tmp_path / "memory.jsonl")])
    row = json.loads(capsys.readouterr().out)
    assert row["obs"] == "image" and row["transitions"] == 200 and 0 < row["libraries_gb"] <= row["peak_gb"] < np.inf
    assert json.loads((tmp_path / "memory.jsonl").read_text())["peak_gb"] == row["peak_gb"]
