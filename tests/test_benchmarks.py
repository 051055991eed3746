"""The benchmarks' own machinery: rows, going on after a stop, pictures, and the environments."""

import csv
import json
import pickle
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_checker import check_env

from benchmarks import demo, learn, plots
from benchmarks.checkpoints import alone
from benchmarks.envs import Resumable, make_env, make_vec_env
from sb3_ezv2 import EZV2

# Settings that make an agent tiny, as they are written on the command line
TINY = [
    "learning_starts:16",
    "batch_size:4",
    "n_simulations:3",
    "n_sampled_actions:2",
    "unroll_steps:2",
    "buffer_size:500",
    "policy_kwargs:dict(net_arch=[16], state_dim=8, n_blocks=1)",
]


@pytest.fixture(autouse=True)
def _keep_threads():
    threads = th.get_num_threads()
    yield
    th.set_num_threads(threads)


def command(out: Path, *more: str, env: str = "CartPole-v1", steps: int = 40, every: int = 15) -> list[str]:
    """A command line of a tiny run."""
    line = ["--env", env, "--steps", str(steps), "--eval-every", str(every), "--episodes", "2", "--threads", "1"]
    return [*line, "--out", str(out), "--params", *TINY, *more]


def measured(path: Path) -> list[dict[str, str]]:
    """The rows of a file, without what may differ between equal runs."""
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in csv.DictReader(file)]


class StopAt:
    """Stands in for the clock: the time is up when it has been asked ``calls`` times."""

    def __init__(self, calls: int):
        self.calls = calls

    def now(self) -> bool:
        self.calls -= 1
        return self.calls == 0


def run_of(line: list[str]) -> learn.Run:
    """The run that a command line describes."""
    return learn._runs(learn._parser().parse_args(line))[0]


def test_a_run_is_made_by_one_process_at_a_time(tmp_path, capsys):
    line = command(tmp_path)
    with alone(tmp_path, run_of(line).name):
        with pytest.raises(SystemExit):
            learn.main(line)
        assert "another process is at the run" in capsys.readouterr().err
        assert list(tmp_path.glob("*.csv")) == []
        assert learn.main([*line, "--label", "other"]) == 0
    assert learn.main(line) == 0
    assert list(tmp_path.glob(".*")) == []


def test_rows(tmp_path, capsys):
    line = command(tmp_path, "--seeds", "0", "1", "--record", "rollout/ep_rew_mean", "--threshold", "475")
    assert learn.main(line) == 0
    for seed in (0, 1):
        path = tmp_path / f"CartPole-v1_ezv2_seed{seed}.csv"
        with open(path, newline="") as file:
            assert tuple(next(csv.reader(file))) == plots.COLUMNS
        rows = plots.read_rows([path])
        assert [row["step"] for row in rows] == [15, 30, 40]
        for row in rows:
            assert (row["task"], row["algo"], row["label"], row["seed"]) == ("CartPole-v1", "ezv2", "ezv2", seed)
            assert 1 <= row["mean"] <= 500 and row["std"] >= 0 and row["episodes"] == 2
            assert f"torch {th.__version__}" in row["machine"] and "cores" in row["machine"]
            assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|unknown", row["commit"])
            assert "steps=40" in row["settings"] and "policy_kwargs=dict(net_arch=[16]" in row["settings"]
            assert re.fullmatch(r'\{"rollout/ep_rew_mean": ([\d.]+|null)\}', row["recorded"])
        seconds = [row["train_seconds"] for row in rows]
        assert 0 <= seconds[0] <= seconds[1] <= seconds[2] and 0 <= rows[0]["eval_seconds"] <= rows[2]["eval_seconds"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "checkpoints").exists()
    assert "held ≥ 475 from" in capsys.readouterr().out

    # A finished run is left alone.
    before = path.read_bytes()
    assert learn.main(line) == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize("env", ["CartPole-v1", "PointMass2D-v0"])
