"""
Checkpoints of a training run: one file with all that going on needs, and a callback that writes it in time.

The file is a saved agent like any other, which ``EZV2.load`` and ``set_parameters`` read, with three entries more:
the replay buffer, the states of the environments and their wrappers, and those of the random generators.
"""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import random
import re
import warnings
import zipfile
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ezv2.env_states import restore_env_states, save_env_states
from sb3_ezv2.saving import READ_ERRORS, TEMPORARY, file_name, reading, replacing, unreadable

BUFFER_ENTRY, STATES_ENTRY = "replay_buffer.pkl", "checkpoint.pkl"
"""Entries of the file besides those of SB3."""


def random_states() -> dict[str, Any]:
    """:return: the states of the process's generators: Python's, NumPy's and PyTorch's"""
    cuda = th.cuda.get_rng_state_all() if th.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": th.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Undo whatever was drawn since :func:`random_states`. :param states: its result"""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all(states["cuda"])


def save_checkpoint(model: BaseAlgorithm, path: str | pathlib.Path, episodes: bool = True, extra: Any = None) -> None:
    """
    Save all that is needed to go on as if there had been no interruption: agent, replay buffer, environments, random states.

    An environment that cannot give up its state is named in a warning. The agent that is loaded then begins new episodes.

    :param model: the agent, between two steps of the environments or in a callback
    :param path: of the file, which is replaced when the new one is complete; ``.zip`` is appended if it has no ending
    :param episodes: save the states of the environments
    :param extra: anything picklable, which :func:`load_checkpoint` gives back as ``model.checkpoint_extra``
    :raises OSError: the file could not be written; one that was there is as it was
    """
    assert model.env is not None, "the agent has no environment"
    environments = save_env_states(model.env, model, episodes)
    if environments["problems"]:
        warnings.warn(
            f"{'; '.join(environments['problems'])} cannot give up the state of the running episode, which an agent loaded "
            "from this checkpoint closes as truncated. The wrapper sb3_ezv2.wrappers.Resumable can help.",
            stacklevel=2,
        )
    states = {"environments": environments["states"], "random": random_states(), "extra": extra}
    # In memory first: what PyTorch raises when a disk is full does not tell so
    agent = io.BytesIO()
    model.save(agent)
    with replacing(path, "zip") as file:
        file.write(agent.getbuffer())
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(STATES_ENTRY, pickle.dumps(states))
            if getattr(model, "replay_buffer", None) is not None:
                with archive.open(BUFFER_ENTRY, "w", force_zip64=True) as entry:
                    pickle.dump(model.replay_buffer, entry, protocol=pickle.HIGHEST_PROTOCOL)  # type: ignore[attr-defined]


def restore_checkpoint(model: Any, path: str | pathlib.Path) -> None:
    """
    Give an agent that was loaded with ``force_reset=False`` what :func:`save_checkpoint` has saved besides it.

    :param model: the agent, in environments as those that were saved
    :param path: of the file
    :raises ValueError: the file is no checkpoint, is damaged, or is of other environments
    """
    with reading(path, "zip") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                if STATES_ENTRY not in archive.namelist():
                    raise ValueError(
                        f"{file_name(path)} holds an agent alone, not a checkpoint: use load() and load_replay_buffer()."
                    )
                states = pickle.loads(archive.read(STATES_ENTRY))
                buffer = None
                if BUFFER_ENTRY in archive.namelist():
                    with archive.open(BUFFER_ENTRY) as entry:
                        buffer = pickle.load(entry)
        except READ_ERRORS as error:
            raise unreadable(path, error) from error
    if buffer is not None:
        buffer.device = model.device
        model.replay_buffer = buffer
    reason = restore_env_states(model.env, model, states["environments"])
    if reason is not None:
        warnings.warn(
            f"the running episode cannot be taken up again ({reason}): it is closed as truncated, and new ones begin.",
            stacklevel=3,
        )
        model._last_obs = None
        if model.seed is not None:
            # load() has seeded the environments as at the start of the run, whose episodes would all come again
            model.env.seed((model.seed + model.num_timesteps) % 2**31)
    model.checkpoint_extra = states["extra"]
    set_random_states(states["random"])


def _file_name(name_prefix: str, ending: str) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(name_prefix)}_(\d+)_steps{ending}")


def _checkpoints(folder: pathlib.Path, name_prefix: str, ending: str) -> list[pathlib.Path]:
    """:return: the checkpoints of a folder, in the order in which they were written"""
    pattern = _file_name(name_prefix, ending)
    found = [
        (path.stat().st_mtime_ns, int(match[1]), path) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))
    ]
    return [path for *_, path in sorted(found)]


