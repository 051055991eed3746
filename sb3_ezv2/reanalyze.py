"""Reanalysis: value and policy targets of replayed sequences under the target network, and the cache of its searches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ezv2.losses import Targets
from sb3_ezv2.multi_discrete import are_sampled, category_sizes
from sb3_ezv2.networks import BaseNetwork
from sb3_ezv2.observations import apply
from sb3_ezv2.replay_buffer import Batch, SequenceReplayBuffer
from sb3_ezv2.search import GumbelSearch, SearchResult
from sb3_ezv2.validation import check_memory


class _Roots(NamedTuple):
    """
    What the targets need of n searches.

    :param value: [n], search-based values
    :param policy: [n, K], weights of the candidates or of all actions
    :param candidates: [n, K, A], or int64 [n, K, D] of ``MultiDiscrete`` actions; None for discrete ones
    """

    value: th.Tensor
    policy: th.Tensor
    candidates: th.Tensor | None


class Searches(NamedTuple):
    """
    The searches of a batch of B sequences with U unroll steps.

    :param rows: numpy int64 [n], the states that were searched, of all B * (U + 1)
    :param roots: of these
    :param stats: scalars to log
    """

    rows: np.ndarray
    roots: _Roots
    stats: dict[str, th.Tensor]


class SearchCache:
    """
    The searches of the stored states under the present target network.

    The target network is frozen between two refreshes while the same states are drawn again and again; here each
    is searched once per refresh. Entries belong to a slot, to what was written there, and to a version of the network; a
    refresh makes all of them stale by one integer. There is one entry per slot, so that the memory is bounded
    (:meth:`estimate_nbytes`).

    It is pickled with the buffer; whose searches it holds is known by a digest of what made them.

    :param buffer: the replay buffer whose slots are meant
    :param num_candidates: K
    :param action_dim: numbers of one candidate; None for discrete actions
    :param action_dtype: of them
    :param made_by: :meth:`Reanalyzer.digest` of what makes its searches
    :raises ValueError: more memory than is free
    """

    def __init__(
        self,
        buffer: SequenceReplayBuffer,
        num_candidates: int,
        action_dim: int | None,
        action_dtype: type[np.generic] = np.float32,
        made_by: bytes = b"",
    ):
        size = len(buffer.stamps)
        self.made_by = made_by
        self.nbytes = self.estimate_nbytes(size, num_candidates, action_dim, action_dtype)
        check_memory(self.nbytes, size, "search cache", "or give reanalyze_cache=False")
        self.buffer = buffer
        self.version = 0
        # zeroed memory costs nothing before it is written to
        self.versions = np.full(size, -1, np.int64)
        self.stamps = np.full(size, -1, np.int64)
        self.values = np.zeros(size, np.float32)
        self.policies = np.zeros((size, num_candidates), np.float32)
        self.candidates = None if action_dim is None else np.zeros((size, num_candidates, action_dim), action_dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Rows of slots that were never written to are not saved."""
        return {**self.__dict__, **{name: self.buffer.written_rows(getattr(self, name)) for name in self._arrays()}}

    def attach(self, buffer: SequenceReplayBuffer) -> None:
        """After unpickling. :param buffer: with which it was pickled"""
        self.buffer = buffer
        for name, empty in self._arrays().items():
            setattr(self, name, buffer.all_rows(getattr(self, name), empty))

    def _arrays(self) -> dict[str, int]:
        """:return: names of the arrays with a row for each slot, and what they hold before it is searched"""
        arrays = {"versions": -1, "stamps": -1, "values": 0, "policies": 0}
        return arrays if self.candidates is None else {**arrays, "candidates": 0}

    @staticmethod
    def estimate_nbytes(
        size: int, num_candidates: int, action_dim: int | None, action_dtype: type[np.generic] = np.float32
    ) -> int:
        """
        :param size: slots of the replay buffer
        :return: bytes that the cache takes when every state was searched; the other arguments are those of the constructor
        """
        return size * (2 * 8 + 4 + num_candidates * (4 + np.dtype(action_dtype).itemsize * (action_dim or 0)))

    def hits(self, slots: np.ndarray) -> np.ndarray:
        """:param slots: int64 [n] :return: bool [n], where there is a search of this state under the present network"""
        return (self.versions[slots] == self.version) & (self.stamps[slots] == self.buffer.stamps[slots])

    def put(self, slots: np.ndarray, roots: _Roots) -> None:
        """Remember the searches of these slots' states."""
        self.versions[slots] = self.version
        self.stamps[slots] = self.buffer.stamps[slots]
        self.values[slots] = roots.value.cpu().numpy()
        self.policies[slots] = roots.policy.cpu().numpy()
        if self.candidates is not None:
            assert roots.candidates is not None
            self.candidates[slots] = roots.candidates.cpu().numpy()

    def get(self, slots: np.ndarray, device: th.device) -> _Roots:
        """:return: the remembered searches of these slots' states"""
        candidates = None if self.candidates is None else th.from_numpy(self.candidates[slots]).to(device)
        values, policies = th.from_numpy(self.values[slots]), th.from_numpy(self.policies[slots])
        return _Roots(values.to(device), policies.to(device), candidates)