def test_goes_on_after_a_stop_as_if_it_never_stopped(tmp_path, env):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # Short episodes, so that evaluations take no time.
    more = ("--save-agent", "--env-kwargs", "max_episode_steps:30")
    assert learn.main(command(whole, *more, env=env)) == 0

    run = run_of(command(parts, *more, env=env))
    # First while actions are still random, then twice amid learning, each time in the middle of an episode
    for calls in (10, 15, 8):
        assert not learn.train(run, StopAt(calls))  # type: ignore[arg-type]
        assert len(list((parts / "checkpoints").glob("*_step*"))) == 1
    # Rows that a killed process wrote after its checkpoint are not kept.
    with open(run.csv, "a") as file:
        file.write("\n".join(run.csv.read_text().splitlines()[-1:]) + "\n")
    assert learn.main(command(parts, *more, env=env)) == 0

    assert measured(parts / run.csv.name) == measured(whole / run.csv.name)
    got, expected = (EZV2.load(folder / f"{run.name}.zip").policy.state_dict() for folder in (parts, whole))
    assert all(th.equal(got[name], expected[name]) for name in expected)
    assert not (parts / "checkpoints").exists()


def test_time_limit(tmp_path, capsys):
    line = command(tmp_path, "--seeds", "0", "1", steps=30)
    assert learn.main([*line, "--time-limit", "0.001"]) == learn.UNFINISHED
    assert "To go on: python -m benchmarks.learn --env CartPole-v1" in capsys.readouterr().out
    saved = list((tmp_path / "checkpoints").glob("*_step*"))
    assert [path.name for path in saved] == ["CartPole-v1_ezv2_seed0_step1"]
    assert {path.name for path in saved[0].iterdir()} == {"agent.zip", "replay_buffer.pkl", "state.pkl"}
    # An incomplete checkpoint, of a process killed while saving, does not count.
    (tmp_path / "checkpoints" / "CartPole-v1_ezv2_seed0_step2.part").mkdir()
    assert learn.main(line) == 0
    assert [row["step"] for row in plots.read_rows([tmp_path])] == [15, 30, 15, 30]
    assert not (tmp_path / "checkpoints").exists()


def test_checkpoints_while_running(tmp_path):
    # Every step a checkpoint, of which one is left when the process dies.
    run = run_of(command(tmp_path, "--save-every", "1e-9", steps=20))
    assert not learn.train(run, StopAt(5))  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "checkpoints").glob("*_step*")] == [f"{run.name}_step5"]


def test_evaluating_does_not_change_training(tmp_path):
    for name, every in (("often", 7), ("once", 40)):
        assert learn.main(command(tmp_path / name, every=every)) == 0
    often, once = (measured(tmp_path / name / "CartPole-v1_ezv2_seed0.csv") for name in ("often", "once"))
    assert len(often) == 6 and len(once) == 1
    assert often[-1] == once[-1]


def test_signals_ask_for_a_stop():
    before = signal.getsignal(signal.SIGTERM)
    stop = learn._Stop(None)
    with stop.signals():
        assert not stop.now()
        signal.raise_signal(signal.SIGTERM)
        assert stop.now()
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_settings_are_refused(tmp_path, capsys):
    assert learn.main(command(tmp_path, steps=20)) == 0
    with pytest.raises(SystemExit):
        learn.main(command(tmp_path, steps=30))
    assert "was made with other settings" in capsys.readouterr().err
    assert learn.main(command(tmp_path, "--label", "longer", steps=30)) == 0
    assert learn.main(command(tmp_path, "--no-resume", steps=30)) == 0
    assert {row["step"] for row in plots.read_rows([tmp_path])} == {15, 30}


def test_the_order_of_settings_does_not_matter(tmp_path, capsys):
    first = command(tmp_path, "ent_coef:0.01", "td_steps:7", "gamma:0.99", steps=20)
    assert learn.main(first) == 0
    capsys.readouterr()
    assert learn.main(command(tmp_path, "gamma:0.99", "td_steps:7", "ent_coef:0.01", steps=20)) == 0
    assert "is finished" in capsys.readouterr().out


def test_rows_without_a_checkpoint_are_kept(tmp_path, capsys):
    """As in a fresh clone of a repository with the rows of a run that was stopped."""
    line = command(tmp_path, steps=30)
    assert not learn.train(run_of(line), StopAt(20))  # type: ignore[arg-type]
    shutil.rmtree(tmp_path / "checkpoints")
    path = run_of(line).csv
    before = path.read_bytes()
    assert before.count(b"\n") == 2
    assert learn.main(line) == 0
    assert "begins anew; its rows are kept in" in capsys.readouterr().out
    assert path.with_suffix(".csv.old").read_bytes() == before
    assert [row["step"] for row in plots.read_rows([tmp_path])] == [15, 30]


