"""
Frames stored once against observations that were kept whole, frame by frame.

Shapes: N environments, B sequences, U unroll steps.
"""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from common import SpacesEnv
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize, VecTransposeImage

from sb3_ezv2.frames import ObservationStore, frames_per_observation
from sb3_ezv2.replay_buffer import SequenceReplayBuffer

FIRST = spaces.Box(0, 255, (2, 10, 9), np.uint8)
LAST = spaces.Box(0, 255, (10, 12, 2), np.uint8)
GREY = spaces.Box(0, 255, (4, 5), np.uint8)
ACTIONS = spaces.Discrete(3)
MIXED = spaces.Dict(camera=FIRST, second=spaces.Box(0, 255, (1, 5, 4), np.uint8), speed=spaces.Box(-1, 1, (2,), np.float32))


class Recorder:
    """
    Steps an environment with random actions and adds to buffers what SB3 would add.

    :param env: images with channels first
    :param buffers: all get the same
    """

    def __init__(self, env: VecEnv, *buffers: SequenceReplayBuffer):
        self.env, self.buffers = env, buffers
        self.obs: Any = env.reset()
        self.rng = np.random.default_rng(0)
        self.kept: dict[int, Any] = {}  # the newest observation of each slot, whole

    def steps(self, count: int) -> Recorder:
        for _ in range(count):
            actions = self.rng.integers(ACTIONS.n, size=self.env.num_envs)
            new, rewards, dones, infos = self.env.step(actions)
            following = copy(new)
            for index in np.flatnonzero(dones).tolist():
                final = infos[index]["terminal_observation"]
                if isinstance(following, dict):
                    for key in following:
                        following[key][index] = final[key]
                else:
                    following[index] = final
            for buffer in self.buffers:
                buffer.add(copy(self.obs), following, actions, rewards, dones, infos)
            slots = self.buffers[0].last_slots.tolist()
            ring = self.buffers[0].ring
            for index, slot in enumerate(slots):
                self.kept[slot] = row(self.obs, index)
                if dones[index]:
                    after = slot // ring * ring + (slot % ring + 1) % ring
                    self.kept[after] = row(following, index)
            self.obs = new
        return self


def copy(obs: Any) -> Any:
    """Of arrays or tensors, as arrays."""
    return {key: copy(value) for key, value in obs.items()} if isinstance(obs, dict) else np.asarray(obs).copy()


def row(obs: Any, index: int) -> Any:
    return {key: np.array(value[index]) for key, value in obs.items()} if isinstance(obs, dict) else np.array(obs[index])


def same(x: Any, y: Any) -> bool:
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    return x.dtype == th.as_tensor(y).dtype and np.array_equal(x.numpy(), np.asarray(y))


def make_env(space: spaces.Space, lengths: tuple[int, ...] = (1, 3, 11), n_stack: int = 4, wrap: Any = None) -> VecEnv:
    """Environments with episodes of these lengths; the last one truncates."""

    def build(index: int) -> gym.Env:
        env: gym.Env = SpacesEnv(space, ACTIONS, lengths[index], truncates=index == len(lengths) - 1)
        env.observation_space.seed(index)
        return env if wrap is None else wrap(env)

    env: VecEnv = DummyVecEnv([partial(build, index) for index in range(len(lengths))])
    env = VecFrameStack(env, n_stack) if n_stack > 1 else env
    return VecTransposeImage(env) if space is LAST else env


def make_buffer(env: VecEnv, frame_stack: int, size: int = 120, **settings: Any) -> SequenceReplayBuffer:
    settings = {"td_steps": 4, "td_steps_min": 2, "unroll_steps": 3, "seed": 0, **settings}
    return SequenceReplayBuffer(
        size, env.observation_space, ACTIONS, device="cpu", n_envs=env.num_envs, frame_stack=frame_stack, **settings
    )


def release(buffer: SequenceReplayBuffer) -> np.ndarray:
    """Give everything that may be sampled the same priority. :return: what may be"""
    fresh = buffer.take_fresh()
    buffer.update_priorities(fresh, np.ones(len(fresh)))
    return np.flatnonzero(buffer.weights)


@pytest.mark.parametrize("n_stack", [2, 4])
@pytest.mark.parametrize("space", [FIRST, LAST, MIXED], ids=["channels first", "channels last", "dict"])
def test_frame_by_frame_against_whole_observations(space: spaces.Space, n_stack: int) -> None:
    """Over several turns of the ring: episodes of one step, terminal observations, resets and their padding."""
    env = make_env(space, n_stack=n_stack)
    stacked, naive = make_buffer(env, n_stack), make_buffer(env, 1)
    recorder = Recorder(env, stacked, naive)
    for _ in range(12):
        recorder.steps(13)
        starts = release(stacked)
        assert len(starts) >= 18
        release(naive)
        batches = [buffer.sequences(starts) for buffer in (stacked, naive)]
        for name in ("observations", "bootstrap_observations"):
            assert same(getattr(batches[0], name), copy(getattr(batches[1], name))), name
        for b, slots in enumerate(batches[0].slots):
            for k, slot in enumerate(slots):
                observations = batches[0].observations
                found = (
                    {key: x[b, k] for key, x in observations.items()} if isinstance(observations, dict) else observations[b, k]
                )
                assert same(found, recorder.kept[int(slot)])
        # What they share decides the rest
        for name in ("rewards", "returns", "bootstrap_discounts", "observed", "value_mask"):
            assert th.equal(getattr(batches[0], name), getattr(batches[1], name))


