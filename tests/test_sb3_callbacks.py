"""All of Stable-Baselines3's callbacks, at the right times and as often as they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from common import BOX, SpacesEnv, weights
from sb3_agents import agent, vec_env
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ezv2 import EZV2
from sb3_ezv2.replay_buffer import RUNNING


class Record(BaseCallback):
    """
    Writes down its events with the steps and updates at each.

    :param stop_at: steps after which it stops the training
    """

    def __init__(self, stop_at: int = 10**9):
        super().__init__()
        self.stop_at = stop_at
        self.events: list[tuple[str, int, int]] = []

    def _note(self, event: str) -> None:
        self.events.append((event, self.model.num_timesteps, self.model._n_updates))

    def _init_callback(self) -> None:
        self._note("init")

    def _on_training_start(self) -> None:
        assert {"total_timesteps", "callback", "tb_log_name"} <= self.locals.keys()
        self._note("training_start")

    def _on_rollout_start(self) -> None:
        self._note("rollout_start")

    def _on_step(self) -> bool:
        assert {"new_obs", "rewards", "dones", "infos", "actions", "buffer_actions", "replay_buffer"} <= self.locals.keys()
        assert self.num_timesteps == self.model.num_timesteps and self.locals["self"] is self.model
        assert not self.model.policy.training
        self._note("step")
        return self.num_timesteps < self.stop_at

    def _on_rollout_end(self) -> None:
        self._note("rollout_end")

    def _on_training_end(self) -> None:
        self._note("training_end")

    def names(self) -> list[str]:
        return [event for event, *_ in self.events]


def test_order_of_the_events() -> None:
    record = Record()
    model = agent(env=vec_env(2), train_freq=3, gradient_steps=2, learning_starts=6).learn(16, record)
    assert model.num_timesteps == 18 and model._n_updates == 4
    rollout = ["rollout_start", "step", "step", "step", "rollout_end"]
    assert record.names() == ["init", "training_start", *3 * rollout, "training_end"]
    # (steps, updates) at each step of the environments: the updates follow a rollout
    steps = [(steps, updates) for event, steps, updates in record.events if event == "step"]
    assert steps == [(2, 0), (4, 0), (6, 0), (8, 0), (10, 0), (12, 0), (14, 2), (16, 2), (18, 2)]
    assert record.events[-1] == ("training_end", 18, 4)
    assert record.n_calls == 9 and record.training_env is model.get_env() and record.logger is model.logger


def test_every_learn_has_its_start_and_end() -> None:
    record = Record()
    model = agent().learn(4, record).learn(3, record, reset_num_timesteps=False)
    assert record.names().count("training_start") == record.names().count("training_end") == 2
    assert record.events[-1] == ("training_end", 7, 0) and record.n_calls == 7 and model.num_timesteps == 7


def test_rollouts_of_episodes() -> None:
    record = Record()
    agent(env=vec_env(length=4), train_freq=(2, "episode")).learn(10, record)
    rollout = ["rollout_start", *8 * ["step"], "rollout_end"]
    assert record.names() == ["init", "training_start", *2 * rollout, "training_end"]


# ---------------------------------------------------------------------- stopping


@pytest.mark.parametrize("n_envs", [1, 2])
def test_a_callback_stops_the_training_at_once(n_envs: int) -> None:
    """
    Neither the updates that would have followed the step nor those after the last one of a whole run are done; the step's
    transition is kept, so that going on is as if nothing had happened.
    """
    record = Record(stop_at=14)
    model = agent(env=vec_env(n_envs), gradient_steps=-1, final_gradient_steps=50).learn(100, record)
    assert (model.num_timesteps, model._n_updates) == (14, 2 if n_envs > 1 else 3)
    assert record.names()[-2:] == ["step", "training_end"]
    buffer = model.replay_buffer
    assert buffer is not None and buffer.total_transitions == 14
    np.testing.assert_array_equal(model._last_obs, record.locals["new_obs"])  # type: ignore[arg-type]
    before = model._n_updates
    model.learn(6, reset_num_timesteps=False)
    assert model.num_timesteps == 20 and buffer.total_transitions == 20
    # the updates after the step at which it stopped may be made up for
    assert before + 6 + 50 <= model._n_updates <= before + 6 + 50 + n_envs
    # episodes of five steps: all of them whole, in the order in which they were played
    for env in range(n_envs):
        kinds = buffer.kinds[env * buffer.ring : env * buffer.ring + buffer.written[env]]
        assert np.diff(np.flatnonzero(kinds != RUNNING)).tolist() == [6] * (20 // n_envs // 5 - 1)


def test_a_function_stops_the_training() -> None:
    calls: list[int] = []

    def callback(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        calls.append(locals_["self"].num_timesteps)
        return len(calls) < 7

    assert agent().learn(50, callback).num_timesteps == 7 and calls == list(range(1, 8))
    calls.clear()
    assert agent().learn(50, ConvertCallback(callback)).num_timesteps == 7
    assert agent().learn(3, [ConvertCallback(None), None or Record()]).num_timesteps == 3


@pytest.mark.parametrize("n_envs", [1, 2])
def test_max_episodes(n_envs: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = agent(env=vec_env(n_envs, length=4)).learn(100, StopTrainingOnMaxEpisodes(3, verbose=1))
    assert model.num_timesteps == 12 * n_envs
    assert f"by playing for {3 * n_envs} episodes" in capsys.readouterr().out
    buffer = model.replay_buffer
    assert buffer is not None
    # It stops when an episode ends: that end is stored, and what follows is another episode
    assert np.count_nonzero(buffer.kinds[buffer.stamps >= 0]) == 3 * n_envs
    model.learn(4 * n_envs, reset_num_timesteps=False)
    assert np.count_nonzero(buffer.kinds[buffer.stamps >= 0]) == 4 * n_envs


class Improving(SpacesEnv):
    """The return of an episode is the number of episodes so far, up to a limit."""

    def __init__(self, limit: int):
        super().__init__(BOX, gym.spaces.Discrete(3), length=2)
        self.limit, self.episodes = limit, 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, terminated, truncated, _ = super().step(action)
        self.episodes += terminated
        return obs, float(min(self.episodes, self.limit)) if terminated else 0.0, terminated, truncated, {}


def improving(limit: int) -> DummyVecEnv:
    return DummyVecEnv([lambda: Monitor(Improving(limit))])


def test_evaluation_saves_the_best_and_calls_its_children(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after, best = Record(), ConvertCallback(lambda locals_, globals_: True)
    evaluation = EvalCallback(
        improving(limit=3), callback_on_new_best=best, callback_after_eval=after, n_eval_episodes=1, eval_freq=4,
        log_path=str(tmp_path / "logs"), best_model_save_path=str(tmp_path / "best"), deterministic=False,
    )  # fmt: skip
    model = agent().learn(22, evaluation)
    assert evaluation.n_calls == 22 and evaluation.best_mean_reward == evaluation.last_mean_reward == 3
    assert [steps for event, steps, _ in after.events if event == "step"] == [4, 8, 12, 16, 20]
    assert best.n_calls == 3 and after.n_calls == 5
    results = np.load(tmp_path / "logs" / "evaluations.npz")
    assert results["timesteps"].tolist() == [4, 8, 12, 16, 20] and results["results"][:, 0].tolist() == [1, 2, 3, 3, 3]
    assert results["ep_lengths"].tolist() == 5 * [[2]]
    # the best is that of step 12, when two updates were done
    saved = EZV2.load(tmp_path / "best" / "best_model", device="cpu")
    assert saved.num_timesteps == 12 and saved._n_updates == 1 and model._n_updates == 12
    printed = capsys.readouterr().out
    assert printed.count("New best mean reward!") == 3 and "Eval num_timesteps=20, episode_reward=3.00" in printed


def test_evaluation_stops_at_a_threshold() -> None:
    stop = StopTrainingOnRewardThreshold(2.0, verbose=1)
    model = agent().learn(
        100, EvalCallback(improving(9), callback_on_new_best=stop, n_eval_episodes=1, eval_freq=4, verbose=0)
    )
    assert model.num_timesteps == 8


def test_evaluation_stops_when_nothing_improves() -> None:
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, min_evals=2, verbose=1)
    callback = EvalCallback(improving(3), callback_after_eval=stop, n_eval_episodes=1, eval_freq=2, verbose=0)
    # better at evaluations 1, 2 and 3, then not at 4 and 5
    assert agent().learn(100, callback).num_timesteps == 10


@pytest.mark.parametrize("n_envs", [1, 2])
def test_checkpoints(tmp_path: Path, n_envs: int) -> None:
    env = VecNormalize(vec_env(n_envs))
    checkpoints = CheckpointCallback(
        6, str(tmp_path / "kept"), name_prefix="ezv2", save_replay_buffer=True, save_vecnormalize=True, verbose=2
    )
    model = agent(env=env, gradient_steps=-1).learn(14 * n_envs, checkpoints)
    steps = (6 * n_envs, 12 * n_envs)
    assert {file.name for file in (tmp_path / "kept").iterdir()} == {
        f"ezv2_{kind}{step}_steps.{suffix}"
        for step in steps
        for kind, suffix in (("", "zip"), ("replay_buffer_", "pkl"), ("vecnormalize_", "pkl"))
    }
    stem = str(tmp_path / "kept" / "ezv2")
    normalize = VecNormalize.load(f"{stem}_vecnormalize_{steps[1]}_steps.pkl", vec_env(n_envs))
    loaded = EZV2.load(f"{stem}_{steps[1]}_steps", env=normalize, device="cpu")
    loaded.load_replay_buffer(f"{stem}_replay_buffer_{steps[1]}_steps")
    assert loaded.num_timesteps == steps[1] and 0 < loaded._n_updates < model._n_updates
    assert loaded.get_vec_normalize_env() is normalize
    assert isinstance(normalize.obs_rms, RunningMeanStd) and normalize.obs_rms.count > steps[1]
    # a checkpoint is made before the step's transition is stored
    assert loaded.replay_buffer is not None and loaded.replay_buffer.total_transitions == steps[1] - n_envs
    loaded.learn(4 * n_envs, reset_num_timesteps=False)
    assert loaded.num_timesteps == 16 * n_envs


def test_every_n_timesteps_and_lists() -> None:
    inner, first, second = Record(), Record(), Record(stop_at=18)
    model = agent(env=vec_env(2)).learn(50, CallbackList([first, EveryNTimesteps(5, inner), second]))
    assert [steps for event, steps, _ in inner.events if event == "step"] == [6, 12, 18]
    assert model.num_timesteps == 18 and first.n_calls == second.n_calls == 9
    assert first.names() == second.names()


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    pytest.importorskip("rich")
    bar = ProgressBarCallback()
    agent(env=vec_env(2)).learn(8, [bar, Record(stop_at=6)])
    assert bar.pbar.n == 6 and bar.pbar.total == 8
    agent().learn(3, progress_bar=True)
    out = capsys.readouterr()
    assert "3/3" in out.out + out.err


def test_logging_by_steps(tmp_path: Path) -> None:
    model = agent(env=vec_env(length=1000))  # no episode ends
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(30, LogEveryNTimesteps(10))
    lines = (tmp_path / "progress.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","))) for line in lines[1:]]
    assert [row["time/total_timesteps"] for row in rows] == ["10", "20", "30"]
    assert rows[0]["train/loss"] == "" and float(rows[2]["train/loss"]) != 0 and rows[2]["train/n_updates"] == "19"


def test_callbacks_change_nothing_by_themselves(tmp_path: Path) -> None:
    callbacks = [Record(), CheckpointCallback(5, str(tmp_path)), EveryNTimesteps(3, Record())]
    plain, observed = (weights(agent().learn(20, callback)) for callback in (None, callbacks))
    assert plain.equal(observed)
