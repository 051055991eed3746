"""benchmarks.model: what it measures is what it says, and it reads agents of Box and Discrete actions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch as th

from benchmarks import model as benchmark
from benchmarks.envs import make_vec_env
from sb3_ezv2 import EZV2

SIZES = dict(net_arch=[16], state_dim=16, n_blocks=1, projection_dim=16)


def test_explained_variance() -> None:
    x = th.randn(2000, 5, generator=th.Generator().manual_seed(0))
    mixed = x @ th.arange(10.0).reshape(5, 2) + 3
    assert benchmark.explained(x, mixed) > 0.999
    assert benchmark.explained(x[:, :1], x[:, 1:]) < 0.01
    noisy = x[:, :1] + x[:, 1:2]
    assert benchmark.explained(x[:, :1], noisy) == pytest.approx(0.5, abs=0.05)


def test_rank_correlation() -> None:
    x = np.array([3.0, 1.0, 2.0, 5.0])
    assert benchmark.rank_correlation(x, np.exp(x)) == pytest.approx(1.0)
    assert benchmark.rank_correlation(x, -x) == pytest.approx(-1.0)
    assert np.isnan(benchmark.rank_correlation(x, np.ones(4)))


def test_the_simulator_makes_the_candidates() -> None:
    agent = EZV2("MlpPolicy", make_vec_env("Pendulum-v1", 1), n_simulations=4, seed=0, device="cpu", policy_kwargs=SIZES)
    env, copies = make_vec_env("Pendulum-v1", 1), make_vec_env("Pendulum-v1", 3)
    env.seed(0)
    env.reset()
    for action in (0.5, -1.0):
        obs, *_ = env.step(np.full((1, 1), action, np.float32))
    assert isinstance(obs, np.ndarray)
    assert all(copy.restore(env.envs[0].snapshot()) for copy in copies.envs)  # type: ignore[attr-defined]
    rewards, values = benchmark.simulate(agent, copies, th.tensor([[-1.0], [0.0], [0.5]]), 4)
    angle, torque = np.arctan2(obs[0, 1], obs[0, 0]), 2 * np.array([-1.0, 0.0, 0.5])  # actions are scaled to [-1, 1]
    expected = -(angle**2 + 0.1 * obs[0, 2] ** 2 + 0.001 * torque**2)
    np.testing.assert_allclose(rewards[0], expected, rtol=1e-5)
    assert rewards.shape == (4, 3) and len(set(rewards[2])) == 3 and values.shape == (3,)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_a_saved_agent(env_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = EZV2(
        "MlpPolicy", make_vec_env(env_id, 1), learning_starts=200, batch_size=8, n_simulations=4, seed=0, device="cpu",
        policy_kwargs=SIZES,
    ).learn(205)  # fmt: skip
    folder = tmp_path / "run_step205"
    folder.mkdir()
    agent.save(folder / "agent.zip")
    agent.save_replay_buffer(folder / "replay_buffer.pkl")
    benchmark.main([str(tmp_path), "--env", env_id, "--states", "2", "--horizon", "5"])
    printed = capsys.readouterr().out
    steps = [line for line in printed.splitlines() if line.startswith(("  1:", "  5:"))]
    assert len(steps) == 4 and "2 states of its episodes, 5 steps" in printed
    linear = [float(line.split()[-1]) for line in steps]
    for first, fifth in (linear[:2], linear[2:]):  # stored, and of new episodes: the dynamics are nearly linear in one step
        assert 0.8 < first <= 1 and fifth <= first
    values = dict(line.strip().rsplit(": ", 1) for line in printed.splitlines() if ": " in line and "correlation of r" in line)
    assert len(values) == 3
    assert all(-1 <= float(value) <= 1 for value in values.values() if value not in ("-", "nan"))
    with pytest.raises(SystemExit):
        benchmark.main([str(tmp_path / "nothing"), "--env", env_id])