def latest_checkpoint(save_path: str | pathlib.Path, name_prefix: str = "rl_model") -> pathlib.Path | None:
    """
    :param save_path: folder of a :class:`FullCheckpointCallback`
    :param name_prefix: the callback's
    :return: the file that was written last, after an error or in time; None if there is none
    """
    folder = pathlib.Path(save_path)
    if not folder.is_dir():
        return None
    return (_checkpoints(folder, name_prefix, r"(_error)?\.zip") or [None])[-1]  # type: ignore[list-item]


def _ended_processes(env: VecEnv) -> str:
    """:return: which environments' processes have ended by themselves, in sentences"""
    codes = [process.exitcode for process in getattr(env.unwrapped, "processes", [])]
    ended = [(index, code) for index, code in enumerate(codes) if code is not None]
    return "".join(f" The process of environment {index} has ended (exit code {code})." for index, code in ended)


class FullCheckpointCallback(BaseCallback):
    """
    Writes checkpoints for ``EZV2.load_checkpoint``: agent, replay buffer, environments and random states in one file.

    They are written after every ``save_freq`` calls of ``env.step()``, between two updates; when the training ends, or a
    callback or Ctrl-C stops it; and when it fails, under the ending ``_steps_error.zip``. A process that is killed at any
    moment leaves the last complete one. A file that cannot be written while training goes on, for instance on a full disk, is
    a warning alone.

    :param save_freq: calls of ``env.step()`` between two checkpoints; with n environments a call is n steps
    :param save_path: the folder
    :param name_prefix: of the files, ``<name_prefix>_<steps>_steps.zip``
    :param keep: checkpoints that are kept, the newest ones; one after an error is kept besides them
    :param verbose: 0: no output, 2: say what is written
    :raises ValueError: ``save_freq`` or ``keep`` is not positive
    :raises OSError: before the training begins: nothing can be written to the folder
    """

    def __init__(
        self, save_freq: int, save_path: str | pathlib.Path, name_prefix: str = "rl_model", keep: int = 3, verbose: int = 0
    ):
        super().__init__(verbose)
        if save_freq < 1 or keep < 1:
            raise ValueError(f"save_freq ({save_freq}) and keep ({keep}) must be at least 1.")
        self.save_freq = save_freq
        self.folder = pathlib.Path(save_path)
        self.name_prefix = name_prefix
        self.keep = keep
        self._due = False
        self._saved_at = (-1, -1)

    def _init_callback(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # of processes that were killed while they wrote
        for path in self.folder.iterdir():
            if _file_name(self.name_prefix, rf"(_error)?\.zip{re.escape(TEMPORARY)}").fullmatch(path.name):
                path.unlink()
        with replacing(self.folder / f"{self.name_prefix}.writable", ""):
            pass
        (self.folder / f"{self.name_prefix}.writable").unlink()

    def _on_training_start(self) -> None:
        self._saved_at = self._now()
        on_failure = getattr(self.model, "on_failure", None)
        if on_failure is not None:
            on_failure.append(self._failed)

    def _on_step(self) -> bool:
        self._due = self._due or self.n_calls % self.save_freq == 0
        return True

    def _on_rollout_start(self) -> None:
        # Here every step is stored and learned from; in _on_step() the last one is not
        if self._due:
            self._try_to_save()

    def _on_training_end(self) -> None:
        if self._saved_at != self._now():
            self._try_to_save()

    def _now(self) -> tuple[int, int]:
        """:return: steps and updates so far"""
        return self.model.num_timesteps, getattr(self.model, "_n_updates", 0)

    def _failed(self, error: BaseException) -> None:
        """:param error: that ends the training"""
        if isinstance(error, KeyboardInterrupt):
            if self._saved_at != self._now():
                self._try_to_save()
            return
        older = _checkpoints(self.folder, self.name_prefix, r"_error\.zip")
        path = self._try_to_save("_error")
        if path is not None:
            ended = f"The training was ended by {type(error).__name__}.{_ended_processes(self.training_env)}"
            warnings.warn(f"{ended} The agent was saved to {path}")
            for other in older:
                if other != path:
                    other.unlink(missing_ok=True)

    def _try_to_save(self, ending: str = "") -> pathlib.Path | None:
        try:
            return self._save(ending)
        except OSError as error:
            warnings.warn(f"No checkpoint at step {self.model.num_timesteps}: {error}")
            return None

    def _save(self, ending: str) -> pathlib.Path:
        self._due, self._saved_at = False, self._now()
        path = self.folder / f"{self.name_prefix}_{self.model.num_timesteps}_steps{ending}.zip"
        if self.verbose >= 2:
            print(f"Saving a checkpoint to {path}")
        # An agent whose environments failed has forgotten the last observation
        save_checkpoint(self.model, path, episodes=self.model._last_obs is not None)
        os.utime(path)  # the order of the files is that of their times, a replaced one counts as new
        for old in _checkpoints(self.folder, self.name_prefix, r"\.zip")[: -self.keep]:
            old.unlink(missing_ok=True)
        return path
