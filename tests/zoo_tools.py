"""RL Zoo for the tests: its commands as subprocesses, its experiment manager in this process."""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import optuna

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def environment() -> dict[str, str]:
    """
    :return: environment variables with which the package's .pth file is at work in a new Python: it is, where the package is
        installed; where it is only on the path, a ``sitecustomize`` reads the file from the source tree
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    variables.pop("SB3_EZV2_NO_ZOO", None)
    code = "import sys; sys.exit('sb3_ezv2_zoo_hook' not in sys.modules)"
    if subprocess.run([sys.executable, "-c", code], env=variables).returncode != 0:
        folder = tempfile.mkdtemp()
        Path(folder, "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(ROOT)!r})\n")
        variables["PYTHONPATH"] = os.pathsep.join([folder, str(ROOT), variables.get("PYTHONPATH", "")])
    return variables


def run(*command: str, cwd: Path, fails: bool = False, **variables: str) -> str:
    """
    :param command: arguments of Python
    :param cwd: where
    :param fails: whether it is expected to
    :return: all of its output
    """
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert (result.returncode != 0) == fails, result.stdout
    return result.stdout


def load_study(storage: Path, name: str) -> optuna.Study:
    """:return: the study that RL Zoo has kept in a file"""
    from optuna.storages.journal import JournalFileBackend

    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(JournalFileBackend(str(storage))))


def manager(folder: Path, env_id: str, **settings: Any) -> Any:
    """:return: RL Zoo's ``ExperimentManager`` for EZV2 as its ``train`` makes it"""
    from rl_zoo3.exp_manager import ExperimentManager

    args = argparse.Namespace(env=env_id, env_kwargs=settings.get("env_kwargs"))
    settings = {"eval_freq": -1, "verbose": 0, "device": "cpu", "n_timesteps": -1, **settings}
    return ExperimentManager(args, "ezv2", env_id, str(folder), **settings)
