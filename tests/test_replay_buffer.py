"""
The replay of sequences against Python lists that never forget, and against episodes worked out by hand.

Shapes: B sequences, U unroll steps, N environments.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import Env, spaces
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ezv2.replay_buffer import MIN_PRIORITY, Batch, SequenceReplayBuffer

RUNNING, TERMINATED, TRUNCATED = "running", "terminated", "truncated"
OBS = spaces.Box(-np.inf, np.inf, (2,), np.float32)
BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)


# --------------------------------------------------------------------------------------------------------------------
# The reference
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Episode:
    """
    Everything that happened in an episode so far.

    :param observations: one more than actions once the episode has ended, as many before
    """

    observations: list[np.ndarray] = dataclasses.field(default_factory=list)
    actions: list[Any] = dataclasses.field(default_factory=list)
    rewards: list[float] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)  # transitions of all environments before each
    end: str = RUNNING

    @property
    def last(self) -> int:
        """Step of the last observation that is known."""
        return len(self.observations) - 1


class Reference:
    """
    Lists of episodes, written together with a buffer.

    :param buffer: gives its settings; what it stores is not looked at
    """

    def __init__(self, buffer: SequenceReplayBuffer):
        self.buffer = buffer
        self.running = [Episode() for _ in range(buffer.n_envs)]
        # the newest slots of each environment: (episode, step), also of final observations
        self.rings: list[list[tuple[Episode, int]]] = [[] for _ in range(buffer.n_envs)]
        self.place: dict[int, tuple[Episode, int]] = {}  # of each slot that was ever a transition's, its last one
        self.total = 0

    def add(self, obs: np.ndarray, next_obs: np.ndarray, action: np.ndarray, reward: np.ndarray, ends: list[str]) -> None:
        infos = [{"TimeLimit.truncated": True} if end == TRUNCATED else {} for end in ends]
        done = np.array([end != RUNNING for end in ends])
        self.buffer.add(obs, next_obs, action, reward, done, infos)
        assert self.buffer.last_slots.shape == (self.buffer.n_envs,)
        for env, end in enumerate(ends):
            episode = self.running[env]
            episode.observations.append(np.array(obs[env]))
            episode.actions.append(np.array(action[env]))
            episode.rewards.append(float(np.float32(reward[env])))
            episode.counts.append(self.total + env)
            self.rings[env].append((episode, len(episode.actions) - 1))
            self.place[int(self.buffer.last_slots[env])] = self.rings[env][-1]
            if end != RUNNING:
                episode.observations.append(np.array(next_obs[env]))
                episode.end = end
                self.rings[env].append((episode, episode.last))
                self.running[env] = Episode()
            self.rings[env] = self.rings[env][-self.buffer.ring :]
        self.total += len(ends)

    def truncate_open_episodes(self) -> None:
        self.buffer.truncate_open_episodes()
        for env, episode in enumerate(self.running):
            if episode.actions:
                # the last transition is given up: its next observation is not known
                episode.actions.pop()
                episode.rewards.pop()
                episode.end = TRUNCATED
                self.running[env] = Episode()

    def stored(self) -> dict[int, tuple[Episode, int]]:
        """Slots of the transitions that are there now, with what they are."""
        there = {(id(episode), step) for ring in self.rings for episode, step in ring}
        return {
            slot: (episode, step)
            for slot, (episode, step) in self.place.items()
            if (id(episode), step) in there and step < len(episode.actions)
        }

    def horizon(self, episode: Episode, start: int) -> int:
        """V1 Eq. 12 with an age in transitions."""
        buffer = self.buffer
        shrunk = buffer.td_steps - (self.total - episode.counts[start]) // buffer.td_steps_age
        return max(buffer.td_steps_min, min(buffer.td_steps, shrunk))

    def check(self, batch: Batch, starts: list[tuple[Episode, int]], unroll: int, env: VecNormalize | None = None) -> None:
        """Compare everything that is not masked with what the lists say."""
        for row, (episode, start) in enumerate(starts):
            fields: list[Any] = [field[row] for field in batch]
            self._check_row(Batch(*fields), episode, start, unroll, env)

    def _check_row(self, row: Batch, episode: Episode, start: int, unroll: int, env: VecNormalize | None) -> None:
        gamma = self.buffer.gamma

        def observation(step: int) -> np.ndarray:
            x = episode.observations[step].reshape(self.buffer.obs_shape)
            return x if env is None else env.normalize_obs(x)  # type: ignore[return-value]

        def reward(step: int) -> float:
            x = np.array([episode.rewards[step]])
            return float(x[0] if env is None else env.normalize_reward(x)[0])

        count, last, terminated = len(episode.actions), episode.last, episode.end == TERMINATED
        horizon = self.horizon(episode, start)
        assert row.ages == self.total - episode.counts[start]
        expected: dict[str, list[bool]] = {"observed": [], "reward_mask": [], "value_mask": [], "policy_mask": []}
        for k in range(unroll + 1):
            t = start + k
            expected["observed"].append(t <= last)
            expected["policy_mask"].append(t < count)
            # always an observation: beyond the last one, that one again
            np.testing.assert_allclose(row.observations[k], observation(min(t, last)), rtol=1e-6)
            assert row.slots[k] == row.slots[min(t, last) - start]
            if k < unroll:
                expected["reward_mask"].append(t < count or terminated)
                if t < count:
                    np.testing.assert_allclose(row.rewards[k], reward(t), rtol=1e-6)
                    np.testing.assert_array_equal(row.actions[k], episode.actions[t])
                else:
                    assert row.rewards[k] == 0
                    space = self.buffer.action_space
                    low, high = (0, space.n - 1) if isinstance(space, spaces.Discrete) else (-1, 1)
                    assert (row.actions[k] >= low).all() and (row.actions[k] <= high).all()
            if terminated and t >= count:
                expected["value_mask"].append(True)
                assert row.returns[k] == 0 and row.bootstrap_discounts[k] == 0
                continue
            length = min(horizon, last - t)
            expected["value_mask"].append(length > 0)
            if length > 0:
                discounted = sum(gamma**i * reward(t + i) for i in range(length))
                np.testing.assert_allclose(row.returns[k], discounted, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(row.bootstrap_observations[k], observation(t + length), rtol=1e-6)
                discount = 0.0 if terminated and t + length == count else gamma**length
                np.testing.assert_allclose(row.bootstrap_discounts[k], discount, rtol=1e-6)
        for name, mask in expected.items():
            assert getattr(row, name).tolist() == mask, f"{name} from step {start} of {count}, {episode.end}"


class Stream:
    """
    Random episodes for a buffer and its reference.

    :param buffer: to be filled
    :param seed: of everything
    :param ending: probability that a step ends an episode
    """

    def __init__(self, buffer: SequenceReplayBuffer, seed: int = 0, ending: float = 0.1):
        self.buffer = buffer
        self.reference = Reference(buffer)
        self.rng = np.random.default_rng(seed)
        self.ending = ending
        self.observations = self._observe()

    def _observe(self) -> np.ndarray:
        space = self.buffer.observation_space
        if isinstance(space, spaces.Box):
            return self.rng.normal(size=(self.buffer.n_envs, *space.shape)).astype(space.dtype)
        space.seed(int(self.rng.integers(2**31)))
        return np.stack([space.sample() for _ in range(self.buffer.n_envs)])

    def step(self, ends: list[str] | None = None) -> None:
        """One transition of each environment, with episode ends by chance if none are given."""
        n_envs = self.buffer.n_envs
        if ends is None:
            ends = [str(self.rng.choice([TERMINATED, TRUNCATED])) if self.rng.random() < self.ending else RUNNING] * n_envs
            ends = [end if self.rng.random() < 0.7 else RUNNING for end in ends]
        space = self.buffer.action_space
        if isinstance(space, spaces.Discrete):
            action = self.rng.integers(space.n, size=n_envs)
        else:
            action = self.rng.uniform(-1, 1, size=(n_envs, self.buffer.action_dim)).astype(np.float32)
        next_obs = self._observe()
        self.reference.add(self.observations, next_obs, action, self.rng.normal(size=n_envs), ends)
        # after an end, the next episode starts somewhere else
        new = self._observe()
        ended = np.array([end != RUNNING for end in ends]).reshape(-1, *[1] * (new.ndim - 1))
        self.observations = np.where(ended, new, next_obs)

    def steps(self, count: int) -> Stream:
        for _ in range(count):
            self.step()
        return self

    def release(self, errors: float = 1.0) -> np.ndarray:
        """Give the fresh transitions equal priorities. :return: their slots"""
        fresh = self.buffer.take_fresh()
        self.buffer.update_priorities(fresh, np.full(len(fresh), errors))
        return fresh


def make(
    buffer_size: int = 200, observation_space: spaces.Space = OBS, action_space: spaces.Space = BOX, **settings: Any
) -> SequenceReplayBuffer:
    defaults: dict[str, Any] = dict(gamma=0.9, unroll_steps=3, td_steps=6, td_steps_min=2, td_steps_age=15, seed=0)
    return SequenceReplayBuffer(buffer_size, observation_space, action_space, device="cpu", **{**defaults, **settings})


def names_of(slots: Any, reference: Reference) -> set[tuple[int, int]]:
    """What is in these slots, as (number of the episode's first transition, step)."""
    stored = reference.stored()
    return {(stored[int(slot)][0].counts[0], stored[int(slot)][1]) for slot in slots}


# --------------------------------------------------------------------------------------------------------------------
# Random streams
# --------------------------------------------------------------------------------------------------------------------

# (settings, length of the stream, probability of an episode's end)
STREAMS: list[tuple[dict[str, Any], int, float]] = [
    (dict(), 90, 0.1),
    (dict(n_envs=3), 60, 0.1),  # not full
    (dict(n_envs=3, buffer_size=100), 120, 0.1),  # 33 each: wraps around
    (dict(buffer_size=20), 150, 0.02),  # episodes longer than the ring
    (dict(buffer_size=9), 60, 0.0),  # one that never ends in the smallest ring
    (dict(buffer_size=25), 200, 0.6),  # episodes of one and two steps
    (dict(unroll_steps=9, td_steps=2, td_steps_min=1, buffer_size=40), 130, 0.15),  # the unroll is longer
    (dict(unroll_steps=1, td_steps=1, td_steps_min=1, buffer_size=40), 90, 0.2),
    (dict(td_steps_age=1), 90, 0.05),
    (dict(td_steps_age=10**9, n_envs=2), 90, 0.05),
    (dict(td_steps_min=6, action_space=spaces.Discrete(4)), 90, 0.1),  # the paper's constant horizon
    (dict(gamma=1.0), 60, 0.1),
    (dict(gamma=0.0), 60, 0.1),
]


@pytest.mark.parametrize(("settings", "length", "ending"), STREAMS, ids=[str(index) for index in range(len(STREAMS))])
def test_sequences_of_random_streams(settings: dict[str, Any], length: int, ending: float) -> None:
    buffer = make(**settings)
    stream = Stream(buffer, seed=length, ending=ending)
    unroll = buffer.unroll_steps
    for _ in range(5):
        stream.steps(length // 5)
        stored = stream.reference.stored()
        assert buffer.size() == len(stored)
        slots = np.array(list(stored))
        batch = buffer.sequences(slots)
        np.testing.assert_array_equal(batch.slots[:, 0], slots)
        stream.reference.check(batch, list(stored.values()), unroll)
        assert (batch.weights == 1).all()
        # as priorities are calculated: no unroll at all
        stream.reference.check(buffer.sequences(slots, unroll_steps=0), list(stored.values()), 0)
    stream.reference.truncate_open_episodes()
    stored = stream.reference.stored()
    stream.reference.check(buffer.sequences(np.array(list(stored))), list(stored.values()), unroll)
    stream.observations = stream._observe()
    stream.steps(10)
    stored = stream.reference.stored()
    stream.reference.check(buffer.sequences(np.array(list(stored))), list(stored.values()), unroll)


def test_types_and_shapes() -> None:
    buffer = make(n_envs=2)
    stream = Stream(buffer).steps(40)
    stream.release()
    batch = buffer.sample(7)
    for name in ("observed", "reward_mask", "value_mask", "policy_mask"):
        assert getattr(batch, name).dtype == th.bool
    for name in ("rewards", "returns", "bootstrap_discounts", "weights", "actions", "observations"):
        assert getattr(batch, name).dtype == th.float32
    assert batch.observations.shape == batch.bootstrap_observations.shape == (7, 4, 2)
    assert batch.actions.shape == (7, 3, 3) and batch.rewards.shape == batch.reward_mask.shape == (7, 3)
    for name in ("slots", "returns", "bootstrap_discounts", "observed", "value_mask", "policy_mask"):
        assert getattr(batch, name).shape == (7, 4)
    assert batch.weights.shape == batch.ages.shape == (7,)
    # a batch is a copy
    before = batch.observations.clone()
    stream.steps(200)
    assert th.equal(batch.observations, before)


def test_padding_actions_are_random() -> None:
    for action_space in (BOX, spaces.Discrete(4)):
        buffer = make(action_space=action_space)
        stream = Stream(buffer, ending=0.0)
        for _ in range(10):
            stream.step([RUNNING])
        stream.step([TERMINATED])
        start = np.repeat(buffer.last_slots, 3000)
        padding = buffer.sequences(start).actions[:, 1:]  # of the last transition
        if isinstance(action_space, spaces.Discrete):
            counts = th.bincount(padding.flatten(), minlength=4) / padding.numel()
            assert padding.dtype == th.int64
            th.testing.assert_close(counts, th.full((4,), 0.25), rtol=0, atol=0.03)
        else:
            assert padding.abs().max() <= 1
            th.testing.assert_close(padding.mean((0, 1)), th.zeros(3), rtol=0, atol=0.04)
            th.testing.assert_close(padding.std((0, 1)), th.full((3,), 3**-0.5), rtol=0, atol=0.03)


class Nothing(Env[Any, Any]):
    """Only has spaces."""

    observation_space = OBS
    action_space = BOX


@pytest.mark.parametrize("what", ["both", "observations", "rewards"])
def test_vec_normalize(what: str) -> None:
    """Raw numbers are stored; a batch has them normalised by the statistics of now, and returns are of such rewards."""
    env = VecNormalize(
        DummyVecEnv([Nothing]), norm_obs=what != "rewards", norm_reward=what != "observations", clip_reward=0.4, clip_obs=1.5
    )
    buffer = make(80)
    stream = Stream(buffer).steps(70)
    stored = stream.reference.stored()
    for mean, var in ((0.5, 4.0), (-3.0, 0.1)):
        if what != "rewards":
            assert not isinstance(env.obs_rms, dict)
            env.obs_rms.mean, env.obs_rms.var = np.full(2, mean), np.full(2, var)
        env.ret_rms.var = np.array(9 * var)
        batch = buffer.sequences(np.array(list(stored)), env=env)
        stream.reference.check(batch, list(stored.values()), 3, env)
    stream.release()
    batch = buffer.sample(20, env=env)
    stream.reference.check(batch, [stored[int(slot)] for slot in batch.slots[:, 0]], 3, env)


@pytest.mark.parametrize(
    "space",
    [
        OBS,
        spaces.Box(-1.0, 1.0, (2, 3), np.float64),
        spaces.Box(0, 255, (4, 4, 3), np.uint8),
        spaces.Discrete(5),
        spaces.MultiDiscrete([3, 2, 4]),
        spaces.MultiBinary(6),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "action_space", [spaces.Discrete(3), spaces.Box(-1.0, 1.0, (1,)), spaces.Box(-1.0, 1.0, (2,))], ids=str
)
def test_spaces(space: spaces.Space, action_space: spaces.Space) -> None:
    buffer = make(30, space, action_space, n_envs=2)
    stream = Stream(buffer).steps(40)
    stored = stream.reference.stored()
    batch = buffer.sequences(np.array(list(stored)))
    stream.reference.check(batch, list(stored.values()), 3)
    assert batch.observations.shape[2:] == (space.shape or (1,))
    # stored in their own type, which is what the estimate counts
    assert buffer.store.arrays[None].dtype == space.dtype
    arrays = [*vars(buffer).values(), *buffer.store.arrays.values()]
    nbytes = sum(x.nbytes for x in arrays if isinstance(x, np.ndarray) and len(x) == 2 * buffer.ring)
    assert SequenceReplayBuffer.estimate_nbytes(30, space, action_space) == pytest.approx(nbytes, rel=0.1)


# --------------------------------------------------------------------------------------------------------------------
# By hand
# --------------------------------------------------------------------------------------------------------------------


def episode_by_hand(buffer: SequenceReplayBuffer, first: int, length: int, end: str | None) -> list[int]:
    """
    Write an episode of one environment: step t has observation first + t, action t % 2 and reward 2^t.

    :param end: None: it goes on
    :return: slots of its transitions
    """
    slots = []
    for t in range(length):
        over = end is not None and t == length - 1
        buffer.add(
            np.array([[first + t]], np.float32),
            np.array([[first + t + 1]], np.float32),
            np.array([t % 2]),
            np.array([2.0**t]),
            np.array([over]),
            [{"TimeLimit.truncated": end == TRUNCATED}],
        )
        slots.append(int(buffer.last_slots[0]))
    return slots


def by_hand(buffer_size: int = 30, **settings: Any) -> SequenceReplayBuffer:
    """Unroll 3, horizon 2, gamma 1/2."""
    space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    defaults: dict[str, Any] = dict(gamma=0.5, unroll_steps=3, td_steps=2, td_steps_min=2, td_steps_age=1000)
    return make(buffer_size, space, spaces.Discrete(2), **{**defaults, **settings})


def values_of(batch: Batch, row: int = 0) -> list[float | None]:
    """n-step values of a sequence where an observation's own number is its value; None where they are masked."""
    values = batch.returns + batch.bootstrap_discounts * batch.bootstrap_observations[..., 0]
    return [x if keep else None for x, keep in zip(values[row].tolist(), batch.value_mask[row].tolist())]


def test_terminal_by_hand() -> None:
    """Observations 10, 11, 12, 13 (the last one final), rewards 1, 2, 4."""
    buffer = by_hand()
    slots = episode_by_hand(buffer, 10, 3, TERMINATED)
    batch = buffer.sequences(np.array(slots))
    assert batch.observations[..., 0].tolist() == [[10, 11, 12, 13], [11, 12, 13, 13], [12, 13, 13, 13]]
    assert batch.rewards.tolist() == [[1, 2, 4], [2, 4, 0], [4, 0, 0]]
    assert batch.actions[0].tolist() == [0, 1, 0] and batch.actions[1, :2].tolist() == [1, 0]
    assert batch.observed.tolist() == [[True] * 4, [True, True, True, False], [True, True, False, False]]
    assert batch.policy_mask.tolist() == [[True, True, True, False], [True, True, False, False], [True, False, False, False]]
    # after the terminal rewards and values are 0, and that is learnt
    assert batch.reward_mask.all() and batch.value_mask.all()
    # 1 + 2/2 + 12/4; 2 + 4/2; 4; 0
    assert values_of(batch, 0) == [5, 4, 4, 0]
    assert values_of(batch, 1) == [4, 4, 0, 0]
    assert values_of(batch, 2) == [4, 0, 0, 0]
    assert batch.bootstrap_discounts.tolist() == [[0.25, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_truncation_by_hand() -> None:
    """The same episode, cut off: the final observation 13 bootstraps, and nothing is known beyond it."""
    buffer = by_hand()
    batch = buffer.sequences(np.array(episode_by_hand(buffer, 10, 3, TRUNCATED)))
    assert batch.observed.tolist() == [[True] * 4, [True, True, True, False], [True, True, False, False]]
    assert batch.reward_mask.tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    assert batch.policy_mask.tolist() == [[True, True, True, False], [True, True, False, False], [True, False, False, False]]
    # 1 + 2/2 + 12/4; 2 + 4/2 + 13/4; 4 + 13/2
    assert values_of(batch, 0) == [5, 7.25, 10.5, None]
    assert values_of(batch, 1) == [7.25, 10.5, None, None]
    assert values_of(batch, 2) == [10.5, None, None, None]
    assert batch.bootstrap_discounts[0, :3].tolist() == [0.25, 0.25, 0.5]


def test_running_episode_by_hand() -> None:
    """The newest transition's reward is known, its next observation is not."""
    buffer = by_hand()
    slots = episode_by_hand(buffer, 10, 3, None)
    batch = buffer.sequences(np.array(slots))
    assert batch.observed.tolist() == [[True, True, True, False], [True, True, False, False], [True, False, False, False]]
    assert batch.reward_mask.tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    assert batch.policy_mask.tolist() == [[True, True, True, False], [True, True, False, False], [True, False, False, False]]
    # 1 + 2/2 + 12/4; 2 + 12/2
    assert values_of(batch, 0) == [5, 8, None, None]
    assert values_of(batch, 1) == [8, None, None, None]
    assert values_of(batch, 2) == [None, None, None, None]
    # given up, the newest observation becomes the final one
    buffer.truncate_open_episodes()
    batch = buffer.sequences(np.array(slots[:2]))
    assert values_of(batch, 0) == [5, 8, None, None]
    assert batch.reward_mask.tolist() == [[True, True, False], [True, False, False]]
    assert batch.policy_mask[0].tolist() == [True, True, False, False]
    assert buffer.size() == 2
    episode_by_hand(buffer, 50, 5, None)
    assert th.equal(buffer.sequences(np.array(slots[:2])).observations, batch.observations)


def test_one_episode_does_not_see_the_next() -> None:
    buffer = by_hand()
    first = episode_by_hand(buffer, 10, 2, TRUNCATED)
    second = episode_by_hand(buffer, 50, 2, TERMINATED)
    batch = buffer.sequences(np.array([*first, *second]))
    assert batch.observations[..., 0].tolist() == [[10, 11, 12, 12], [11, 12, 12, 12], [50, 51, 52, 52], [51, 52, 52, 52]]
    # 1 + 2/2 + 12/4; 2 + 12/2 | 1 + 2/2; 2
    assert [values_of(batch, row)[:2] for row in range(4)] == [[5, 8], [8, None], [2, 2], [2, 0]]


def test_wrap_around_by_hand() -> None:
    """A ring of 8: an episode of 4 takes 5 slots; the next one of 5 overwrites the first 3 of them."""
    buffer = by_hand(8)
    first = episode_by_hand(buffer, 10, 4, TERMINATED)
    assert first == [0, 1, 2, 3] and buffer.size() == 4
    second = episode_by_hand(buffer, 50, 5, TRUNCATED)
    assert second == [5, 6, 7, 0, 1] and buffer.size() == 1 + 5  # slot 2 is the second's final observation
    batch = buffer.sequences(np.array([3, 6, 0]))
    assert batch.observations[..., 0].tolist() == [[13, 14, 14, 14], [51, 52, 53, 54], [53, 54, 55, 55]]
    # 8 | 2 + 4/2 + 53/4; 4 + 8/2 + 54/4; 8 + 16/2 + 55/4; 16 + 55/2
    assert values_of(batch, 0) == [8, 0, 0, 0]
    assert values_of(batch, 1) == [17.25, 21.5, 29.75, 43.5]
    assert values_of(batch, 2) == [29.75, 43.5, None, None]
    assert batch.ages.tolist() == [6, 4, 2]
    # only what is still there can be drawn
    fresh = buffer.take_fresh()
    assert sorted(fresh) == [0, 1, 3, 5, 6, 7]
    buffer.update_priorities(fresh, np.ones(6))
    assert set(buffer.sample(300).slots[:, 0]) == {0, 1, 3, 5, 6, 7}


def test_several_environments_by_hand() -> None:
    """The first environment's episodes last 2 steps, the second one's 3. Ages count the transitions of both."""
    buffer = by_hand(20, n_envs=2)
    slots = []
    for t in range(6):
        ends = np.array([t % 2 == 1, t % 3 == 2])
        obs = np.array([[100.0 + t], [200.0 + t]], np.float32)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False}, {"TimeLimit.truncated": True}]
        buffer.add(obs, obs + 0.5, np.array([0, 1]), np.array([1.0, 10.0]), ends, infos)
        slots.append(buffer.last_slots.tolist())
    assert slots == [[0, 10], [1, 11], [3, 12], [4, 14], [6, 15], [7, 16]]
    batch = buffer.sequences(np.array([0, 4, 10, 12, 14]))
    assert batch.observations[..., 0].tolist() == [
        [100, 101, 101.5, 101.5],
        [103, 103.5, 103.5, 103.5],
        [200, 201, 202, 202.5],
        [202, 202.5, 202.5, 202.5],
        [203, 204, 205, 205.5],
    ]
    assert batch.actions[:, 0].tolist() == [0, 0, 1, 1, 1]
    assert values_of(batch, 0) == [1.5, 1, 0, 0]
    assert values_of(batch, 2) == [15 + 202 / 4, 15 + 202.5 / 4, 10 + 202.5 / 2, None]
    assert values_of(batch, 3) == [10 + 202.5 / 2, None, None, None]
    assert batch.ages.tolist() == [12, 6, 11, 7, 5]


def test_horizon_shrinks_with_age_by_hand() -> None:
    """V1 Eq. 12: from 4 by one for every 3 transitions of age down to 2, for all steps of a sequence alike."""
    buffer = by_hand(td_steps=4, td_steps_min=2, td_steps_age=3, unroll_steps=1)
    assert buffer.horizons(np.array([0, 1, 2, 3, 5, 6, 8, 9, 1000])).tolist() == [4, 4, 4, 3, 3, 2, 2, 2, 2]
    slots = episode_by_hand(buffer, 10, 8, None)
    batch = buffer.sequences(np.array([slots[0], slots[2], slots[3]]))
    assert batch.ages.tolist() == [8, 6, 5]
    assert batch.bootstrap_observations[..., 0].tolist() == [[12, 13], [14, 15], [16, 17]]
    assert batch.bootstrap_discounts.tolist() == [[0.25, 0.25], [0.25, 0.25], [0.125, 0.125]]
    assert batch.returns.tolist() == [[2, 4], [8, 16], [8 * 3, 16 * 3]]
    # a longer least horizon than the longest one means the longest
    assert by_hand(td_steps=2, td_steps_min=5).horizons(np.array([0, 10**6])).tolist() == [2, 2]


# --------------------------------------------------------------------------------------------------------------------
# What can be sampled
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(n_envs=3, buffer_size=90),
        dict(unroll_steps=8, td_steps=2, td_steps_min=1),
        dict(buffer_size=16),
        dict(td_steps=1, td_steps_min=1, unroll_steps=1, buffer_size=12),
    ],
    ids=str,
)
def test_starts_are_sampled_when_their_windows_are_complete(settings: dict[str, Any]) -> None:
    buffer = make(alpha=0.0, **settings)
    stream = Stream(buffer, seed=3, ending=0.08)
    # the own window, and at least one reward for the value of every unrolled step
    complete = max(buffer.td_steps, buffer.unroll_steps + 1)
    released: dict[tuple[int, int], int] = {}
    pending: set[tuple[int, int]] = set()
    forced: set[tuple[int, int]] = set()
    for count in range(150):
        stream.step()
        stored = stream.reference.stored()
        before = buffer.num_sampleable
        fresh = stream.release()
        names = names_of(fresh, stream.reference)
        assert len(names) == len(fresh)  # no slot twice
        assert not names & released.keys()  # no start twice
        released |= dict.fromkeys(names, count)
        pending = set()
        for slot, (episode, step) in stored.items():
            name = (episode.counts[0], step)
            known = episode.last - step
            if name in released:
                if known < complete and episode.end == RUNNING and slot in fresh:
                    assert before < complete and known >= 1  # hardly anything else could be sampled
                    forced.add(name)
                continue
            pending.add(name)
            assert episode.end == RUNNING, "all of an ended episode is sampled"
            assert known <= complete  # one more step is allowed
        now = {slot for slot, (episode, step) in stored.items() if (episode.counts[0], step) in released}
        assert buffer.num_sampleable == len(now)
        if now and count % 10 == 0:
            drawn = buffer.sample(40 * len(now)).slots[:, 0]
            assert set(drawn.tolist()) == now
    assert len(released) > 100 and forced


def test_nothing_can_be_sampled_at_first() -> None:
    buffer = make()
    for _ in range(2):
        assert buffer.num_sampleable == 0 and buffer.size() == 0 and len(buffer.take_fresh()) == 0
        with pytest.raises(ValueError, match="no transition"):
            buffer.sample(3)
        stream = Stream(buffer, ending=0.0)
        stream.step([RUNNING])
        # its next observation is still to come
        assert len(buffer.take_fresh()) == 0 and buffer.size() == 1
        stream.step([RUNNING])
        first = stream.release()
        assert names_of(first, stream.reference) == {(0, 0)}
        assert set(buffer.sample(5).slots[:, 0]) == set(first)
        stream.step([TERMINATED])
        assert len(stream.release()) == 2
        buffer.reset()


def test_a_new_buffer_is_more_than_its_first_transition() -> None:
    """Of an agent that is loaded without its replay buffer and goes on: every step adds a start."""
    buffer = make()
    stream = Stream(buffer, ending=0.0)
    stream.step()
    for count in range(1, 40):
        stream.step()
        stream.release()
        assert buffer.num_sampleable == (count if count <= 6 else max(6, count - 5))


def test_fresh_transitions_that_nobody_takes_do_not_pile_up() -> None:
    """As with ``gradient_steps=0``, which only collects."""
    buffer, taken = make(), make()
    stream, other = (Stream(x, ending=0.2, seed=1) for x in (buffer, taken))
    for _ in range(3 * buffer.ring):
        stream.steps(1)
        other.steps(1)
        taken._fresh = [np.unique(np.concatenate(taken._fresh))] if taken._fresh else []
        assert len(buffer._fresh) <= buffer.ring + buffer.n_envs
    assert set(buffer.take_fresh()) == set(taken.take_fresh())


def test_fresh_transitions_wait_for_their_priority() -> None:
    buffer = make()
    stream = Stream(buffer, ending=0.0).steps(12)
    fresh = buffer.take_fresh()
    assert len(fresh) > 0 and buffer.num_sampleable == 0
    buffer.update_priorities(fresh[:2], np.ones(2))
    assert set(buffer.sample(50).slots[:, 0]) == set(fresh[:2])
    buffer.update_priorities(fresh, np.ones(len(fresh)))
    assert len(buffer.take_fresh()) == 0
    stream.step([RUNNING])
    assert len(buffer.take_fresh()) == 1


def test_overwritten_slots_never_come_out() -> None:
    buffer = make(20, alpha=0.0)
    stream = Stream(buffer, ending=0.0)
    for count in range(70):
        stream.step([RUNNING])
        if count % 3 == 0:  # sometimes a slot is overwritten before its start was taken
            stream.release()
        stored = stream.reference.stored()
        if buffer.num_sampleable:
            batch = buffer.sample(10)
            assert set(buffer.sample(200).slots[:, 0].tolist()) <= stored.keys()
            stream.reference.check(batch, [stored[int(slot)] for slot in batch.slots[:, 0]], 3)
    stream = Stream(buffer, ending=0.3)
    buffer.reset()
    stream.steps(100)  # many rounds without a look
    fresh = buffer.take_fresh()
    assert set(fresh.tolist()) <= stream.reference.stored().keys() and len(set(fresh)) == len(fresh)


def test_open_episodes_are_truncated() -> None:
    buffer = make(100, n_envs=3, alpha=0.0)
    stream = Stream(buffer, ending=0.0)
    for _ in range(4):
        stream.step([RUNNING] * 3)
    stream.step([RUNNING, TERMINATED, RUNNING])
    stream.reference.truncate_open_episodes()
    # the second environment's episode was over: it keeps its last transition
    assert buffer.size() == 4 + 5 + 4
    assert len(stream.release()) == 13
    stream.reference.truncate_open_episodes()
    assert buffer.size() == 13 and len(buffer.take_fresh()) == 0
    stored = stream.reference.stored()
    batch = buffer.sample(300)
    assert set(batch.slots[:, 0].tolist()) == stored.keys()
    stream.reference.check(batch, [stored[int(slot)] for slot in batch.slots[:, 0]], 3)


# --------------------------------------------------------------------------------------------------------------------
# Priorities
# --------------------------------------------------------------------------------------------------------------------


def with_priorities(errors: np.ndarray, **settings: Any) -> tuple[SequenceReplayBuffer, np.ndarray]:
    """:return: a buffer of two environments with as many starts as errors, and their slots"""
    buffer = make(300, n_envs=2, **settings)
    stream = Stream(buffer, ending=0.0)
    steps = len(errors) // 2
    for _ in range(steps - 1):
        stream.step([RUNNING, RUNNING])
    stream.step([TRUNCATED, TERMINATED])
    slots = buffer.take_fresh()
    assert len(slots) == len(errors)
    buffer.update_priorities(slots, errors)
    return buffer, slots


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_sampling_frequencies(alpha: float) -> None:
    errors = np.random.default_rng(5).exponential(size=60) ** 2
    errors[[3, 40]] = 0.0
    buffer, slots = with_priorities(errors, alpha=alpha)
    wanted = (errors + MIN_PRIORITY) ** alpha
    wanted /= wanted.sum()
    draws = 200_000
    drawn = np.concatenate([buffer.sample(2000, None).slots[:, 0] for _ in range(draws // 2000)])
    counts = np.array([(drawn == slot).sum() for slot in slots])
    assert counts.sum() == draws
    expected = draws * wanted
    often = expected > 5
    chi_square = ((counts - expected) ** 2 / expected)[often].sum()
    freedom = often.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)
    assert (counts[~often] < 30).all()
    if alpha == 0:
        assert often.all()


def test_draws_of_a_batch_are_independent() -> None:
    """Not stratified, and not without replacement: of two starts, each is all of a batch of three one time in eight."""
    buffer, slots = with_priorities(np.ones(2))
    totals = [int((buffer.sample(3).slots[:, 0] == slots[0]).sum()) for _ in range(2000)]
    counts = np.bincount(totals, minlength=4)
    np.testing.assert_allclose(counts / 2000, [1 / 8, 3 / 8, 3 / 8, 1 / 8], atol=0.05)


class ExtremeGenerator:
    """Only draws the ends of [0, 1)."""

    def random(self, size: int) -> np.ndarray:
        return np.resize([0.0, np.nextafter(1.0, 0.0)], size)

    def uniform(self, low: float, high: float, size: Any) -> np.ndarray:
        return np.zeros(size)


def test_extreme_draws_are_transitions_that_can_be_sampled() -> None:
    """Also when the first and last slots have no weight, and with weights that do not add up exactly."""
    buffer, slots = with_priorities(np.random.default_rng(0).exponential(size=60))
    buffer.weights[slots[[0, -1]]] = 0.0
    buffer.rng = ExtremeGenerator()  # type: ignore[assignment]
    batch = buffer.sample(4)
    assert batch.slots[:, 0].tolist() == [slots[1], slots[-2]] * 2
    assert batch.weights.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_importance_weights(alpha: float, beta: float) -> None:
    """(N P)^-beta over the largest of the batch (V1 A.4), then at least 0.1."""
    errors = np.geomspace(1e-3, 10, 40)
    buffer, slots = with_priorities(errors, alpha=alpha, beta=beta)
    batch = buffer.sample(64)
    priorities = (errors + MIN_PRIORITY) ** alpha
    probability = dict(zip(slots.tolist(), priorities / priorities.sum()))
    weights = np.array([(40 * probability[int(slot)]) ** -beta for slot in batch.slots[:, 0]])
    weights = np.clip(weights / weights.max(), 0.1, 1)
    np.testing.assert_allclose(batch.weights, weights, rtol=1e-5)
    assert batch.weights.max() == 1
    if alpha == 0 or beta == 0:
        assert (batch.weights == 1).all()
    if alpha == beta == 1:
        assert (batch.weights == batch.weights.new_tensor(0.1)).any() and len(set(batch.weights.tolist())) > 2


def test_priorities_are_absolute_errors_with_a_floor() -> None:
    buffer, slots = with_priorities(np.zeros(4))
    assert set(buffer.sample(100).slots[:, 0]) == set(slots)  # nothing is lost for ever
    buffer.update_priorities(slots, np.array([-3.0, 3.0, 0.0, 0.0]))
    drawn = buffer.sample(400).slots[:, 0]
    assert set(drawn) == set(slots[:2]) and 120 < (drawn == slots[0]).sum() < 280
    # as float32 tensors arrive
    buffer.update_priorities(slots[:1], np.array([0.0], np.float32))
    assert set(buffer.sample(100).slots[:, 0]) == {slots[1]}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_priorities_that_are_no_numbers_are_refused(bad: float) -> None:
    buffer, slots = with_priorities(np.ones(4))
    before = buffer.weights.copy()
    with pytest.raises(ValueError, match=r"priority .* NaN or infinite"):
        buffer.update_priorities(slots, np.array([1.0, 2.0, bad, 1.0]))
    np.testing.assert_array_equal(buffer.weights, before)


# --------------------------------------------------------------------------------------------------------------------
# Sizes, saving
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [dict(), dict(td_steps=2, td_steps_min=2, unroll_steps=9), dict(n_envs=4)], ids=str)
def test_too_small_buffers_are_refused(settings: dict[str, Any]) -> None:
    size = 1
    while True:
        try:
            buffer = make(size, **settings)
        except ValueError as error:
            assert f"buffer_size={size}" in str(error) and "enlarge" in str(error)
            size += 1
        else:
            break
    window = max(buffer.td_steps, buffer.unroll_steps) + 1
    assert window <= buffer.ring <= window + 3
    # the smallest that is accepted works
    stream = Stream(buffer, ending=0.0)
    for _ in range(3 * buffer.ring):
        stream.step([RUNNING] * buffer.n_envs)
        stream.release()
    assert buffer.num_sampleable >= 1
    buffer.sample(10)


def assert_equal_batches(x: Batch, y: Batch) -> None:
    for name in Batch._fields:
        np.testing.assert_array_equal(np.asarray(getattr(x, name)), np.asarray(getattr(y, name)), err_msg=name)


@pytest.mark.parametrize("action_space", [BOX, spaces.Discrete(3)], ids=str)
def test_a_saved_buffer_goes_on_alike(tmp_path: Path, action_space: spaces.Space) -> None:
    stream = Stream(make(60, action_space=action_space, n_envs=2), ending=0.1)
    stream.steps(30)
    stream.release()
    stream.steps(5)  # some starts are waiting for their priority
    stream.buffer.sample(5)
    save_to_pkl(tmp_path / "buffer.pkl", stream.buffer)
    loaded = load_from_pkl(tmp_path / "buffer.pkl")
    # the same stream, once with each buffer
    other = copy.deepcopy(stream)
    other.buffer = other.reference.buffer = loaded
    for _ in range(40):
        for each in (stream, other):
            each.step()
        np.testing.assert_array_equal(stream.release(2.0), other.release(2.0))
        assert_equal_batches(stream.buffer.sample(8), other.buffer.sample(8))


def test_the_seed_decides() -> None:
    def batches(seed: int) -> list[Batch]:
        stream = Stream(make(seed=seed)).steps(50)
        stream.release()
        np.random.seed(seed)  # the global stream is not used
        return [stream.buffer.sample(10) for _ in range(3)]

    for x, y in zip(batches(1), batches(1)):
        assert_equal_batches(x, y)
    assert any((x.slots != y.slots).any() for x, y in zip(batches(1), batches(2)))
    assert (batches(1)[0].slots != batches(1)[1].slots).any()


def test_reset_forgets_everything() -> None:
    stream = Stream(make(60), ending=0.1).steps(50)
    stream.release()
    stream.steps(3)
    buffer = stream.buffer
    buffer.reset()
    assert buffer.size() == 0 and buffer.num_sampleable == 0 and len(buffer.take_fresh()) == 0
    buffer.truncate_open_episodes()
    assert buffer.size() == 0
    stream = Stream(buffer, seed=1).steps(70)
    stored = stream.reference.stored()
    stream.reference.check(buffer.sequences(np.array(list(stored))), list(stored.values()), 3)
    assert set(stream.release().tolist()) <= stored.keys()
