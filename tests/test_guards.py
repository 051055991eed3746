"""What ends a training run leaves an agent that can be saved and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from common import BOX, FaultyEnv, SpacesEnv, make, weights
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_ezv2 import EZV2
from sb3_ezv2.checkpoint import FullCheckpointCallback, latest_checkpoint


@pytest.fixture(autouse=True)
def sigint() -> Iterator[None]:
    """A process in the background may have been told to ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def check_consistent(model: EZV2) -> None:
    """Every step is stored, nothing is half done, and the weights are numbers."""
    model.predict(model.observation_space.sample())
    buffer = model.replay_buffer
    assert buffer is not None and not model.policy.network.training
    assert model._open_actions is None and model._rollout.step is None
    assert all(th.isfinite(x).all() for x in model.policy.state_dict().values())
    assert buffer.total_transitions <= model.num_timesteps


class At(BaseCallback):
    """Calls a function once, at a step. :param at: environment steps :param function: what to do"""

    def __init__(self, at: int, function: Any):
        super().__init__()
        self.at, self.function = at, function

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.at and self.function is not None:
            function, self.function = self.function, None
            function()
        return True


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("fault", ["observation", "reward"])
def test_nan_of_an_environment_leaves_a_saved_agent(fault: str, tmp_path: Path) -> None:
    env: Any = VecNormalize(DummyVecEnv([lambda: FaultyEnv("none", 10**6), lambda: FaultyEnv(fault, 28)]))
    model = make(env)
    with pytest.warns(UserWarning, match=r"ended by ValueError. The agent was saved to .*rl_model_(56|60)_steps_error.zip"):
        with pytest.raises(ValueError, match=rf"step (56|60): the {fault} of environment 1 has NaN or infinite"):
            model.learn(80, callback=FullCheckpointCallback(50, tmp_path))
    check_consistent(model)
    # also in the means of VecNormalize
    assert np.isfinite(env.obs_rms.mean).all() and np.isfinite(env.ret_rms.var)
    path = latest_checkpoint(tmp_path)
    assert path is not None and path.name.endswith("_error.zip")
    env = VecNormalize(DummyVecEnv([lambda: FaultyEnv("none", 10**6)] * 2))
    with pytest.warns(UserWarning, match="closed as truncated"):
        loaded = EZV2.load_checkpoint(path, env=env)
    assert np.isfinite(env.obs_rms.mean).all()
    loaded.learn(20, reset_num_timesteps=False)
    check_consistent(loaded)


@pytest.mark.parametrize("part, term", [("value_head", "value loss"), ("reward_head", "reward loss")])
def test_nan_in_an_update_leaves_a_saved_agent(part: str, term: str, tmp_path: Path) -> None:
    model = make()

    def spoil() -> None:
        getattr(model.policy.network, part).mlp[-1].register_forward_hook(lambda module, inputs, output: output * float("nan"))

    with pytest.warns(UserWarning, match="rl_model_50_steps_error.zip"):
        with pytest.raises(ValueError, match=rf"update 10 at step 50: the {term} is NaN"):
            model.learn(80, callback=[At(50, spoil), FullCheckpointCallback(1000, tmp_path)])
    check_consistent(EZV2.load_checkpoint(tmp_path / "rl_model_50_steps_error.zip", env="CartPole-v1"))


def test_nan_gradient_and_priority_are_named() -> None:
    model = make().learn(50)
    before = [x.clone() for x in model.policy.network.parameters()]
    weight = next(model.policy.network.dynamics.parameters())
    handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ValueError, match=r"update 11 at step 50: the gradient is NaN or infinite"):
        model.train(1, 16)
    handle.remove()
    assert all(th.equal(a, b) for a, b in zip(before, model.policy.network.parameters()))
    assert model.replay_buffer is not None and model._reanalyzer is not None
    model.replay_buffer._fresh.append(np.array([3, 4]))
    model._reanalyzer.td_values = lambda batch, *_: th.full_like(batch.returns, float("nan"))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"step 50: the priority .* of a transition of environment 0 is NaN"):
        model.train(1, 16)


def test_running_statistics_survive_a_nan() -> None:
    """Batch norm takes up a batch before its loss is known."""
    model = make().learn(50)
    handle = model.policy.network.dynamics.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    with pytest.raises(ValueError, match=r"update 11 at step 50: the .* is NaN or infinite"):
        model.train(1, 16)
    handle.remove()
    assert all(bool(th.isfinite(x).all()) for x in model.policy.network.buffers())
    assert model.learn(10, reset_num_timesteps=False).num_timesteps == 60
    check_consistent(model)


class Fails(SpacesEnv):
    """Raises at a step of its life."""

    def __init__(self, at: int):
        super().__init__(BOX, spaces.Discrete(2), length=1000)
        self.at, self.total = at, 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.total += 1
        if self.total == self.at:
            raise ZeroDivisionError("a wheel came off")
        return super().step(action)


def test_environment_that_raises(tmp_path: Path) -> None:
    model = make(Fails(55))
    with pytest.warns(UserWarning, match="ended by ZeroDivisionError"):
        with pytest.raises(ZeroDivisionError, match="a wheel came off") as caught:
            model.learn(80, callback=FullCheckpointCallback(1000, tmp_path))
    assert Path(caught.traceback[-1].path).name == Path(__file__).name
    assert model.num_timesteps == 54 and (tmp_path / "rl_model_54_steps_error.zip").exists()
    check_consistent(model)
    model.learn(26, reset_num_timesteps=False)  # in a new episode
    buffer = model.replay_buffer
    assert buffer is not None and buffer.total_transitions == 80 and buffer.kinds[53] == 2