def test_the_newest_weights_are_evaluated_too(tmp_path):
    """Their returns are those of a run without averages, and training is the same."""
    model = EZV2("MlpPolicy", "CartPole-v1", policy_kwargs=dict(net_arch=[16], state_dim=8, n_blocks=1), seed=0)
    averaged, newest_network = model.policy.averaged_network, model.policy.network
    for x in newest_network.parameters():
        x.data += 1
    before = [x.clone() for x in averaged.parameters()]
    with learn._newest_weights(model):
        assert all(th.equal(a, b) for a, b in zip(averaged.parameters(), newest_network.parameters()))
    assert all(
        th.equal(a, b) and not th.equal(a, c) for a, b, c in zip(averaged.parameters(), before, newest_network.parameters())
    )

    assert learn.main(command(tmp_path / "both", "average_fraction:0.5", "--newest-too")) == 0
    assert learn.main(command(tmp_path / "newest", "average_fraction:0.0")) == 0
    both, newest = (plots.read_rows([tmp_path / name]) for name in ("both", "newest"))
    recorded = [json.loads(row["recorded"]) for row in both]
    assert [x["newest/mean"] for x in recorded] == pytest.approx([row["mean"] for row in newest], abs=1e-3)
    assert [x["newest/std"] for x in recorded] == pytest.approx([row["std"] for row in newest], abs=1e-3)
    with pytest.raises(SystemExit):
        learn.main(["--env", "CartPole-v1", "--steps", "9", "--algo", "dqn", "--newest-too", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (["--steps", "0"], "--steps must be positive, not 0."),
        (["--time-limit", "-1"], "--time-limit must be positive, not -1.0."),
        (["--seeds", "1", "1"], "--seeds must be different numbers from 0."),
        (["--env", "Nowhere-v7"], "Environment `Nowhere` doesn't exist."),
        (["--env-kwargs", "gravity"], "'gravity' is not of the form name:value"),
        (["--params", "batch_size:many"], "no Python expression"),
        (["--params", "no_such_thing:1"], "ezv2 takes no parameter 'no_such_thing' here; it has learning_rate,"),
        (["--params", "batch_size:0"], "batch_size"),
        (["--algo", "sac"], "action space"),
        (["--algo", "dqn", "--small"], "--small holds settings of ezv2 alone."),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, wrong, sentence):
    with pytest.raises(SystemExit) as error:
        learn.main(["--env", "CartPole-v1", "--steps", "10", "--out", str(tmp_path / "out"), *wrong])
    assert error.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("python -m benchmarks.learn: error: ") and sentence in last
    assert not (tmp_path / "out").exists()


def test_baseline_and_its_picture_beside_another(tmp_path, capsys):
    line = ["--env", "CartPole-v1", "--steps", "20", "--eval-every", "10", "--episodes", "1", "--out", str(tmp_path)]
    for label in ("one", "other"):
        assert learn.main([*line, "--algo", "dqn", "--label", label, "--params", "learning_starts:5"]) == 0
    capsys.readouterr()
    picture = tmp_path / "folder" / "both.png"
    assert plots.main([str(tmp_path), "-o", str(picture), "--x", "train_seconds"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines() if "CartPole" in line} == {
        "one",
        "other",
    }


def _row(seed: int, step: int, mean: float) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(plots.COLUMNS, "x")
    return {
        **row,
        "seed": seed,
        "step": step,
        "mean": mean,
        "std": 0.0,
        "episodes": 1,
        "train_seconds": 1.0,
        "eval_seconds": 1.0,
    }


def test_summary_says_when_a_return_was_reached_and_held(tmp_path):
    curves = {0: (1, 9, 2, 9, 9), 1: (9, 9, 9, 9, 9), 2: (1, 9, 9, 9, 2), 3: (1, 2, 3, 4, 5)}
    rows = [_row(seed, 10 * (i + 1), mean) for seed, curve in curves.items() for i, mean in enumerate(curve)]
    lines = plots.summary(rows, threshold=8).splitlines()[2:]
    assert [tuple(cell.strip() for cell in line.split("|")[-3:-1]) for line in lines] == [
        ("20", "40"),
        ("10", "10"),
        ("20", "-"),
        ("-", "-"),
    ]
    # A seed that ended early must not stop the drawing.
    plots.draw(rows[:-2], tmp_path / "curves.png", threshold=8)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_plots_refuse_other_files(tmp_path, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        plots.main([str(tmp_path / "other.csv")])
    assert "is no results file of benchmarks.learn: it lacks the column 'task'." in capsys.readouterr().err


def _episode(env: gym.Env, act) -> tuple[float, int, bool, bool]:
    observation, _ = env.reset(seed=1)
    total, length, terminated, truncated = 0.0, 0, False, False
    while not (terminated or truncated):
        observation, reward, terminated, truncated, _ = env.step(act(observation))
        assert env.observation_space.contains(observation)
        total, length = total + float(reward), length + 1
    return total, length, terminated, truncated


def test_point_mass():
    env = make_env("PointMass2D-v0")
    check_env(env.unwrapped)
    idle = _episode(env, lambda observation: np.zeros(2, dtype=np.float32))
    steered = _episode(env, lambda observation: np.clip(-20 * observation[:2] - 9 * observation[2:], -1, 1).astype(np.float32))
    for total, length, terminated, truncated in (idle, steered):
        assert (length, terminated, truncated) == (100, False, True)
        assert total < 0
    assert idle[0] < -60 and steered[0] > -20
    starts = [env.reset(seed=seed)[0] for seed in range(200)]
    assert (np.min(starts, axis=0)[:2] < -0.9).all() and (np.max(starts, axis=0)[:2] > 0.9).all()
    np.testing.assert_array_equal(starts[7], env.reset(seed=7)[0])
    # A wall stops the point and takes its speed.
    for _ in range(100):
        observation = env.step(np.array([1.0, -1.0], dtype=np.float32))[0]
    np.testing.assert_array_equal(observation, [1, -1, 0, 0])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "PointMass2D-v0"])
def test_resumable_rebuilds_an_episode_and_those_after_it(env_id):
    env = make_env(env_id)
    env.reset(seed=5)
    env.action_space.seed(5)

    def play(env, actions):
        seen = []
        for action in actions:
            observation, reward, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                observation, _ = env.reset()
            seen.append(np.append(observation, reward))
        return np.array(seen)

    play(env, [env.action_space.sample() for _ in range(333)])
    saved = pickle.loads(pickle.dumps(env.snapshot()))
    actions = [env.action_space.sample() for _ in range(333)]
    expected = play(env, actions)
    other = make_env(env_id)
    assert other.restore(saved)
    np.testing.assert_array_equal(play(other, actions), expected)
    # And once more, from a snapshot of what was restored
    assert other.restore(saved)
    third = make_env(env_id)
    assert third.restore(other.snapshot())
    np.testing.assert_array_equal(play(third, actions), expected)


def test_resumable_notices_what_does_not_repeat_itself():
    class Noisy(gym.ObservationWrapper):
        def observation(self, observation):
            return observation + np.random.uniform(size=observation.shape)

    env = Resumable(Noisy(gym.make("CartPole-v1")))
    env.reset(seed=0)
    env.step(0)
    assert not env.restore(env.snapshot())


def test_control_suite():
    pytest.importorskip("shimmy")
    pytest.importorskip("dm_control")
    env = make_vec_env("dm_control/cartpole-swingup-v0", 2, action_repeat=2)
    env.seed(3)
    observations = env.reset()
    assert isinstance(observations, np.ndarray) and observations.shape == (2, 5)
    for step in range(500):
        _, _, dones, infos = env.step(np.zeros((2, 1)))
        assert dones.all() == (step == 499)
    assert infos[0]["TimeLimit.truncated"] and infos[0]["episode"]["l"] == 500


def test_demo(tmp_path, capsys):
    pytest.importorskip("tqdm")
    pytest.importorskip("rich")
    assert demo.main(["--steps", "60", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in ("cartpole.zip", "learning_curve.png"):
        assert str(tmp_path / name) in printed and (tmp_path / name).stat().st_size > 1000
