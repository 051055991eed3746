"""Shared by all tests: one thread, so that results and run times do not depend on the machine's load, and one renderer."""

import os
import subprocess
import sys

import pytest
import torch as th


def choose_renderer() -> None:
    """On a machine without a display, how dm_control renders: EGL or OSMesa if one is there. Before it is imported."""
    if any(name in os.environ for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")):
        return
    for library in ("egl", "osmesa"):
        variables = {**os.environ, "MUJOCO_GL": library}
        check = subprocess.run([sys.executable, "-c", "import dm_control._render"], env=variables, capture_output=True)
        if check.returncode == 0:
            os.environ["MUJOCO_GL"] = library
            return
    os.environ["MUJOCO_GL"] = "disable"


choose_renderer()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    th.set_num_threads(1)