def test_the_oldest_slots_are_not_sampled() -> None:
    """Their stacks begin before the oldest frame that is left."""
    env = make_env(FIRST, lengths=(1000,))
    stacked, naive = make_buffer(env, 4, 50), make_buffer(env, 1, 50)
    recorder = Recorder(env, stacked, naive)
    recorder.steps(50)
    assert len(release(stacked)) == len(release(naive))
    recorder.steps(30)
    allowed, all_slots = release(stacked), release(naive)
    oldest = (stacked.written[0] + np.arange(3)) % 50
    assert set(all_slots) - set(allowed) == set(oldest)
    # also of what was released but had to wait for its priority
    fresh_env = make_env(FIRST, lengths=(1000,))
    buffer = make_buffer(fresh_env, 4, 50)
    Recorder(fresh_env, buffer).steps(60)
    assert buffer.stamps[buffer.take_fresh()].min() == 60 - 50 + 3


def test_stack_of_gymnasium_repeats_the_first_frame() -> None:
    env = make_env(GREY, n_stack=1, wrap=lambda env: FrameStackObservation(env, 4))
    assert env.observation_space.shape == (4, 4, 5)
    stacked, naive = make_buffer(env, 4), make_buffer(env, 1)
    Recorder(env, stacked, naive).steps(70)
    starts = release(stacked)
    assert same(stacked.sequences(starts).observations, naive.sequences(starts).observations.numpy())


def test_bytes_stay_bytes_and_each_frame_is_stored_once() -> None:
    env = make_env(FIRST)
    buffer = make_buffer(env, 4)
    Recorder(env, buffer).steps(40)
    (array,) = buffer.store.arrays.values()
    assert array.dtype == np.uint8 and array.shape == (120, 2, 10, 9)
    batch = buffer.sequences(release(buffer))
    assert batch.observations.dtype == batch.bootstrap_observations.dtype == th.uint8
    assert batch.observations.shape[1:] == (4, 8, 10, 9)


def test_other_episodes_are_never_seen_through() -> None:
    """Closing the open episodes and forgetting everything: the next observation is the first of an episode."""
    env = make_env(FIRST, lengths=(30, 40))
    stacked, naive = make_buffer(env, 4), make_buffer(env, 1)
    recorder = Recorder(env, stacked, naive).steps(7)
    for buffer in (stacked, naive):
        buffer.truncate_open_episodes()
    recorder.obs = env.reset()
    recorder.steps(5)
    for buffer in (stacked, naive):
        buffer.reset()
    recorder.steps(20)  # in the middle of an episode
    starts = release(stacked)
    assert len(starts) > 20
    assert same(
        stacked.sequences(starts).observations, release(naive) is not None and naive.sequences(starts).observations.numpy()
    )


def test_saved_and_loaded() -> None:
    env = make_env(FIRST)
    buffer = make_buffer(env, 4)
    recorder = Recorder(env, buffer).steps(30)
    recorder.buffers = (buffer, pickle.loads(pickle.dumps(buffer)))
    recorder.steps(20)
    starts = release(buffer)
    assert same(recorder.buffers[1].sequences(starts).observations, buffer.sequences(starts).observations.numpy())


class Flicker(gym.ObservationWrapper):
    """After a while a stack's oldest frame changes."""

    seen = 0

    def observation(self, observation: np.ndarray) -> np.ndarray:
        self.seen += 1
        return np.concatenate([observation[:1] + (self.seen > 5), observation[1:]])


def test_observations_that_are_no_stacks() -> None:
    """Random ones, and stacks whose older frames change later."""
    env = make_env(spaces.Box(0, 255, (4, 6, 8), np.uint8), n_stack=1)
    with pytest.raises(ValueError, match=r"the 4 frames of an observation .*frame_stack=1"):
        Recorder(env, make_buffer(env, 4)).steps(3)
    env = make_env(GREY, lengths=(9,), n_stack=1, wrap=lambda env: Flicker(FrameStackObservation(env, 4)))
    with pytest.raises(ValueError, match="are not those of the observations before it"):
        Recorder(env, make_buffer(env, 4)).steps(7)
    with pytest.raises(ValueError, match="cannot be a stack of 3 frames"):
        make_buffer(env, 3)
    with pytest.raises(ValueError, match="is for images"):
        ObservationStore(spaces.Box(-1, 1, (4,)), 1, 10, frame_stack=4)


def test_frames_are_recognised() -> None:
    assert frames_per_observation(None) == 1
    assert frames_per_observation(make_env(FIRST, n_stack=1)) == 1
    assert frames_per_observation(make_env(LAST, n_stack=3)) == 3
    assert frames_per_observation(VecNormalize(VecMonitor(make_env(FIRST)), norm_obs=False)) == 4
    assert frames_per_observation(VecFrameStack(DummyVecEnv([lambda: gym.make("CartPole-v1")]), 4)) == 1


def test_memory_of_an_atari_buffer() -> None:
    atari = spaces.Box(0, 255, (12, 96, 96), np.uint8)
    assert 2.7e9 < SequenceReplayBuffer.estimate_nbytes(100_000, atari, spaces.Discrete(18), 4) <= 3.2e9
    env = make_env(FIRST)
    buffer = make_buffer(env, 4)
    arrays = [*vars(buffer).values(), *vars(buffer.store).values(), *buffer.store.arrays.values()]
    nbytes = sum(x.nbytes for x in arrays if isinstance(x, np.ndarray) and len(x) == 120)
    assert SequenceReplayBuffer.estimate_nbytes(120, env.observation_space, ACTIONS, 4) == pytest.approx(nbytes, rel=0.1)
