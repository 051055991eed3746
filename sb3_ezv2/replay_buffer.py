"""
Replay of sequences with priorities.

Every environment writes a ring of slots. A slot is an observation with the action taken there and its reward; an episode
ends with a slot of its own for its final observation, which has neither. So every observation is stored once (of stacked
images every frame, see :mod:`sb3_ezv2.frames`), and a sequence is a run of neighbouring slots.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ezv2.frames import ObservationStore, observation_nbytes
from sb3_ezv2.multi_discrete import category_sizes
from sb3_ezv2.observations import apply

RUNNING, TERMINATED, TRUNCATED = 0, 1, 2
"""Kinds of slots: a transition, or the final observation of an episode that terminated or was truncated."""

MIN_PRIORITY = 1e-6
"""Added to every priority, in the units of the rewards."""

PER_SLOT = {"actions": 0, "rewards": 0, "kinds": 0, "stamps": -1, "episodes": -1, "transitions": 0, "weights": 0}
"""Arrays of a replay buffer with a row for each slot, and what they hold before it is written to."""


def window_length(unroll_steps: int, td_steps: int) -> int:
    """:return: steps after which a start is sampled: its n-step window is complete and each unrolled step has a reward"""
    return max(td_steps, unroll_steps + 1)


def check_ring(buffer_size: int, n_envs: int, unroll_steps: int, td_steps: int, frame_stack: int) -> None:
    """:raises ValueError: each environment has too few slots for one window"""
    ring = buffer_size // n_envs
    least = window_length(unroll_steps, td_steps) + 2 + frame_stack - 1
    if ring < least:
        raise ValueError(
            f"buffer_size={buffer_size} leaves {ring} transitions per environment, but a window of td_steps={td_steps} and "
            f"unroll_steps={unroll_steps} needs {least}: enlarge buffer_size."
        )


class Batch(NamedTuple):
    """
    B sequences of U unroll steps. Step 0 is the start of a sequence.

    :param slots: numpy int64 [B, U + 1], where the observations are stored; beyond the last one, that one again
    :param observations: [B, U + 1, ...] tensor, or for a ``Dict`` space a dictionary of such tensors
    :param actions: int64 [B, U], int64 [B, U, D] of ``MultiDiscrete`` actions, or float [B, U, A] in [-1, 1]; random where the
        episode is over
    :param rewards: [B, U], 0 where the episode is over
    :param returns: [B, U + 1], discounted sums of the n-step windows
    :param bootstrap_observations: as ``observations``, at the windows' ends
    :param bootstrap_discounts: [B, U + 1], gamma^l of the windows' lengths l; 0 at a termination
    :param observed: bool [B, U + 1], there is an observation
    :param reward_mask: bool [B, U]
    :param value_mask: bool [B, U + 1]
    :param policy_mask: bool [B, U + 1]
    :param weights: [B], importance weights
    :param ages: numpy int64 [B], transitions collected since the sequences' starts
    """

    slots: np.ndarray
    observations: Any
    actions: th.Tensor
    rewards: th.Tensor
    returns: th.Tensor
    bootstrap_observations: Any
    bootstrap_discounts: th.Tensor
    observed: th.Tensor
    reward_mask: th.Tensor
    value_mask: th.Tensor
    policy_mask: th.Tensor
    weights: th.Tensor
    ages: np.ndarray


class SequenceReplayBuffer(ReplayBuffer):
    """
    Prioritized replay of sequences with n-step value windows.

    :param buffer_size: number of slots (transitions and final observations), split evenly over the environments
    :param observation_space: of the environment
    :param action_space: of the environment
    :param device: where batches go
    :param n_envs: number of environments
    :param gamma: discount of one step
    :param unroll_steps: U
    :param td_steps: n of a fresh transition's value window
    :param td_steps_min: n of an old one's
    :param td_steps_age: n falls by one for each so many transitions of age (V1 Eq. 12)
    :param alpha: exponent of the priorities
    :param beta: exponent of the importance weights
    :param seed: of the sampling
    :param frame_stack: frames of which an image observation is a stack, along its channels: each is stored once
    :raises ValueError: too few slots for one window, images that are no stacks
    """

    prepared: Any = None
    """The batch of the next update, if it was made ahead (sb3_ezv2.ahead.PreparedBatch). It is saved with the buffer."""

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        gamma: float = 0.997,
        unroll_steps: int = 5,
        td_steps: int = 20,
        td_steps_min: int = 5,
        td_steps_age: int = 1000,
        alpha: float = 1.0,
        beta: float = 1.0,
        seed: int | None = None,
        frame_stack: int = 1,
    ):
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.ring = buffer_size // n_envs
        self.handle_timeout_termination = True  # SB3 asks for it when it loads a buffer
        check_ring(buffer_size, n_envs, unroll_steps, td_steps, frame_stack)
        self.frame_stack = frame_stack
        self.gamma = gamma
        self.unroll_steps = unroll_steps
        self.td_steps = td_steps
        self.td_steps_min = min(td_steps_min, td_steps)
        self.td_steps_age = td_steps_age
        self.alpha = alpha
        self.beta = beta
        self.rng = np.random.default_rng(seed)

        size = self.ring * n_envs
        self.discrete = isinstance(action_space, spaces.Discrete)
        self.store = ObservationStore(observation_space, n_envs, self.ring, frame_stack)
        self.category_sizes = category_sizes(action_space)
        if self.discrete:
            self.actions = np.zeros(size, np.int64)
        else:
            self.actions = np.zeros((size, self.action_dim), np.int64 if self.category_sizes else np.float32)
        self.rewards = np.zeros(size, np.float32)
        self.kinds = np.zeros(size, np.uint8)
        self.stamps = np.full(size, -1, np.int64)  # count of the environment's slots when this one was written
        self.episodes = np.full(size, -1, np.int64)
        self.transitions = np.zeros(size, np.int64)  # count of all transitions when this one was added
        self.weights = np.zeros(size, np.float64)  # priority ** alpha; 0: not to be sampled
        self.written = np.zeros(n_envs, np.int64)  # slots written by each environment
        self.episode = np.arange(n_envs, dtype=np.int64)  # running episode of each environment
        self.waiting = np.zeros(n_envs, np.int64)  # stamp of each environment's first slot that is not sampled yet
        self.total_transitions = 0
        self.last_slots = np.zeros(0, np.int64)  # [N] slots of the transitions added last
        self._fresh: list[np.ndarray] = []
        self.cache: Any = None  # searches of the stored states (sb3_ezv2.reanalyze.SearchCache), which are saved with them

    def set_sampling(
        self, gamma: float, unroll_steps: int, td_steps: int, td_steps_min: int, alpha: float, beta: float
    ) -> None:
        """
        Settings of the constructor, from now on.

        :raises ValueError: too few slots for one window
        """
        check_ring(self.buffer_size, self.n_envs, unroll_steps, td_steps, self.frame_stack)
        before = self.gamma, self.unroll_steps, self.td_steps, self.td_steps_min, self.beta
        if (gamma, unroll_steps, td_steps, min(td_steps_min, td_steps), beta) != before:
            self.prepared = None
        if alpha != self.alpha:
            known = self.weights > 0
            # with the exponent 0 the priorities were not kept: they are 1 until they are drawn
            self.weights[known] **= alpha / self.alpha if self.alpha > 0 else 0.0
        self.gamma, self.unroll_steps, self.alpha, self.beta = gamma, unroll_steps, alpha, beta
        self.td_steps, self.td_steps_min = td_steps, min(td_steps_min, td_steps)

    def __getstate__(self) -> dict[str, Any]:
        """Rows of slots that were never written to are not saved."""
        state = self.__dict__.copy()
        for name in PER_SLOT:
            state[name] = self.written_rows(state[name])
        state["store"] = copy.copy(self.store)
        state["store"].__dict__.update(self.store.map_rows(self.written_rows))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name, empty in PER_SLOT.items():
            setattr(self, name, self.all_rows(state[name], empty))
        self.store.__dict__.update(self.store.map_rows(self.all_rows))
        if self.cache is not None:
            self.cache.attach(self)

    def written_rows(self, array: np.ndarray) -> np.ndarray:
        """:param array: [slots, ...] :return: [n_envs, n, ...], the slots that were written to, at most n of each"""
        return array.reshape(self.n_envs, self.ring, *array.shape[1:])[:, : int(self.written.max())]

    def all_rows(self, array: np.ndarray, empty: int = 0) -> np.ndarray:
        """:param array: of :meth:`written_rows` :param empty: value of the other slots :return: [slots, ...]"""
        if array.shape[1] == self.ring:
            return array.reshape(-1, *array.shape[2:])
        shape = (self.n_envs, self.ring, *array.shape[2:])
        # Memory of zeros costs nothing before it is written to
        rows = np.zeros(shape, array.dtype) if empty == 0 else np.full(shape, empty, array.dtype)
        rows[:, : array.shape[1]] = array
        return rows.reshape(-1, *array.shape[2:])

    @staticmethod
    def estimate_nbytes(
        buffer_size: int, observation_space: spaces.Space, action_space: spaces.Space, frame_stack: int = 1
    ) -> int:
        """:return: bytes that a buffer of this size takes when it is full"""
        obs = observation_nbytes(observation_space, frame_stack)
        numbers = int(np.prod(action_space.shape))  # type: ignore[arg-type]
        action = 4 * numbers if isinstance(action_space, spaces.Box) else 8 * numbers
        return buffer_size * (obs + action + 4 + 1 + 4 * 8)

    def size(self) -> int:
        """:return: number of transitions stored, final observations not counted"""
        filled = self.stamps >= 0
        return int(np.count_nonzero(filled & (self.kinds == RUNNING)))

    def reward_scale(self, env: VecNormalize | None = None) -> float:
        """:param env: normalises the rewards, if given :return: root mean square of the rewards that are stored"""
        rewards = self.rewards[(self.stamps >= 0) & (self.kinds == RUNNING)].astype(np.float64)
        return float(np.sqrt(np.mean((rewards if env is None else env.normalize_reward(rewards)) ** 2)))

    @property
    def num_sampleable(self) -> int:
        """Number of transitions that can start a sequence."""
        return int(np.count_nonzero(self.weights))

    def reset(self) -> None:
        """Forget everything that is stored. Stamps go on counting, so that nothing new is taken for something old."""
        self.stamps.fill(-1)
        self.weights.fill(0)
        self.waiting[:] = self.written
        self._fresh = []
        self.prepared = None

    def _write(self, envs: np.ndarray, observations: Any) -> np.ndarray:
        slots = envs * self.ring + self.written[envs] % self.ring
        before = envs * self.ring + (self.written[envs] - 1) % self.ring
        self.store.write(slots, observations, self.episodes[before] != self.episode[envs])
        self.stamps[slots] = self.written[envs]
        self.episodes[slots] = self.episode[envs]
        self.weights[slots] = 0.0
        self.written[envs] += 1
        for step in range(1, self.frame_stack):
            oldest = envs * self.ring + (self.written[envs] + step - 1) % self.ring
            self.weights[oldest[~self._complete(oldest)]] = 0.0
        return slots

    def _complete(self, slots: np.ndarray) -> np.ndarray:
        """:return: bool [n], these slots and the frames before them that they need are still there"""
        first = self.stamps[slots] - (self.store.history[slots] if self.frame_stack > 1 else 0)
        return first >= self.written[slots // self.ring] - self.ring

    def add(  # type: ignore[override]
        self,
        obs: Any,
        next_obs: Any,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        Store one transition of each of the N environments; :attr:`last_slots` tells where.

        :param obs: [N, ...], or a dictionary of such arrays
        :param next_obs: the same, of which only those that end an episode are stored here
        :param action: [N] or [N, ...], scaled to [-1, 1] if continuous, otherwise counted from 0
        :param reward: [N]
        :param done: bool [N]
        :param infos: ``TimeLimit.truncated`` tells a truncation from a termination
        """
        envs = np.arange(self.n_envs)
        slots = self._write(envs, obs)
        self.actions[slots] = np.reshape(action, (self.n_envs, *self.actions.shape[1:]))
        self.rewards[slots] = reward
        self.kinds[slots] = RUNNING
        self.transitions[slots] = self.total_transitions + envs
        self.total_transitions += self.n_envs

        ended = np.flatnonzero(done)
        if len(ended) > 0:
            final = self._write(ended, apply(lambda x: np.asarray(x)[ended], next_obs))
            truncated = np.array([bool(infos[env].get("TimeLimit.truncated", False)) for env in ended])
            self.kinds[final] = np.where(truncated, TRUNCATED, TERMINATED)
            self.episode[ended] += self.n_envs
        wait = window_length(self.unroll_steps, self.td_steps)
        for env in envs:
            # all of an ended episode, else up to the newest start whose window is complete
            self._release(int(env), int(self.written[env]) - (0 if done[env] else wait))
        self.last_slots = slots

    def _release(self, env: int, end: int) -> None:
        """Make the starts with stamps below ``end`` sampleable as soon as their priorities are set."""
        first = max(int(self.waiting[env]), int(self.written[env]) - self.ring)
        if end <= first:
            return
        slots = env * self.ring + np.arange(first, end) % self.ring
        slots = slots[self.kinds[slots] == RUNNING]
        if len(slots) > 0:
            self._fresh.append(slots)
            if len(self._fresh) > self.ring:  # nobody takes them: no updates are made
                self._fresh = [np.unique(np.concatenate(self._fresh))]
        self.waiting[env] = end

    def take_fresh(self) -> np.ndarray:
        """
        :return: int64 [n], slots of the starts that became sampleable since the last call: they are sampled once
            :meth:`update_priorities` was called for them. As long as there are fewer than the steps of one window (a new
            buffer that is learned from at once), windows that are not complete yet are released, too.
        """
        if not self._fresh and self.num_sampleable < window_length(self.unroll_steps, self.td_steps):
            for env in range(self.n_envs):
                # The newest transition has no next observation yet
                self._release(env, int(self.written[env]) - 1)
        fresh = np.unique(np.concatenate(self._fresh)) if self._fresh else np.zeros(0, np.int64)
        self._fresh = []
        # those still there: not overwritten since
        there = (self.kinds[fresh] == RUNNING) & (self.stamps[fresh] < self.waiting[fresh // self.ring])
        return fresh[there & self._complete(fresh)]

    def truncate_open_episodes(self) -> None:
        """Close the running episodes as truncated: their environments were reset. Each one's newest slot becomes its
        final observation, since what followed that transition is not known."""
        for env in range(self.n_envs):
            newest = env * self.ring + (self.written[env] - 1) % self.ring
            if self.written[env] == 0 or self.kinds[newest] != RUNNING:
                continue
            self.kinds[newest] = TRUNCATED
            self.weights[newest] = 0.0
            self.episode[env] += self.n_envs
            self._release(env, int(self.written[env]))

    def update_priorities(self, slots: np.ndarray, errors: np.ndarray, stamps: np.ndarray | None = None) -> None:
        """
        :param slots: int64 [n]
        :param errors: [n], absolute value errors in the units of the rewards
        :param stamps: int64 [n], those that the slots had when they were drawn. What has been overwritten since, or cannot be
            sampled any more, is left out; None: nothing is
        :raises ValueError: an error is NaN or infinite
        """
        if stamps is not None:
            there = (self.stamps[slots] == stamps) & (self.weights[slots] > 0)
            slots, errors = slots[there], errors[there]
        if not np.isfinite(errors).all():
            env = int(slots[~np.isfinite(errors)][0]) // self.ring
            raise ValueError(f"the priority (absolute value error) of a transition of environment {env} is NaN or infinite")
        self.weights[slots] = (np.abs(errors) + MIN_PRIORITY) ** self.alpha

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> Batch:  # type: ignore[override]
        """
        :param batch_size: B
        :param env: normalises observations and rewards, if given
        :return: a batch drawn with probabilities proportional to priority ** alpha
        :raises ValueError: nothing can be sampled yet
        """
        return self.sequences(*self.draw(batch_size), env)

    def draw(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """
        The random part of :meth:`sample`.

        :param batch_size: B
        :return: int64 [B], the slots of the sequences' starts; float64 [B], their importance weights
        :raises ValueError: nothing can be sampled yet
        """
        filled = min(int(self.written.max()), self.ring)
        weights = self.weights.reshape(self.n_envs, self.ring)[:, :filled].reshape(-1)
        cumulated = np.cumsum(weights)
        total = cumulated[-1] if filled > 0 else 0.0
        if total <= 0:
            raise ValueError("the replay buffer has no transition to sample yet")
        picks = np.searchsorted(cumulated, self.rng.random(batch_size) * total, side="right")
        # rounding can carry a pick past the last one with a weight
        picks = np.minimum(picks, np.searchsorted(cumulated, total, side="left"))
        probabilities = weights[picks] / total
        importance = (np.count_nonzero(weights) * probabilities) ** -self.beta
        importance = np.clip(importance / importance.max(), 0.1, 1.0)
        return picks // filled * self.ring + picks % filled, importance

    def horizons(self, ages: np.ndarray) -> np.ndarray:
        """
        V1 Eq. 12: windows shrink with age, since old actions tell ever less of the present policy's value.

        :param ages: [B], transitions
        :return: int64 [B], n
        """
        return np.clip(self.td_steps - ages // self.td_steps_age, self.td_steps_min, self.td_steps)

    def sequences(
        self,
        starts: np.ndarray,
        importance: np.ndarray | None = None,
        env: VecNormalize | None = None,
        unroll_steps: int | None = None,
    ) -> Batch:
        """
        :param starts: int64 [B], slots of transitions
        :param importance: [B], importance weights (None: 1)
        :param env: normalises observations and rewards, if given
        :param unroll_steps: U (None: the buffer's)
        :return: the sequences that begin there
        """
        unroll, size = self.unroll_steps if unroll_steps is None else unroll_steps, len(starts)
        ages = self.total_transitions - self.transitions[starts]
        horizons = self.horizons(ages)
        longest = int(horizons.max())
        offsets = np.arange(unroll + longest + 1)
        first = starts // self.ring * self.ring
        slots = first[:, None] + (starts[:, None] - first[:, None] + offsets) % self.ring  # [B, W]
        # a slot belongs to the sequence if it is of the same episode and was written so many slots later
        valid = (self.stamps[slots] == self.stamps[starts][:, None] + offsets) & (
            self.episodes[slots] == self.episodes[starts][:, None]
        )
        last = valid.sum(1) - 1  # [B] offset of the last observation
        kind = self.kinds[slots[np.arange(size), last]]  # [B]
        ended, terminated = kind != RUNNING, kind == TERMINATED
        transitions = np.where(ended, last, last + 1)  # [B] number of actions and rewards from the start

        rewards = np.where(offsets < transitions[:, None], self.rewards[slots], 0.0)  # [B, W]
        if env is not None:
            rewards = np.where(offsets < transitions[:, None], env.normalize_reward(rewards), 0.0)
        steps = np.arange(unroll + 1)
        length = np.clip(np.minimum(horizons[:, None], last[:, None] - steps), 0, None)  # [B, U + 1]
        windows = np.lib.stride_tricks.sliding_window_view(rewards, longest, axis=1)[:, : unroll + 1]  # [B, U + 1, n]
        window = np.arange(longest)
        returns = np.where(window < length[..., None], windows * self.gamma**window, 0.0).sum(-1)
        ends = np.minimum(steps + length, last[:, None])  # [B, U + 1] offsets of the bootstrap observations
        discounts = np.where(terminated[:, None] & (ends == last[:, None]), 0.0, float(self.gamma) ** length)

        before_end = steps < transitions[:, None]
        over = terminated[:, None] & (steps >= last[:, None])  # after a terminal, rewards and values are 0
        rows = np.arange(size)[:, None]
        sequence = slots[rows, np.minimum(steps, last[:, None])]  # [B, U + 1]
        acted = before_end[:, :unroll]
        actions = self.actions[sequence[:, :unroll]]
        random = self._random_actions(size, unroll)
        actions = np.where(acted if self.discrete else acted[..., None], actions, random)
        return Batch(
            slots=sequence,
            observations=self.store.read(sequence, self.device, env),
            actions=self.to_torch(actions),
            rewards=self._float(rewards[:, :unroll]),
            returns=self._float(returns),
            bootstrap_observations=self.store.read(slots[rows, ends], self.device, env),
            bootstrap_discounts=self._float(discounts),
            observed=self.to_torch(steps <= last[:, None]),
            reward_mask=self.to_torch((before_end | over)[:, :unroll]),
            value_mask=self.to_torch((before_end & (length > 0)) | over),
            policy_mask=self.to_torch(before_end),
            weights=self._float(np.ones(size) if importance is None else importance),
            ages=ages,
        )

    def _random_actions(self, size: int, unroll: int) -> np.ndarray:
        if self.discrete:
            assert isinstance(self.action_space, spaces.Discrete)
            return self.rng.integers(self.action_space.n, size=(size, unroll))
        if self.category_sizes:
            return self.rng.integers(self.category_sizes, size=(size, unroll, self.action_dim))
        return self.rng.uniform(-1, 1, size=(size, unroll, self.action_dim)).astype(np.float32)

    def _float(self, array: np.ndarray) -> th.Tensor:
        return self.to_torch(array.astype(np.float32), copy=False)
