"""A run that is interrupted at any moment and goes on in another process is the run that was never interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from resume_tools import CASES, go_on

STOPS = [(17, "middle"), (46, "step"), (70, "rollout")]
"""While actions are random; within 20 updates of a target network, twice; amid episodes."""


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the cases gave in four processes one after the other."""
    folder = tmp_path_factory.mktemp("runs")
    for _ in range(len(STOPS) + 1):
        command = [sys.executable, str(Path(__file__).with_name("resume_tools.py")), str(folder), json.dumps(STOPS)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_interrupted_run_equals_the_whole_one(name: str, continued: dict[str, Any], tmp_path: Path) -> None:
    whole = go_on(name, tmp_path, [])
    assert whole["num_timesteps"] >= 96 and whole["_n_updates"] > 20 and len(whole["log"]) > 1
    different = [key for key in whole if continued[name].get(key) != whole[key]]
    assert not different