def learns_best_action(policy_target: str, action_space: spaces.Space, n_sampled_actions: int) -> bool:
    """
    :param policy_target: as the algorithm takes it
    :param action_space: of the environment
    :param n_sampled_actions: candidates at the root
    :return: whether the policy's target is the recommended action (Eq. 9), not all candidates (Eq. 8). ``"auto"``: where the
        candidates are a sample of a space of several dimensions, of which the weights of a few points say little. Where all
        MultiDiscrete actions are candidates, their improved policy is exact, as that of Discrete actions is.
    """
    if policy_target != "auto":
        return policy_target == "best_action"
    if sizes := category_sizes(action_space):
        return len(sizes) > 1 and are_sampled(sizes, n_sampled_actions)
    return isinstance(action_space, spaces.Box) and math.prod(action_space.shape) > 1


class Reanalyzer:
    """
    Makes the targets of replayed sequences (EfficientZero V2 App. F and H).

    :param search: with the target network
    :param bootstrap: network whose values end the n-step windows
    :param buffer: where the sequences come from
    :param value_target: ``"mixed"`` (Eq. 16), ``"td"`` or ``"search"``
    :param mixed_value_start: updates before the mixed target takes search-based values (T1)
    :param fresh_transitions: sequences that start among so many newest transitions keep n-step values (T2)
    :param best_action: the policy's target is the recommended action (Eq. 9), not all candidates (Eq. 8)
    :param cache: search each state once per refresh of the target network
    :param refresh_fraction: share of the states found in the cache that are searched again, and replaced there
    """

    def __init__(
        self,
        search: GumbelSearch,
        bootstrap: BaseNetwork,
        buffer: SequenceReplayBuffer,
        value_target: str = "mixed",
        mixed_value_start: int = 40_000,
        fresh_transitions: int = 20_000,
        best_action: bool = False,
        cache: bool = True,
        refresh_fraction: float = 0.0,
    ):
        self.search = search
        self.bootstrap = bootstrap
        self.buffer = buffer
        self.value_target = value_target
        self.mixed_value_start = mixed_value_start
        self.fresh_transitions = fresh_transitions
        self.best_action = best_action
        self.refresh_fraction = refresh_fraction
        self.discrete = search.model.discrete
        self.made_by = self.digest()
        self.cache: SearchCache | None = None
        if cache:
            num_candidates = 1 if best_action and not self.discrete else search.num_root_actions
            dtype = np.int64 if search.model.category_sizes else np.float32
            width = len(search.model.category_sizes) or search.model.action_dim
            known = buffer.cache
            if known is None or known.made_by != self.made_by:
                known = SearchCache(buffer, num_candidates, None if self.discrete else width, dtype, self.made_by)
            self.cache = buffer.cache = known
        else:
            buffer.cache = None
        if buffer.prepared is not None and buffer.prepared.made_by != self.made_by:
            buffer.prepared = None

    def digest(self) -> bytes:
        """:return: of all that searches depend on but their observations and noise: they are this agent's if it is the same"""
        return self.search.digest() + bytes([self.best_action])

    def target_refreshed(self) -> None:
        """The target network has new weights: every search so far is stale."""
        self.buffer.prepared = None
        self.sign()
        if self.cache is not None:
            self.cache.version += 1

    def sign(self) -> None:
        """
        What was searched so far is of the target network as it is now, too: where only the reward scale of an untrained
        network has changed, whose values are 0 in any unit.
        """
        self.made_by = self.digest()
        if self.cache is not None:
            self.cache.made_by = self.made_by

    def store(self, slots: np.ndarray, result: SearchResult) -> None:
        """
        Take over searches that were made to act, with a network that is no older than the target network.

        :param slots: int64 [n], slots of the states that were searched
        :param result: of the n searches
        """
        if self.cache is not None:
            self.cache.put(slots, self._roots(result))

    @th.no_grad()
    def searches(self, batch: Batch, rng: np.random.Generator) -> Searches:
        """
        :param batch: B sequences of U steps
        :param rng: of the searches' noise
        :return: the searches of all its states that have a policy target
        """
        rows = np.flatnonzero(batch.policy_mask.cpu().numpy())
        return Searches(rows, *self._search(batch, rows, rng))

    @th.no_grad()
    def targets(
        self, batch: Batch, n_updates: int, rng: np.random.Generator, searches: Searches | None = None
    ) -> tuple[Targets, dict[str, th.Tensor]]:
        """
        :param batch: B sequences of U steps
        :param n_updates: updates so far
        :param rng: of the searches' noise
        :param searches: of the batch; None: they are made here
        :return: the targets, and scalars to log
        """
        mask, value_mask = batch.policy_mask, batch.value_mask  # [B, U + 1]; the first: the searched states
        rows, roots, of_searches = self.searches(batch, rng) if searches is None else searches
        index, stats = th.from_numpy(rows).to(mask.device), dict(of_searches)

        def spread(x: th.Tensor) -> th.Tensor:
            """[n, ...] of the searched states to [B, U + 1, ...], 0 elsewhere."""
            return x.new_zeros(mask.numel(), *x.shape[1:]).index_copy_(0, index, x).unflatten(0, mask.shape)

        of_sequence = self._search_based(batch, n_updates)  # numpy [B]
        values = batch.returns
        if not of_sequence.all():
            # Only for sequences with n-step values: the others need no bootstrap, since of their windows just those are used
            # that ended in a termination
            others = th.from_numpy(np.flatnonzero(~of_sequence)).to(mask.device)
            td_values, their_mask = self.td_values(batch, others), value_mask[others]
            values = values.index_copy(0, others, td_values)
            stats["target/td_value"] = th.where(their_mask, td_values, 0).sum() / their_mask.sum().clamp(min=1)
        stats["target/search_value"] = roots.value.mean()
        by_search = th.from_numpy(of_sequence).to(mask.device)[:, None].expand_as(mask)
        if self.value_target == "mixed":
            # A return that was observed to its termination needs no bootstrap: it ties the values to what happened, where
            # search-based values of old episodes would rest on each other alone
            by_search = by_search & (batch.bootstrap_discounts > 0)
        # Where a termination was passed neither kind of target is needed: the value is 0
        values = th.where(by_search & mask, spread(roots.value), values)
        value_mask = th.where(by_search, mask | value_mask, value_mask)
        stats["target/search_share"] = (by_search & mask).sum() / mask.sum().clamp(min=1)
        network, rewards = self.bootstrap, self.bootstrap.reward_targets(batch.rewards)
        stats["target/value_clipped"] = _share_above(values, network.value_support.limit, value_mask)
        stats["target/reward_clipped"] = _share_above(rewards, network.reward_support.limit, batch.reward_mask)
        candidates = None if roots.candidates is None else spread(roots.candidates)
        return Targets(values, value_mask, spread(roots.policy), candidates), stats

    def _search_based(self, batch: Batch, n_updates: int) -> np.ndarray:
        """:return: bool [B], the sequences with search-based values (Eq. 16)"""
        if self.value_target == "mixed" and n_updates >= self.mixed_value_start:
            return batch.ages > self.fresh_transitions
        return np.full(len(batch.ages), self.value_target == "search")

    @th.no_grad()
    def td_values(self, batch: Batch, sequences: th.Tensor | None = None) -> th.Tensor:
        """
        :param batch: B sequences of U steps
        :param sequences: int64 [n], those that are meant; None: all
        :return: [n, U + 1], n-step values: the first case of Eq. 16
        """
        observations, returns, discounts = batch.bootstrap_observations, batch.returns, batch.bootstrap_discounts
        if sequences is not None:
            observations, returns, discounts = (
                apply(lambda x: x[sequences], observations),
                returns[sequences],
                discounts[sequences],
            )
        ends = self.bootstrap.values(apply(lambda x: x.flatten(0, 1), observations))
        return returns + discounts * ends.unflatten(0, returns.shape)

    @th.no_grad()
    def value_errors(self, slots: np.ndarray, network: BaseNetwork, env: VecNormalize | None = None) -> np.ndarray:
        """
        :param slots: int64 [n], of transitions
        :param network: the online model, in evaluation mode
        :param env: normalises observations and rewards, if given
        :return: float32 [n], absolute differences of its values and the n-step values
        """
        batch = self.buffer.sequences(slots, env=env, unroll_steps=0)
        values = network.values(apply(lambda x: x[:, 0], batch.observations))
        return (values - self.td_values(batch)[:, 0]).abs().cpu().numpy()

    def _roots(self, result: SearchResult) -> _Roots:
        if not self.best_action:
            return _Roots(result.value, result.policy, result.candidates)
        best = result.best()
        if self.discrete:
            return _Roots(result.value, th.nn.functional.one_hot(best, result.policy.shape[1]).float(), None)
        return _Roots(result.value, th.ones_like(result.policy[:, :1]), best.unsqueeze(1))

    def _search(self, batch: Batch, rows: np.ndarray, rng: np.random.Generator) -> tuple[_Roots, dict[str, th.Tensor]]:
        """
        :param rows: int64 [n], the states to search, of all B * (U + 1)
        :return: their searches, and statistics of them
        """
        device = batch.policy_mask.device

        def observations(chosen: np.ndarray) -> Any:
            index = th.from_numpy(chosen).to(device)
            return apply(lambda x: x.flatten(0, 1).index_select(0, index), batch.observations)

        if self.cache is None:
            result = self.search.run(observations(rows), rng)
            return self._roots(result), _search_stats(result, searched=len(rows), wanted=len(rows))
        slots = batch.slots.reshape(-1)[rows]
        unique, first = np.unique(slots, return_index=True)
        due = ~self.cache.hits(unique)
        if self.refresh_fraction > 0:
            due |= rng.random(len(unique)) < self.refresh_fraction
        if not due.any():
            return self.cache.get(slots, device), _search_stats(None, searched=0, wanted=len(slots))
        result = self.search.run(observations(rows[first[due]]), rng)
        self.cache.put(unique[due], self._roots(result))
        return self.cache.get(slots, device), _search_stats(result, searched=int(due.sum()), wanted=len(slots))


def _share_above(targets: th.Tensor, limit: th.Tensor, mask: th.Tensor) -> th.Tensor:
    return ((targets.abs() > limit) & mask).sum() / mask.sum().clamp(min=1)


def _search_stats(result: SearchResult | None, searched: int, wanted: int) -> dict[str, th.Tensor]:
    stats = {
        "search/reused": th.tensor(1 - searched / max(1, wanted)),
        "search/searched_states": th.tensor(float(searched)),
    }
    if result is not None:
        log_policy = th.log(result.policy.clamp(min=1e-12))
        stats["search/depth"] = result.depth.mean()
        stats["search/root_value"] = result.value.mean()
        stats["search/network_value"] = result.network_value.mean()
        stats["search/policy_entropy"] = -(result.policy * log_policy).sum(-1).mean()
    return stats
