"""
Value and policy targets by hand, and the cache of searches.

Observations are single numbers x here. The stub networks know what they think of them: the bootstrap network values x at 10 x,
and a search of x finds 1000 + x. So every target tells where it comes from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_ezv2.distributions import CategoricalSupport, SupportSpec
from sb3_ezv2.losses import Targets
from sb3_ezv2.networks import Ezv2Network
from sb3_ezv2.reanalyze import Reanalyzer
from sb3_ezv2.replay_buffer import SequenceReplayBuffer
from sb3_ezv2.search import GumbelSearch, SearchResult, SearchSettings

OBS = spaces.Box(-np.inf, np.inf, (1,), np.float32)
DISCRETE = spaces.Discrete(4)
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
RNG = np.random.default_rng(0)


class StubModel:
    """What a reanalyzer asks of a target network."""

    def __init__(self, action_space: spaces.Space):
        self.discrete = isinstance(action_space, spaces.Discrete)
        self.category_sizes: tuple[int, ...] = ()
        self.action_dim = 4 if self.discrete else 2


class StubSearch:
    """
    Finds known things and remembers what was searched.

    :param action_space: discrete: 4 root actions, else 3 candidates of 2 dimensions
    """

    def __init__(self, action_space: spaces.Space):
        self.model = StubModel(action_space)
        self.num_root_actions = 4 if self.model.discrete else 3
        self.searched: list[list[float]] = []
        self.offset = 1000.0
        self.generators: list[Any] = []

    def digest(self) -> bytes:
        return str(self.offset).encode()

    def run(self, obs: th.Tensor, rng: Any) -> SearchResult:
        x = obs[:, 0]
        self.searched.append(x.tolist())
        self.generators.append(rng)
        index = th.arange(self.num_root_actions)
        logits = x.unsqueeze(1) * (index + 1) / 50
        candidates = None
        if not self.model.discrete:
            candidates = th.stack([x.unsqueeze(1) / 1000 + 0.1 * index, -x.unsqueeze(1) / 1000 - 0.2 * index], dim=2)
        return SearchResult(
            action=x.long() % self.num_root_actions,
            policy=th.softmax(logits, 1),
            value=self.offset + x,
            candidates=candidates,
            network_value=-x,
            depth=th.ones(len(x)),
        )

    def count(self) -> int:
        """Number of states that were searched since the last call."""
        count = sum(map(len, self.searched))
        self.searched = []
        return count


class StubBootstrap:
    """Values x at 10 x, and can express values up to 150 and rewards up to 3."""

    def __init__(self) -> None:
        self.value_support = CategoricalSupport(SupportSpec(15.0, 51, "h"))
        self.value_support.scale.fill_(10)
        self.reward_support = CategoricalSupport(SupportSpec(3.0, 51, "h"))

    def reward_targets(self, rewards: th.Tensor) -> th.Tensor:
        return rewards

    def values(self, obs: th.Tensor) -> th.Tensor:
        return 10 * obs[:, 0]


def make_buffer(action_space: spaces.Space = DISCRETE, size: int = 40, **settings: Any) -> SequenceReplayBuffer:
    defaults: dict[str, Any] = dict(gamma=0.5, unroll_steps=3, td_steps=2, td_steps_min=2, td_steps_age=10**6, seed=0)
    return SequenceReplayBuffer(size, OBS, action_space, device="cpu", **{**defaults, **settings})


def make(buffer: SequenceReplayBuffer, **settings: Any) -> tuple[Reanalyzer, StubSearch]:
    search = StubSearch(buffer.action_space)
    return Reanalyzer(search, StubBootstrap(), buffer, **settings), search  # type: ignore[arg-type]


def write(buffer: SequenceReplayBuffer, first: float, length: int, end: str = "") -> list[int]:
    """
    An episode of one environment: step t has observation first + t and reward 2^t.

    :param end: ``"terminated"``, ``"truncated"``, or that it goes on
    :return: slots of its transitions
    """
    slots = []
    for t in range(length):
        done = np.array([bool(end) and t == length - 1])
        action = np.zeros((1, *buffer.action_space.shape))  # type: ignore[misc]
        obs = np.array([[first + t]], np.float32)
        buffer.add(obs, obs + 1, action, np.array([2.0**t]), done, [{"TimeLimit.truncated": end == "truncated"}])
        slots.append(int(buffer.last_slots[0]))
    return slots


def masked_values(targets: Targets, row: int) -> list[float | None]:
    """None where nothing is learnt."""
    values, mask = targets.values[row].tolist(), targets.value_mask[row].tolist()
    return [x if keep else None for x, keep in zip(values, mask)]


# --------------------------------------------------------------------------------------------------------------------
# Value targets
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("end", "td", "by_search"),
    [
        # 1 + 2/2 + 120/4; 2 + 4/2; 4; 0
        ("terminated", [[32, 4, 4, 0], [4, 4, 0, 0]], [[1010, 1011, 1012, 0], [1011, 1012, 0, 0]]),
        # 1 + 2/2 + 120/4; 2 + 4/2 + 130/4; 4 + 130/2
        ("truncated", [[32, 36.5, 69, None], [36.5, 69, None, None]], [[1010, 1011, 1012, None], [1011, 1012, None, None]]),
        # 1 + 2/2 + 120/4; 2 + 120/2; the newest state can be searched, but there is nothing to bootstrap from
        ("", [[32, 62, None, None], [62, None, None, None]], [[1010, 1011, 1012, None], [1011, 1012, None, None]]),
    ],
)
def test_values_by_hand(end: str, td: list[Any], by_search: list[Any], cache: bool) -> None:
    """Three steps from 10 with rewards 1, 2, 4, of which the first two are starts."""
    buffer = make_buffer()
    slots = write(buffer, 10, 3, end)
    batch = buffer.sequences(np.array(slots[:2]))
    for value_target, expected in (("td", td), ("search", by_search)):
        reanalyzer, _ = make(buffer, value_target=value_target, mixed_value_start=0, fresh_transitions=0, cache=cache)
        targets, stats = reanalyzer.targets(batch, 0, RNG)
        assert [masked_values(targets, row) for row in range(2)] == expected
        assert stats["target/search_share"] == (value_target == "search")
        # td_values of a masked step may be anything, but is a number
        assert targets.values.isfinite().all() and targets.values.dtype == th.float32
    # the policy's masks are the batch's, and targets beyond them are 0
    assert (targets.policies.sum(-1)[~batch.policy_mask] == 0).all()
    th.testing.assert_close(targets.policies.sum(-1)[batch.policy_mask], th.ones(int(batch.policy_mask.sum())))


@pytest.mark.parametrize("cache", [True, False])
def test_the_mixed_target_switches_over(cache: bool) -> None:
    """Eq. 16: search-based values after T1 updates, for sequences that do not start among the T2 newest transitions."""
    buffer = make_buffer()
    slots = write(buffer, 10, 12)
    batch = buffer.sequences(np.array(slots[:8]))
    assert batch.ages.tolist() == [12, 11, 10, 9, 8, 7, 6, 5]
    reanalyzer, _ = make(buffer, mixed_value_start=100, fresh_transitions=7, cache=cache)
    n_step = reanalyzer.td_values(batch)
    for updates in (0, 99):
        targets, stats = reanalyzer.targets(batch, updates, RNG)
        th.testing.assert_close(targets.values, n_step)
        assert stats["target/search_share"] == 0
        assert th.equal(targets.value_mask, batch.value_mask)
    for updates in (100, 10**6):
        targets, stats = reanalyzer.targets(batch, updates, RNG)
        # all steps of a sequence are judged by its start: the seven newest transitions are those from 15 on
        assert targets.values[:5].tolist() == [[1010 + row + k for k in range(4)] for row in range(5)]
        th.testing.assert_close(targets.values[5:], n_step[5:])
        assert stats["target/search_share"] == pytest.approx(5 / 8)
    # transitions grow stale
    write(buffer, 100, 3)
    targets, _ = reanalyzer.targets(buffer.sequences(np.array(slots[:8])), 100, RNG)
    assert targets.values[7].tolist() == [1017, 1018, 1019, 1020]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        # 1010 by search, then the returns to the termination, two steps before it and less, as they were observed
        ("terminated", [[1010, 4, 4, 0], [4, 4, 0, 0]]),
        ("truncated", [[1010, 1011, 1012, None], [1011, 1012, None, None]]),
    ],
)
def test_the_mixed_target_keeps_returns_that_were_observed_to_a_termination(end: str, expected: list[Any]) -> None:
    buffer = make_buffer()
    batch = buffer.sequences(np.array(write(buffer, 10, 3, end)[:2]))
    reanalyzer, _ = make(buffer, value_target="mixed", mixed_value_start=0, fresh_transitions=0)
    targets, stats = reanalyzer.targets(batch, 0, RNG)
    assert [masked_values(targets, row) for row in range(2)] == expected
    assert stats["target/search_share"] == pytest.approx(1 / 5 if end == "terminated" else 1)


def test_mixed_is_the_default_and_td_values_need_no_search() -> None:
    buffer = make_buffer()
    batch = buffer.sequences(np.array(write(buffer, 10, 8)[:3]))
    reanalyzer, search = make(buffer)
    assert (reanalyzer.value_target, reanalyzer.mixed_value_start, reanalyzer.fresh_transitions) == ("mixed", 40_000, 20_000)
    expected = th.tensor([[1 + 1 + 30, 2 + 2 + 130 / 4], [2 + 2 + 130 / 4, 4 + 4 + 35]])
    th.testing.assert_close(reanalyzer.td_values(batch)[:2, :2], expected)
    assert search.count() == 0


def test_priorities_need_no_unroll() -> None:
    buffer = make_buffer()
    slots = np.array(write(buffer, 10, 3, "terminated"))
    reanalyzer, _ = make(buffer)
    values = reanalyzer.td_values(buffer.sequences(slots, unroll_steps=0))
    assert values.tolist() == [[32], [4], [4]]


def test_the_share_of_targets_that_cannot_be_expressed_is_told() -> None:
    """The support ends at 150: n-step values are below, search-based ones above; of the rewards 1, 2, 4 the last."""
    buffer = make_buffer()
    batch = buffer.sequences(np.array(write(buffer, 10, 3, "terminated")))
    for value_target, share in (("td", 0.0), ("search", 6 / 12)):
        _, stats = make(buffer, value_target=value_target)[0].targets(batch, 0, RNG)
        assert stats["target/value_clipped"].item() == pytest.approx(share)
        assert stats["target/reward_clipped"].item() == pytest.approx(3 / 9)
        if value_target == "td":
            assert stats["target/td_value"].item() == pytest.approx((32 + 4 * 5) / 12)
    assert "target/td_value" not in stats  # where all values are search-based, none is computed
    assert stats["target/search_value"].item() == pytest.approx(1000 + (10 + 11 + 12 + 11 + 12 + 12) / 6)
    # 14, 15, 16, cut off at 17: 170 is the value of a step that is masked
    batch = buffer.sequences(np.array(write(buffer, 14, 3, "truncated")[:1]))
    _, stats = make(buffer, value_target="td")[0].targets(batch, 0, RNG)
    assert stats["target/value_clipped"] == 0
    assert stats["target/td_value"].item() == pytest.approx((42 + 46.5 + 89) / 3)


# --------------------------------------------------------------------------------------------------------------------
# Policy targets
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("best_action", [True, False])
@pytest.mark.parametrize("action_space", [DISCRETE, BOX], ids=["discrete", "box"])
def test_policies_by_hand(action_space: spaces.Space, best_action: bool, cache: bool) -> None:
    """Eq. 8: the improved policy over all candidates; Eq. 9: the recommended action alone."""
    buffer = make_buffer(action_space)
    slots = write(buffer, 10, 4, "terminated")
    batch = buffer.sequences(np.array([slots[1], slots[3], slots[1]]))
    reanalyzer, search = make(buffer, best_action=best_action, cache=cache)
    for _ in range(2):  # found, then remembered
        targets, _ = reanalyzer.targets(batch, 0, RNG)
        policies, candidates = targets.policies, targets.candidates
        assert (candidates is None) == search.model.discrete
        for row, k, x in ((0, 0, 11), (0, 1, 12), (0, 2, 13), (1, 0, 13), (2, 0, 11), (2, 2, 13)):
            result = search.run(th.tensor([[float(x)]]), None)
            action = int(result.action)
            if not best_action:
                th.testing.assert_close(policies[row, k], result.policy[0])
                if candidates is not None and result.candidates is not None:
                    th.testing.assert_close(candidates[row, k], result.candidates[0])
            elif candidates is None or result.candidates is None:
                assert policies[row, k].tolist() == [float(index == action) for index in range(4)]
            else:
                assert policies[row, k].tolist() == [1.0]
                th.testing.assert_close(candidates[row, k], result.candidates[0, action : action + 1])
        # padding: no policy
        for row, k in ((0, 3), (1, 1), (1, 3), (2, 3)):
            assert (policies[row, k] == 0).all()
    if candidates is not None:
        assert candidates.shape == (3, 4, 1 if best_action else 3, 2)
    assert policies.shape == (3, 4, 4 if candidates is None else candidates.shape[2])


def test_the_given_generator_makes_the_noise() -> None:
    buffer = make_buffer()
    batch = buffer.sequences(np.array(write(buffer, 10, 4)))
    for cache in (True, False):
        reanalyzer, search = make(buffer, cache=cache)
        rng = np.random.default_rng(3)
        reanalyzer.targets(batch, 0, rng)
        assert search.generators == [rng]


# --------------------------------------------------------------------------------------------------------------------
# The cache
# --------------------------------------------------------------------------------------------------------------------


def test_each_state_is_searched_once() -> None:
    buffer = make_buffer()
    slots = np.array(write(buffer, 10, 9))
    reanalyzer, search = make(buffer)
    _, stats = reanalyzer.targets(buffer.sequences(slots[[0, 2, 0]]), 0, RNG)
    # 10 .. 13 and 12 .. 15, the former twice
    assert len(search.searched) == 1 and sorted(search.searched[0]) == [10, 11, 12, 13, 14, 15]
    assert stats["search/searched_states"] == 6 and stats["search/reused"].item() == pytest.approx(1 - 6 / 12)
    assert search.count() == 6
    # hits alone: no search at all
    targets, stats = reanalyzer.targets(buffer.sequences(slots[[2, 1]]), 0, RNG)
    assert search.searched == [] and stats["search/reused"] == 1 and stats["search/searched_states"] == 0
    # hits and misses mixed
    reanalyzer.value_target = "search"
    targets, stats = reanalyzer.targets(buffer.sequences(slots[[4, 1]]), 0, RNG)
    assert search.searched == [[16, 17]] and stats["search/reused"].item() == pytest.approx(1 - 2 / 8)
    assert targets.values.tolist() == [[1014, 1015, 1016, 1017], [1011, 1012, 1013, 1014]]


def test_without_the_cache_every_root_is_searched() -> None:
    buffer = make_buffer()
    batch = buffer.sequences(np.array(write(buffer, 10, 9))[[0, 2, 0]])
    reanalyzer, search = make(buffer, cache=False)
    for _ in range(2):
        _, stats = reanalyzer.targets(batch, 0, RNG)
        assert search.count() == 12 and stats["search/reused"] == 0 and stats["search/searched_states"] == 12
    reanalyzer.target_refreshed()
    reanalyzer.store(buffer.last_slots, search.run(th.tensor([[5.0]]), None))
    search.count()
    reanalyzer.targets(batch, 0, RNG)
    assert search.count() == 12


def test_a_refresh_makes_every_search_stale() -> None:
    buffer = make_buffer()
    slots = np.array(write(buffer, 10, 9))
    reanalyzer, search = make(buffer, value_target="search")
    batch = buffer.sequences(slots[:1])
    for offset in (1000.0, 2000.0, 3000.0):
        search.offset = offset
        targets, _ = reanalyzer.targets(batch, 0, RNG)
        assert targets.values.tolist() == [[offset + x for x in (10, 11, 12, 13)]]
        assert search.count() == 4
        search.offset = -1.0  # what is not searched cannot change
        targets, _ = reanalyzer.targets(batch, 0, RNG)
        assert targets.values[0, 0] == offset + 10 and search.count() == 0
        reanalyzer.target_refreshed()


def test_overwritten_slots_are_stale() -> None:
    """A ring of 8. The same slots hold other states later."""
    buffer = make_buffer(size=8)
    slots = np.array(write(buffer, 10, 4, "terminated"))
    reanalyzer, search = make(buffer, value_target="search")
    reanalyzer.targets(buffer.sequences(slots), 0, RNG)
    assert search.count() == 4
    new = np.array(write(buffer, 50, 6))  # 5, 6, 7, then over the old 0, 1, 2
    assert new.tolist() == [5, 6, 7, 0, 1, 2]
    targets, _ = reanalyzer.targets(buffer.sequences(np.array([0, 3])), 0, RNG)
    assert sorted(search.searched[0]) == [53, 54, 55]  # 13 in slot 3 is still known
    assert masked_values(targets, 0) == [1053, 1054, 1055, None] and masked_values(targets, 1) == [1013, 0, 0, 0]
    search.count()
    # once more around: the episode goes on, slot 0 holds its last state but two
    write(buffer, 90, 8)
    targets, _ = reanalyzer.targets(buffer.sequences(np.array([0])), 0, RNG)
    assert search.searched == [[95, 96, 97]] and targets.values[0, 0] == 1095


@pytest.mark.parametrize("best_action", [True, False])
@pytest.mark.parametrize("action_space", [DISCRETE, BOX], ids=["discrete", "box"])
def test_searches_made_to_act_are_used(action_space: spaces.Space, best_action: bool) -> None:
    buffer = make_buffer(action_space)
    reanalyzer, search = make(buffer, value_target="search", best_action=best_action)
    slots = []
    for x in range(10, 16):
        slots += write(buffer, x, 1)
        search.offset = 5000.0
        reanalyzer.store(buffer.last_slots, search.run(th.tensor([[float(x)]]), None))
    search.count()
    search.offset = 1000.0
    batch = buffer.sequences(np.array(slots[:2]))
    targets, _ = reanalyzer.targets(batch, 0, RNG)
    assert search.count() == 0 and targets.values[0].tolist() == [5010, 5011, 5012, 5013]
    fresh, _ = make(buffer, value_target="search", best_action=best_action)
    expected, _ = fresh.targets(batch, 0, RNG)
    th.testing.assert_close(targets.policies, expected.policies)
    if targets.candidates is not None:
        th.testing.assert_close(targets.candidates, expected.candidates)
    # until the target network is refreshed, or the slot has another state
    reanalyzer.target_refreshed()
    targets, _ = reanalyzer.targets(batch, 0, RNG)
    assert search.count() == 5 and targets.values[0, 0] == 1010


def test_the_cache_changes_no_target() -> None:
    """On a random stream with episode ends, wrap-around and refreshes, of a search without noise."""
    rng = np.random.default_rng(0)
    buffer = make_buffer(BOX, size=60, n_envs=2, td_steps_age=5)
    cached, cached_search = make(buffer, value_target="mixed", mixed_value_start=100, fresh_transitions=15)
    plain, plain_search = make(buffer, value_target="mixed", mixed_value_start=100, fresh_transitions=15, cache=False)
    for step in range(250):
        obs = rng.normal(scale=20, size=(2, 1)).astype(np.float32)
        done = rng.random(2) < 0.1
        infos = [{"TimeLimit.truncated": bool(rng.random() < 0.5)} for _ in range(2)]
        buffer.add(obs, obs + 1, np.zeros((2, 2)), rng.normal(size=2), done, infos)
        fresh = buffer.take_fresh()
        buffer.update_priorities(fresh, np.ones(len(fresh)))
        if step % 3 == 0:
            cached.store(buffer.last_slots, cached_search.run(th.from_numpy(obs), None))
        if step % 40 == 39:
            for reanalyzer, search in ((cached, cached_search), (plain, plain_search)):
                search.offset += 100
                reanalyzer.target_refreshed()
        if buffer.num_sampleable == 0:
            continue
        batch = buffer.sample(6)
        with_cache, _ = cached.targets(batch, step, RNG)
        without, _ = plain.targets(batch, step, RNG)
        for x, y in zip(with_cache, without):
            assert x is not None and y is not None
            th.testing.assert_close(x, y)
    assert cached_search.count() < 0.5 * plain_search.count()


class QuietSearch(GumbelSearch):
    """Without noise, so that a state's search is always the same."""

    def run(self, obs: Any, rng: Any) -> SearchResult:
        return super().run(obs, None)


