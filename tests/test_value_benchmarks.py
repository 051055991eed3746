"""benchmarks.held_out and benchmarks.reacher_map: returns of stored episodes, what a fit is read on, poses and maxima."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from benchmarks import held_out, reacher_map
from benchmarks.envs import make_env, make_vec_env
from sb3_ezv2 import EZV2

SIZES = dict(net_arch=[16], state_dim=16, n_blocks=1, projection_dim=16)


def saved(folder: Path, env_id: str, steps: int, action_repeat: int = 1) -> EZV2:
    """:return: an agent of random actions, saved in the folder"""
    env = make_vec_env(env_id, 1, action_repeat)
    agent = EZV2(
        "MlpPolicy", env, learning_rate=3e-3, learning_starts=steps, n_simulations=4, seed=0, device="cpu", policy_kwargs=SIZES
    )
    agent.learn(steps)
    folder.mkdir(exist_ok=True)
    agent.save(folder / "agent.zip")
    agent.save_replay_buffer(folder / "replay_buffer.pkl")
    return agent


def test_returns_of_stored_episodes(tmp_path: Path) -> None:
    buffer = saved(tmp_path, "CartPole-v1", 150).replay_buffer
    assert buffer is not None
    found = list(held_out.episodes(buffer, 0.9))
    lengths = [len(returns) for _, returns in found]
    assert 3 < len(found) and 120 < sum(lengths) < 150  # all that ended, not the one that was running
    for observations, returns in found:
        assert observations.shape == (len(returns), 4)
        # a reward of 1 until the pole falls
        expected = (1 - 0.9 ** np.arange(len(returns), 0, -1)) / 0.1
        np.testing.assert_allclose(returns, expected, rtol=1e-5)
        assert returns[-1] == 1 and observations[-1, 2].abs() > 0.1


def test_returns_that_time_limits_cut_short_are_left_out(tmp_path: Path) -> None:
    buffer = saved(tmp_path, "Pendulum-v1", 450).replay_buffer
    assert buffer is not None
    found = list(held_out.episodes(buffer, 0.9))
    assert [len(returns) for _, returns in found] == [200 - 38, 200 - 38]  # 0.9^38 < 2%
    assert not list(held_out.episodes(buffer, 0.999))


def test_fit_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, "Pendulum-v1", 1050)
    out = tmp_path / "results" / "rows.csv"
    arguments = [str(tmp_path), "--gamma", "0.5", "--noise", "0", "5", "--updates", "20", "400", "--out", str(out)]
    held_out.main(arguments)
    assert "4 episodes with 776 states, and 2 with 237" in capsys.readouterr().out
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["noise"], row["updates"]) for row in rows] == [("0.0", "20"), ("0.0", "400"), ("5.0", "20"), ("5.0", "400")]
    early, late, _, noisy = (float(row["train_r2"]) for row in rows)
    assert early < late and late > 0.8 and noisy < late  # with a discount of 0.5 a return is nearly the next reward
    assert float(rows[1]["test_r2"]) > 0.5 and all(row["commit"] and row["gamma"] == "0.5" for row in rows)
    with pytest.raises(SystemExit):
        held_out.main([str(tmp_path), "--gamma", "0.999"])
    assert "a lower --gamma may help" in capsys.readouterr().err


def test_local_maxima() -> None:
    values = np.zeros((4, 5))
    values[1, 1], values[1, 2], values[3, 3], values[3, 0] = 2.0, 1.0, 3.0, 4.0
    assert np.argwhere(reacher_map.local_maxima(values)).tolist() == [[1, 1], [3, 3]]
    assert not reacher_map.local_maxima(np.ones((3, 3))).any()


def test_reacher_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dm_control", reason="the control suite needs: pip install 'sb3-ezv2[dmc]'")
    env = make_env("dm_control/reacher-easy-v0")
    observations, on_target, start = reacher_map.poses(env, 3)
    first, _ = env.reset(seed=3)
    assert observations.shape == (on_target.size, 6) and first[:2] == pytest.approx(start)
    # the reward is the simulator's
    physics = env.unwrapped._env.physics  # type: ignore[attr-defined]
    rewards = []
    for row in (np.flatnonzero(on_target)[0], np.flatnonzero(on_target)[-1], 0):
        with physics.reset_context():
            physics.data.qpos[:] = observations[row, :2]
            physics.data.qvel[:] = 0
        rewards.append(env.unwrapped._env.task.get_reward(physics))  # type: ignore[attr-defined]
    assert rewards == [1.0, 1.0, 0.0] and 0.001 < on_target.mean() < 0.2
    saved(tmp_path, "dm_control/reacher-easy-v0", 20, action_repeat=2)
    picture = tmp_path / "pictures" / "map.png"
    reacher_map.main([str(tmp_path), "--starts", "2", "--out", str(picture)])
    assert picture.stat().st_size > 10_000
    # an untrained model expects no reward anywhere, and its values have no maxima
    assert "local maxima of the values outside of the target: 0, 0" in capsys.readouterr().out


def test_noise_is_of_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = saved(tmp_path, "Pendulum-v1", 30)
    observations, returns = 7 + 3 * th.randn(500, 3), th.randn(500)
    seen: list[th.Tensor] = []
    make = agent.policy._make_network

    def watched() -> Any:
        network: Any = make()
        network.representation.register_forward_pre_hook(lambda module, x: seen.append(x[0]) if module.training else None)
        return network

    monkeypatch.setattr(agent.policy, "_make_network", watched)
    variances = []
    for noise in (0.0, 0.0, 2.0):
        seen.clear()
        list(held_out.fit(agent, (observations, returns), (observations, returns), noise, [20], 0))
        assert len(seen) == 20
        variances.append(float(th.cat(seen).var()))
    # of normalised observations: 1, and noise of two deviations adds 4
    assert variances[0] == variances[1] == pytest.approx(1, abs=0.05) and variances[2] == pytest.approx(5, abs=0.2)
