"""Shared by all tests: one thread, so that results and run times do not depend on the machine's load."""

import pytest
import torch as th


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    th.set_num_threads(1)