@pytest.mark.parametrize("best_action", [True, False])
@pytest.mark.parametrize("action_space", [DISCRETE, BOX], ids=["discrete", "box"])
def test_the_cache_changes_no_target_of_a_network(action_space: spaces.Space, best_action: bool) -> None:
    def make_network(seed: int) -> Ezv2Network:
        th.manual_seed(seed)
        network = Ezv2Network(
            OBS,
            action_space,
            FlattenExtractor(OBS),
            net_arch=[16],
            state_dim=8,
            n_blocks=1,
            action_embedding_dim=4,
            projection_dim=8,
            value_support=SupportSpec(299.0, 21, "h"),
            reward_support=SupportSpec(299.0, 21, "h"),
        )
        for head in (network.value_head, network.reward_head, network.policy_head):
            for parameter in head.mlp[-1].parameters():
                nn.init.normal_(parameter, std=0.2)
        return network.eval()

    network = make_network(0)
    buffer = make_buffer(action_space)
    rng = np.random.default_rng(1)
    slots = []
    for length, end in ((7, "terminated"), (5, "truncated"), (8, "")):
        slots += write(buffer, rng.normal(), length, end)
    search = QuietSearch(network, SearchSettings(8, 4, 2))
    reanalyzers = [
        Reanalyzer(search, network, buffer, value_target="search", best_action=best_action, cache=cache)
        for cache in (True, False)
    ]
    values = []
    for count in range(12):
        batch = buffer.sequences(rng.choice(slots, size=5))
        (x, _), (y, _) = (reanalyzer.targets(batch, count, RNG) for reanalyzer in reanalyzers)
        values.append(x.values[:, 0].mean().item())
        th.testing.assert_close(x.values, y.values, rtol=1e-4, atol=1e-4)
        assert th.equal(x.value_mask, y.value_mask)
        th.testing.assert_close(x.policies, y.policies, rtol=1e-3, atol=1e-4)
        th.testing.assert_close(x.candidates, y.candidates, rtol=1e-4, atol=1e-4)
        assert not x.values.requires_grad and not x.policies.requires_grad
        if count == 5:
            network.load_state_dict(make_network(1).state_dict())
            for reanalyzer in reanalyzers:
                reanalyzer.target_refreshed()
    assert abs(np.mean(values[:6]) - np.mean(values[6:])) > 0.01
