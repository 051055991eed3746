"""Files of agents: a kill, a full disk or a wrong file never costs the one that was there."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from common import SpacesEnv, make
from gymnasium import spaces
from resume_tools import Stubborn
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ezv2 import EZV2
from sb3_ezv2.checkpoint import FullCheckpointCallback, latest_checkpoint, save_checkpoint
from sb3_ezv2.replay_buffer import TRUNCATED


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def agent() -> EZV2:
    return make().learn(60)


def test_callback_writes_in_time_and_keeps_the_last(tmp_path: Path) -> None:
    (tmp_path / "rl_model_7_steps.zip.tmp").write_bytes(b"of a process that was killed")
    (tmp_path / "other_7_steps.zip").write_bytes(b"of another run")
    callback = FullCheckpointCallback(10, tmp_path / "deeper", keep=2)
    make(learning_starts=70).learn(75, callback=[callback, FullCheckpointCallback(30, tmp_path)])
    assert files(tmp_path / "deeper") == ["rl_model_70_steps.zip", "rl_model_75_steps.zip"]
    assert files(tmp_path) == ["deeper", "other_7_steps.zip", *(f"rl_model_{n}_steps.zip" for n in (30, 60, 75))]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and latest.name == "rl_model_75_steps.zip"
    assert latest_checkpoint(tmp_path / "nowhere") is None and latest_checkpoint(tmp_path, "other") is not None
    # It is an agent's file, too
    assert EZV2.load(latest).num_timesteps == 75
    loaded = EZV2.load_checkpoint(tmp_path / "rl_model_30_steps", env="CartPole-v1")
    assert loaded.num_timesteps == 30 and loaded.remaining_timesteps == 45
    with pytest.raises(ValueError, match="must be at least 1"):
        FullCheckpointCallback(0, tmp_path)


KILLED = """
import sys, torch
from common import make
from sb3_ezv2.checkpoint import FullCheckpointCallback
torch.set_num_threads(1)

class Telling(FullCheckpointCallback):
    def _save(self, ending):
        path = super()._save(ending)
        print(self.model.num_timesteps, flush=True)
        return path

