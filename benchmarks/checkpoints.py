"""
Saved states of unfinished runs of any algorithm: the agent, its replay buffer, and what the run needs besides. And the lock
that keeps two processes from writing the files of one run.
"""

import fcntl
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm


@contextmanager
def alone(out: Path, name: str) -> Iterator[None]:
    """
    Within, no other process can be at the same run.

    :param out: the results' folder
    :param name: of the run, unique in that folder
    :raises BlockingIOError: another one is
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = out / f".{name}.lock"
    with open(lock, "w") as file:
        try:
            # given back by the system when the process ends, however it does
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another process is at the run {name} in {out}: wait for it, or give another --out."
            raise BlockingIOError(message) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


class Checkpoints:
    """
    The saved state of an unfinished run: a folder per checkpoint, of which the newest complete one counts.

    A checkpoint is written under a temporary name and renamed when it is whole, and only then is the older one removed:
    a process killed at any moment leaves a usable one.

    :param out: the results' folder
    :param name: of the run, unique in that folder
    """

    def __init__(self, out: Path, name: str):
        self.root = out / "checkpoints"
        self.name = name

    def _folders(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [(re.fullmatch(re.escape(self.name) + r"_step(\d+)", path.name), path) for path in self.root.glob("*")]
        return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]

    def save(self, model: BaseAlgorithm, state: dict[str, Any]) -> None:
        """
        :param model: the agent, between two updates
        :param state: everything else that the run needs, picklable
        """
        self.root.mkdir(parents=True, exist_ok=True)
        # Checkpoints are large and short-lived: no repository shall pick them up.
        (self.root / ".gitignore").write_text("*\n", encoding="utf-8")
        older = self._folders()
        final = self.root / f"{self.name}_step{model.num_timesteps}"
        if final in older:
            return
        part = final.with_name(final.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        model.save(part / "agent.zip")
        if getattr(model, "replay_buffer", None) is not None:
            model.save_replay_buffer(part / "replay_buffer.pkl")  # type: ignore[attr-defined]
        (part / "state.pkl").write_bytes(pickle.dumps(state))
        part.rename(final)
        for folder in older:
            shutil.rmtree(folder)

    def newest(self) -> Path | None:
        """The folder to go on from, if there is one."""
        return (self._folders() or [None])[-1]  # type: ignore[list-item]

    def remove(self) -> None:
        """Forget this run's checkpoints, incomplete ones too."""
        for path in [*self._folders(), *self.root.glob(f"{self.name}_step*.part")]:
            shutil.rmtree(path, ignore_errors=True)
        if self.root.is_dir() and [path.name for path in self.root.iterdir()] == [".gitignore"]:
            shutil.rmtree(self.root)