def test_process_of_an_environment_that_is_killed(tmp_path: Path) -> None:
    env = SubprocVecEnv([lambda: gym.make("CartPole-v1")] * 2)
    model = make(env)

    def kill() -> None:
        env.processes[1].kill()
        env.processes[1].join()

    with pytest.warns(UserWarning, match="The process of environment 1 has ended .exit code -9.*saved to"):
        with pytest.raises((EOFError, ConnectionError)):
            model.learn(100, callback=[At(60, kill), FullCheckpointCallback(1000, tmp_path)])
    check_consistent(model)
    loaded = EZV2.load_checkpoint(tmp_path / "rl_model_60_steps_error.zip", env=make_vec_env("CartPole-v1", 2))
    for agent in (model, loaded):
        agent.set_env(make_vec_env("CartPole-v1", 2))
        agent.learn(20, reset_num_timesteps=False)
        check_consistent(agent)
    for process in env.processes:
        process.kill()


@pytest.mark.parametrize("settings", [{}, dict(train_freq=7), dict(gradient_steps=5)], ids=str)
def test_ctrl_c_ends_between_two_steps(settings: dict[str, Any], tmp_path: Path) -> None:
    model = make(**settings)
    for at in (25, 61):
        with pytest.raises(KeyboardInterrupt):
            model.learn(100, callback=[At(at, interrupt), FullCheckpointCallback(1000, tmp_path)], reset_num_timesteps=at < 30)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert model.num_timesteps == at and model.replay_buffer.total_transitions == at  # type: ignore[union-attr]
        check_consistent(model)
        assert (tmp_path / f"rl_model_{at}_steps.zip").exists()
    model.learn(39, reset_num_timesteps=False)
    assert model.num_timesteps >= 100 and model.replay_buffer.kinds[:61].tolist().count(2) == 0  # type: ignore[union-attr]


def test_second_ctrl_c_ends_at_once() -> None:
    model = make()

    def twice() -> None:
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        model.learn(100, callback=At(60, twice))
    check_consistent(model)  # the step in which the callback was interrupted is stored
    assert model.num_timesteps == model.replay_buffer.total_transitions == 60  # type: ignore[union-attr]
    model.learn(20, reset_num_timesteps=False)


def test_ctrl_c_at_the_last_step_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt):
        make().learn(60, callback=At(60, interrupt))


def test_handlers_of_the_process_are_left_alone() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        make().learn(50, callback=At(45, interrupt))
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]
    models: list[EZV2] = []
    thread = threading.Thread(target=lambda: models.append(make().learn(45)))
    thread.start()
    thread.join()
    assert models[0].num_timesteps == 45


INTERRUPTED = """
import torch
from common import make
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv
if __name__ == "__main__":
    torch.set_num_threads(1)
    model = make(make_vec_env("CartPole-v1", 2, vec_env_cls=SubprocVecEnv), learning_starts=10)
    print("begins", flush=True)
    try:
        model.learn(100_000)
    except KeyboardInterrupt:
        model.set_env(make_vec_env("CartPole-v1", 2))
        model.learn(10, reset_num_timesteps=False)
        print("went on", flush=True)
"""


def test_ctrl_c_of_a_terminal_reaches_the_environments_too() -> None:
    """Their processes end by it, which must not hide that it was Ctrl-C."""
    command = [sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begins\n"
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == b"went on\n"
    assert process.returncode == 0


def test_failing_callback_does_not_lose_the_step(tmp_path: Path) -> None:
    model = make()

    def fail() -> None:
        raise LookupError("no such thing")

    with pytest.warns(UserWarning, match="ended by LookupError"), pytest.raises(LookupError, match="no such thing"):
        model.learn(100, callback=[At(50, fail), FullCheckpointCallback(1000, tmp_path)])
    check_consistent(model)
    assert model.replay_buffer.total_transitions == 50  # type: ignore[union-attr]
    loaded = EZV2.load_checkpoint(tmp_path / "rl_model_50_steps_error.zip", env="CartPole-v1")
    for agent in (model, loaded):
        agent.learn(50, reset_num_timesteps=False)
    assert all(th.equal(a, b) for a, b in zip(model.policy.parameters(), loaded.policy.parameters()))


@pytest.mark.parametrize("at", [3, 35])
def test_ctrl_c_amid_the_updates_of_a_rollout(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of them is made when the run goes on, the final ones too, and is not lost by another Ctrl-C."""
    settings = dict(train_freq=10, gradient_steps=10, final_gradient_steps=20, learning_starts=30)
    whole = make("Pendulum-v1", **settings).learn(60)

    def interrupted(model: EZV2, at: int) -> None:
        update = EZV2._update

        def one(self: EZV2, batch_size: int) -> None:
            update(self, batch_size)
            if self._n_updates == at:
                interrupt()

        monkeypatch.setattr(EZV2, "_update", one)
        callback, first = FullCheckpointCallback(1000, tmp_path), model.num_timesteps == 0
        with pytest.raises(KeyboardInterrupt):
            model.learn(60 if first else model.remaining_timesteps, callback=callback, reset_num_timesteps=first)
        assert model._n_updates == at
        monkeypatch.undo()

    def saved() -> EZV2:
        path = latest_checkpoint(tmp_path)
        assert path is not None
        return EZV2.load_checkpoint(path, env="Pendulum-v1", device="cpu")

    model = make("Pendulum-v1", **settings)
    interrupted(model, at)
    model.learn(model.remaining_timesteps, reset_num_timesteps=False)
    again = saved()
    interrupted(again, at + 2)
    again = saved()
    again.learn(again.remaining_timesteps, callback=FullCheckpointCallback(1000, tmp_path), reset_num_timesteps=False)
    for agent in (model, again, saved()):
        assert agent._n_updates == whole._n_updates == 50 and th.equal(weights(agent), weights(whole))