model = make(learning_starts=4)
print("begins", flush=True)
model.learn(100_000, callback=Telling(2, sys.argv[1]))
"""


def kill_while_training(folder: Path, seconds: float) -> tuple[Path | None, int]:
    """
    Train in a process that saves every other step, and end it by SIGKILL.

    :param folder: of its checkpoints
    :param seconds: between the first one and the end
    :return: the file that is left, and the last step that the process told it had saved
    """
    command = [sys.executable, "-c", KILLED, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begins\n"
        while latest_checkpoint(folder) is None:
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        told = process.stdout.read().split()
    return latest_checkpoint(folder), int(told[-1]) if told else 0


def test_kill_at_random_moments_leaves_a_loadable_agent(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    for trial in range(3):
        path, told = kill_while_training(tmp_path / str(trial), rng.uniform(0, 0.3))
        assert path is not None
        model = EZV2.load_checkpoint(path, env="CartPole-v1", device="cpu")
        assert model.num_timesteps >= told
        assert model.replay_buffer is not None and model.replay_buffer.total_transitions == model.num_timesteps
        model.learn(6, reset_num_timesteps=False)


@pytest.mark.parametrize("save", ["save", "save_replay_buffer", "save_checkpoint"])
def test_a_file_size_limit_keeps_the_last_file(agent: EZV2, tmp_path: Path, save: str) -> None:
    getattr(agent, save)(tmp_path / "file.zip")
    before = (tmp_path / "file.zip").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1000, len(before) // 2, len(before) - 1000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError, match=r"saving failed .* The file that is there is as it was"):
                getattr(agent, save)(tmp_path / "file.zip")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "file.zip").read_bytes() == before and files(tmp_path) == ["file.zip"]
    getattr(agent, save)(tmp_path / "file.zip")


def test_training_goes_on_when_a_checkpoint_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Any] = []

    def fail(model: Any, path: Path, **settings: Any) -> None:
        saved.append(path)
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_checkpoint(model, path, **settings)

    monkeypatch.setattr("sb3_ezv2.checkpoint.save_checkpoint", fail)
    with pytest.warns(UserWarning, match=r"No checkpoint at step 40: .*No space left on device"):
        make(learning_starts=60).learn(60, callback=FullCheckpointCallback(20, tmp_path))
    assert files(tmp_path) == ["rl_model_20_steps.zip", "rl_model_60_steps.zip"]


def test_folders_that_cannot_be_written_to(agent: EZV2, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"no folder")
    for path in (tmp_path / "file" / "agent", Path("/proc/agent"), Path("/proc/nowhere/agent.zip")):
        for save in (agent.save, agent.save_replay_buffer, agent.save_checkpoint):
            with pytest.raises(OSError, match=r"saving failed .*Nothing was written"):
                save(path)
    with pytest.raises(OSError):
        make().learn(10, callback=FullCheckpointCallback(5, "/proc/agents"))
    (tmp_path / "agent.zip").mkdir()
    with pytest.warns(UserWarning, match="is a folder"):
        agent.save(tmp_path / "agent")
    assert (tmp_path / "agent.zip_2").is_file()
    with pytest.warns(UserWarning, match="does not exist"):
        agent.save(tmp_path / "new" / "agent")
    assert (tmp_path / "new" / "agent.zip").is_file()
    os.symlink(tmp_path / "new" / "agent.zip", tmp_path / "link.zip")
    agent.save(tmp_path / "link.zip")
    assert (tmp_path / "link.zip").is_symlink()


def bad_files(agent: EZV2, folder: Path) -> dict[str, tuple[Path, str]]:
    """:return: paths by what is wrong with them, and what the error says"""
    agent.save_checkpoint(folder / "good.zip")
    content = (folder / "good.zip").read_bytes()
    found: dict[str, tuple[Path, str]] = {}

    def write(name: str, data: bytes, message: str) -> None:
        (folder / f"{name}.zip").write_bytes(data)
        found[name] = (folder / f"{name}.zip", message)

    def rewrite(name: str, message: str, **changes: bytes | None) -> None:
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(stream, "w") as target:
            for entry in source.namelist():
                data = changes.get(entry.replace(".", "_"), source.read(entry))
                if data is not None:
                    target.writestr(entry, data)
        write(name, stream.getvalue(), message)

    for share in (0, 0.01, 0.5, 0.99):
        write(f"truncated {share}", content[: int(share * len(content))], "is no saved agent")
    write("random bytes", np.random.default_rng(0).bytes(5000), "is no saved agent, or a damaged one")
    rewrite("without data", "lacks the agent's settings", data=None)
    rewrite("without networks", "lacks the agent's settings", policy_pth=None)
    rewrite("data of no dictionary", "lacks the agent's settings", data=b"[1, 2]")
    rewrite("data of no text", "is no saved agent, or a damaged one", data=b"\xff\xfe\x00")
    rewrite("networks of random bytes", "is damaged", policy_pth=b"0123456789" * 100)
    rewrite("networks of others", "is damaged", policy_pth=_weights({"layer": th.zeros(3)}))
    rewrite("without optimizer", "is damaged", policy_optimizer_pth=None)
    damaged = bytearray(content)
    middle = content.index(b"policy.pth") + 5000
    damaged[middle : middle + 50] = bytes(50)
    write("overwritten in the middle", bytes(damaged), "is damaged")
    PPO("MlpPolicy", "CartPole-v1", device="cpu").save(folder / "of ppo")
    found["of ppo"] = (folder / "of ppo.zip", r"not saved by EZV2.*stable_baselines3.common.policies")
    return found


def _weights(weights: dict[str, th.Tensor]) -> bytes:
    stream = io.BytesIO()
    th.save(weights, stream)
    return stream.getvalue()


def test_damaged_and_foreign_files(agent: EZV2, tmp_path: Path) -> None:
    for name, (path, message) in bad_files(agent, tmp_path).items():
        with pytest.raises(ValueError, match=message) as raised:
            EZV2.load(path, device="cpu")
            pytest.fail(name)
        assert len(str(raised.value)) < 300 + len(str(path)), name
        with pytest.raises(ValueError, match=message):
            EZV2.load_checkpoint(path, env="CartPole-v1", device="cpu")
        with open(path, "rb") as file, pytest.raises(ValueError, match=message):
            EZV2.load(file, device="cpu")
    with pytest.raises(FileNotFoundError):
        EZV2.load(tmp_path / "nothing")
    agent.save(tmp_path / "alone")
    with pytest.raises(ValueError, match="holds an agent alone, not a checkpoint"):
        EZV2.load_checkpoint(tmp_path / "alone", env="CartPole-v1")


def test_damaged_replay_buffers(agent: EZV2, tmp_path: Path) -> None:
    before = agent.replay_buffer
    agent.save_replay_buffer(tmp_path / "good")
    content = (tmp_path / "good.pkl").read_bytes()
    assert len(content) < 100_000  # of 100,000 slots 60 were written to
    for data in (content[:-100], b"", b"no pickle"):
        (tmp_path / "bad.pkl").write_bytes(data)
        with pytest.raises(ValueError, match="is damaged"):
            agent.load_replay_buffer(tmp_path / "bad")
    assert agent.replay_buffer is before


def test_searches_of_another_network_are_not_taken_over(tmp_path: Path) -> None:
    model = make(target_update_interval=None, mixed_value_start=0).learn(80)
    assert model.replay_buffer is not None and model._reanalyzer is not None
    model.save(tmp_path / "agent")
    model.save_replay_buffer(tmp_path / "replay")
    for settings, same in ((dict(), True), (dict(n_simulations=3), False), (dict(policy_target="best_action"), False)):
        loaded = EZV2.load(tmp_path / "agent", env="CartPole-v1", **settings)
        loaded.load_replay_buffer(tmp_path / "replay")
        saved = loaded.replay_buffer.cache  # type: ignore[union-attr]
        np.testing.assert_array_equal(saved.values, model._reanalyzer.cache.values)  # type: ignore[union-attr]
        loaded._setup_learn(10, reset_num_timesteps=False)
        assert (loaded._reanalyzer.cache is saved) == same  # type: ignore[union-attr]
    other = make(seed=1)
    other.load_replay_buffer(tmp_path / "replay")
    other.learn(10)
    assert other._reanalyzer is not None and other._reanalyzer.cache is not saved


def test_what_was_loaded_can_be_saved_again_at_once(tmp_path: Path) -> None:
    """Before any learn() the remembered searches belong to no agent yet; what made them is not forgotten by that."""
    model = make().learn(50)
    model.save_checkpoint(tmp_path / "first")
    EZV2.load_checkpoint(tmp_path / "first", env="CartPole-v1").save_checkpoint(tmp_path / "second")
    loaded = EZV2.load_checkpoint(tmp_path / "second", env="CartPole-v1")
    assert loaded.replay_buffer is not None
    saved = loaded.replay_buffer.cache
    loaded.learn(1, reset_num_timesteps=False)
    assert loaded._reanalyzer is not None and loaded._reanalyzer.cache is saved


def test_environment_that_cannot_give_up_its_state(tmp_path: Path) -> None:
    model = make(make_vec_env(Stubborn, 2, seed=1)).learn(50)
    with pytest.warns(UserWarning, match=r"environment 0 \(resume_tools.Stubborn: .*TextIOWrapper.*Resumable"):
        model.save_checkpoint(tmp_path / "checkpoint")
    with pytest.warns(UserWarning, match=r"cannot be taken up again .* closed as truncated"):
        loaded = EZV2.load_checkpoint(tmp_path / "checkpoint", env=make_vec_env(Stubborn, 2))
    loaded.learn(20, reset_num_timesteps=False)
    buffer = loaded.replay_buffer
    assert buffer is not None
    newest = np.arange(2) * buffer.ring + 25  # 25 steps of each: one episode of 15 with its end, and 10 steps of another
    assert (buffer.kinds[newest] == TRUNCATED).all() and (buffer.episodes[newest + 1] != buffer.episodes[newest]).all()


def test_other_environments_than_those_of_the_checkpoint(tmp_path: Path) -> None:
    make(VecNormalize(make_vec_env("CartPole-v1", 2))).learn(44).save_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"wrapped in .*VecNormalize when the checkpoint was saved, and are in nothing now"):
        EZV2.load_checkpoint(tmp_path / "checkpoint", env=make_vec_env("CartPole-v1", 2))
    with pytest.raises(ValueError, match="checkpoint is of 2 environments, but there are 3"):
        EZV2.load_checkpoint(tmp_path / "checkpoint", env=VecNormalize(make_vec_env("CartPole-v1", 3)))
    with pytest.raises(ValueError, match="give env"):
        EZV2.load_checkpoint(tmp_path / "checkpoint", env=None)  # type: ignore[arg-type]
    space = make_vec_env("CartPole-v1", 2).observation_space
    env = VecNormalize(make_vec_env(lambda: SpacesEnv(space, spaces.Discrete(2)), 2))
    with pytest.warns(UserWarning, match="it is of other classes than the one that was saved"):
        EZV2.load_checkpoint(tmp_path / "checkpoint", env=env).learn(10, reset_num_timesteps=False)
