"""Nights and farms: memory, files and threads that do not grow, copies, and agents beside each other."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch as th
from common import make, weights
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_ezv2 import MlpPolicy


def resident_bytes() -> int:
    """:return: memory of this process"""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Memory(BaseCallback):
    """Remembers how much memory the process has. :param every: steps between two looks"""

    def __init__(self, every: int):
        super().__init__()
        self.every = every
        self.seen: list[int] = []

    def _on_step(self) -> bool:
        if self.n_calls % self.every == 0:
            self.seen.append(resident_bytes())
        return True


def memory_growth(steps: int, every: int) -> tuple[int, list[int]]:
    """:return: bytes between the first third of a run, when the replay buffer is full, and its end; all that was seen"""
    memory = Memory(every)
    make(buffer_size=200, train_freq=4).learn(steps, callback=memory)
    seen = memory.seen
    return max(seen[-len(seen) // 3 :]) - max(seen[: len(seen) // 3]), seen


def test_memory_is_flat() -> None:
    growth, seen = memory_growth(1_200, 50)
    assert growth < 2e6, seen


def live(cycles: int, steps: int = 44) -> list[tuple[int, int, int]]:
    """:return: after each cycle of making, training and deleting an agent: open files, threads, bytes"""
    counts = []
    for _ in range(cycles):
        model = make(make_vec_env("CartPole-v1", 2))
        model.learn(steps)
        assert model.env is not None
        model.env.close()
        del model
        memory = resident_bytes()
        counts.append((len(os.listdir("/proc/self/fd")), threading.active_count() + _tasks(), memory))
    return counts


def _tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def test_agents_leave_nothing_behind() -> None:
    counts = live(8)
    files, threads, memory = zip(*counts[3:])
    assert len(set(files)) == 1 and len(set(threads)) == 1
    assert memory[-1] - memory[0] < 3e6, memory


def test_two_agents_do_not_disturb_each_other() -> None:
    alone = [weights(make(seed=seed).learn(60)) for seed in (1, 2)]
    first, second = make(seed=1), make(seed=2)
    for number, model in enumerate((first, second, first, second)):
        model.learn(60)
        if number < 2:
            assert th.equal(weights(model), alone[number])
    # and at the same time
    models = [make(seed=1), make(seed=2)]
    threads = [threading.Thread(target=model.learn, args=(60,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(th.equal(weights(model), expected) for model, expected in zip(models, alone))


def test_policy_copies_are_independent() -> None:
    model = make("Pendulum-v1").learn(50)
    observations = np.stack([model.observation_space.sample() for _ in range(3)])
    expected, _ = model.predict(observations, deterministic=True)
    for policy in (copy.deepcopy(model.policy), pickle.loads(pickle.dumps(model.policy))):
        assert isinstance(policy, MlpPolicy)
        model.learn(10, reset_num_timesteps=False)
        np.testing.assert_array_equal(policy.predict(observations, deterministic=True)[0], expected)
        # it searches with its own weights, and what becomes of them leaves the agent alone
        agents, _ = model.predict(observations, deterministic=True)
        for parameter in policy.averaged_network.policy_head.parameters():
            th.nn.init.normal_(parameter)
        assert policy.search.model is policy.averaged_network
        assert not np.array_equal(policy.predict(observations, deterministic=True)[0], expected)
        np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], agents)


def predict_in_worker(policy: MlpPolicy, observations: np.ndarray) -> np.ndarray:
    """What a worker does with the policy it was given."""
    th.set_num_threads(1)
    return policy.predict(observations, deterministic=True)[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_predict(method: str) -> None:
    model = make("Pendulum-v1").learn(50)
    # few, which are searched in C++, and more, which are searched by PyTorch
    for number in (3, 70):
        observations = np.stack([model.observation_space.sample() for _ in range(number)])
        expected, _ = model.predict(observations, deterministic=True)
        with multiprocessing.get_context(method).Pool(1) as pool:
            result = pool.apply_async(predict_in_worker, (model.policy, observations)).get(timeout=120)
        np.testing.assert_allclose(result, expected, atol=1e-5)
