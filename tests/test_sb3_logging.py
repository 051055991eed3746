"""TensorBoard, CSV, JSON and standard output."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from sb3_agents import agent, vec_env
from stable_baselines3.common.logger import configure

KEYS = {
    "rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps",
    "train/loss", "train/reward_loss", "train/policy_loss", "train/value_loss", "train/consistency_loss",
    "train/policy_entropy", "train/value_error", "train/grad_norm", "train/learning_rate",
    "target/td_value", "target/search_value", "target/search_share", "target/value_clipped",
    "target/reward_clipped",
    "search/acting_value", "search/acting_depth", "search/root_value", "search/depth", "search/policy_entropy",
    "search/reused", "search/network_value", "search/searched_states",
}  # fmt: skip
"""What is logged everywhere."""

COUNTERS = {"time/episodes", "time/time_elapsed", "time/total_timesteps", "train/n_updates"}
"""As in SB3, not in TensorBoard, which has a clock and steps of its own."""


def test_csv_and_json(tmp_path: Path) -> None:
    model = agent(env=vec_env(length=4))
    model.set_logger(configure(str(tmp_path), ["csv", "json", "log"]))
    model.learn(28, log_interval=2)
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    # at every second episode's end, before the updates of that step
    assert [(row["time/total_timesteps"], row["time/episodes"]) for row in rows] == [(8, 2), (16, 4), (24, 6)]
    assert "train/loss" not in rows[0] and [row["train/n_updates"] for row in rows[1:]] == [5, 13]
    for row in rows[1:]:
        assert row.keys() == KEYS | COUNTERS
        assert all(math.isfinite(value) for value in row.values())
        assert row["rollout/ep_len_mean"] == 4
    lines = (tmp_path / "progress.csv").read_text().splitlines()
    assert set(lines[0].split(",")) == KEYS | COUNTERS and len(lines) == 4
    last = dict(zip(lines[0].split(","), lines[-1].split(",")))
    assert {key: float(value) for key, value in last.items()} == pytest.approx(rows[-1])
    assert "train/" in (tmp_path / "log.txt").read_text()


def test_tensorboard_runs_and_their_names(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = agent(env=vec_env(length=4), tensorboard_log=str(tmp_path))
    model.learn(20, log_interval=1, tb_log_name="first")
    model.learn(8, log_interval=1, tb_log_name="first", reset_num_timesteps=False)  # the same curve goes on
    model.learn(12, log_interval=1, tb_log_name="first")
    model.learn(4, log_interval=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first_1", "first_2", "run_1"]
    run = accumulator.EventAccumulator(str(tmp_path / "first_1")).Reload()
    assert set(run.Tags()["scalars"]) == KEYS
    assert [event.step for event in run.Scalars("rollout/ep_len_mean")] == [4, 8, 12, 16, 20, 24, 28]
    assert [event.step for event in run.Scalars("train/loss")] == [12, 16, 20, 24, 28]
    run = accumulator.EventAccumulator(str(tmp_path / "first_2")).Reload()
    assert [event.step for event in run.Scalars("rollout/ep_len_mean")] == [4, 8, 12]


def test_a_logger_of_ones_own_replaces_tensorboard(tmp_path: Path) -> None:
    model = agent(env=vec_env(length=4), tensorboard_log=str(tmp_path / "tensorboard"), verbose=0)
    logger = configure(str(tmp_path / "own"), ["json"])
    model.set_logger(logger)
    model.learn(8, log_interval=1)
    assert model.logger is logger and not (tmp_path / "tensorboard").exists()
    assert len((tmp_path / "own" / "progress.json").read_text().splitlines()) == 2


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_verbose(verbose: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = agent(env="CartPole-v1", verbose=verbose)
    printed = capsys.readouterr().out
    assert printed.splitlines() == [
        "Using cpu device", "Creating environment from the given name 'CartPole-v1'",
        "Wrapping the env with a `Monitor` wrapper", "Wrapping the env in a DummyVecEnv.",
    ][: 4 * bool(verbose)]  # fmt: skip
    model.learn(60, log_interval=1)
    printed = capsys.readouterr().out
    if verbose == 0:
        assert printed == ""
    else:
        assert printed.startswith("Replay buffer: 0.00 GB when full\n")
        for name in ("rollout/", "ep_rew_mean", "time/", "total_timesteps", "train/", "value_loss", "search/", "target/"):
            assert name in printed


@pytest.mark.parametrize("window", [1, 3])
def test_stats_window_size(window: int) -> None:
    model = agent(env=vec_env(length=2), stats_window_size=window).learn(10)
    assert model.ep_info_buffer is not None and model.ep_info_buffer.maxlen == window
    assert len(model.ep_info_buffer) == window and model.ep_success_buffer is not None
    assert model.ep_success_buffer.maxlen == window


def test_logged_values_are_means_since_the_last_time(tmp_path: Path) -> None:
    """A line of the log tells of all of its updates, not of the last one."""
    losses: list[float] = []
    model = agent(env=vec_env(length=4))
    count = model._count

    def spy(stats: dict) -> None:  # type: ignore[type-arg]
        if "train/loss" in stats:
            losses.append(float(stats["train/loss"]))
        count(stats)

    model._count = spy  # type: ignore[method-assign]
    model.set_logger(configure(str(tmp_path), ["json"]))
    model.learn(24, log_interval=2)
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert rows[1]["train/loss"] == pytest.approx(sum(losses[:5]) / 5)
    assert rows[2]["train/loss"] == pytest.approx(sum(losses[5:13]) / 8)
