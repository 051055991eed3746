"""
MultiDiscrete and MultiBinary actions: the factorised policy, its candidates, searches, targets and losses against brute
force, and whole agents.

Letters in shapes: B roots, S simulations, K root candidates, M inner candidates, D dimensions, L categories of all of them.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from common import BOX, SMALL, TINY, SpacesEnv
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from test_search import (
    NetworkSearch,
    RecordingGenerator,
    Rows,
    assert_same,
    identical,
    last_layer,
    make_network,
    observations,
    take,
)
from torch import nn
from torch.distributions import Categorical, Normal

from sb3_ezv2 import EZV2
from sb3_ezv2.distributions import SupportSpec
from sb3_ezv2.image_networks import ImageNetwork
from sb3_ezv2.losses import Targets, compute_losses
from sb3_ezv2.multi_discrete import MultiCategorical, MultiDiscreteCandidates, category_sizes, distinct_actions
from sb3_ezv2.reanalyze import Reanalyzer, learns_best_action
from sb3_ezv2.replay_buffer import SequenceReplayBuffer
from sb3_ezv2.search import GumbelSearch, SearchSettings
from sb3_ezv2.unroll import unroll

SIZES = [(3, 2, 4), (2, 2, 2), (5,), (1, 3)]


def random_logits(sizes: tuple[int, ...], *shape: int, seed: int = 0, scale: float = 1.5) -> th.Tensor:
    return scale * th.randn(*shape, sum(sizes), generator=th.Generator().manual_seed(seed))


def all_actions(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, sizes)))


def probabilities(logits: th.Tensor, sizes: tuple[int, ...], temperature: float = 1.0) -> dict[tuple[int, ...], float]:
    """Of all actions. :param logits: [L]"""
    parts = [th.softmax(part.double() / temperature, -1) for part in logits.split(sizes)]
    return {a: math.prod(float(part[i]) for part, i in zip(parts, a)) for a in all_actions(sizes)}


def tuples(actions: th.Tensor) -> list[Any]:
    """:param actions: [n, D] :return: n tuples"""
    return [tuple(action) for action in actions.tolist()]


def assert_frequencies(found: list[Any], expected: dict[Any, float]) -> None:
    """Within five standard errors, and nothing else was found."""
    assert set(found) <= set(expected)
    for key, p in expected.items():
        assert abs(found.count(key) / len(found) - p) < 5 * math.sqrt(p * (1 - p) / len(found)) + 1e-4, key


# --------------------------------------------------------------------------------------------------------------------
# The distribution
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_log_prob_and_entropy_are_those_of_brute_force(sizes: tuple[int, ...]) -> None:
    logits = random_logits(sizes, 4).requires_grad_()
    actions = th.tensor(all_actions(sizes))
    # 4 distributions, the same actions of each
    log_prob = MultiCategorical(logits.unsqueeze(1), sizes).log_prob(actions)
    expected = th.tensor([list(probabilities(row, sizes).values()) for row in logits.detach()])
    assert log_prob.shape == (4, len(actions))
    th.testing.assert_close(log_prob.exp(), expected, rtol=1e-5, atol=1e-7)
    entropy = MultiCategorical(logits, sizes).entropy()
    th.testing.assert_close(entropy, -(expected * expected.log()).sum(1), rtol=1e-5, atol=1e-6)
    # and their gradients are those of torch's distributions
    parts = [Categorical(logits=part) for part in logits.split(sizes, dim=-1)]
    by_torch = sum(part.entropy() for part in parts), parts[0].log_prob(actions[-1, 0])
    ours = entropy, MultiCategorical(logits, sizes).log_prob(actions[-1])
    for k, (x, y) in enumerate(zip(ours, by_torch)):
        x_grad, y_grad = (th.autograd.grad(z.sum(), logits, retain_graph=True)[0] for z in (x, y))
        # log p(a) has the gradient of the first dimension's in that dimension's logits
        width = sum(sizes) if k == 0 else sizes[0]
        th.testing.assert_close(x_grad[:, :width], y_grad[:, :width], rtol=1e-4, atol=1e-6)
        assert x_grad.isfinite().all()


def test_extreme_logits_are_harmless() -> None:
    logits = th.tensor([[80.0, -80.0, 0.0, 300.0, -300.0]], requires_grad=True)
    distribution = MultiCategorical(logits, (2, 3))
    loss = distribution.entropy() + distribution.log_prob(th.tensor([1, 2]))
    (gradient,) = th.autograd.grad(loss.sum(), logits)
    assert distribution.entropy().item() == pytest.approx(0, abs=1e-6) and gradient.isfinite().all()
    assert distribution.log_prob(th.tensor([1, 2])).item() == pytest.approx(-760)


def test_samples_by_hand() -> None:
    """The category at which the cumulated probabilities, 0.25, 1 and 0.5, 0.75, 1, pass the number."""
    logits = th.log(th.tensor([0.25, 0.75, 0.5, 0.25, 0.25]))
    uniform = th.tensor([[0.0, 0.0], [0.24, 0.51], [0.26, 0.74], [0.99, 0.76], [1 - 2**-24, 1 - 2**-24]])
    samples = MultiCategorical(logits, (2, 3)).sample(uniform)
    assert samples.tolist() == [[0, 0], [0, 1], [1, 1], [1, 2], [1, 2]]
    # whatever the rounding, no category that there is not
    logits = random_logits((3, 7), 2000)
    assert (MultiCategorical(logits, (3, 7)).sample(th.full((2,), 1 - 2**-24)) <= th.tensor([2, 6])).all()


def test_the_flattened_policy_is_the_power_that_widens_a_gaussian() -> None:
    """c times the standard deviation: proportional to p^(1 / c^2)."""
    x = th.linspace(-3, 3, 50, dtype=th.float64)
    difference = Normal(0.7, 3 * 0.4).log_prob(x) - Normal(0.7, 0.4).log_prob(x) / 9
    th.testing.assert_close(difference, difference[:1].expand(50))
    candidates = MultiDiscreteCandidates((4, 4, 4), 8, 2, 0.25, 3.0)
    assert candidates.temperature == 9


# --------------------------------------------------------------------------------------------------------------------
# Drawing without replacement
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_without_noise_the_most_probable_actions(sizes: tuple[int, ...]) -> None:
    logits = random_logits(sizes, 20)
    for count in (1, 3, min(7, math.prod(sizes)), math.prod(sizes)):
        actions, log_prob = distinct_actions(logits, sizes, count, None)
        assert actions.shape == (20, min(count, math.prod(sizes)), len(sizes))
        for row in range(20):
            ranked = sorted(probabilities(logits[row], sizes).items(), key=lambda item: -item[1])
            assert tuples(actions[row]) == [action for action, _ in ranked[:count]]
            np.testing.assert_allclose(log_prob[row].exp(), [p for _, p in ranked[:count]], rtol=1e-4)
    # equals keep their order
    assert tuples(distinct_actions(th.zeros(1, 5), (2, 3), 4, None)[0][0]) == [(0, 0), (0, 1), (0, 2), (1, 0)]


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_draws_are_those_of_an_urn(scale: float) -> None:
    """Each draw has the policy's probabilities among the actions that are left; the first three of six."""
    sizes = (2, 3)
    logits = random_logits(sizes, 1, scale=scale)
    p = probabilities(logits[0], sizes)
    draws, log_prob = distinct_actions(logits.expand(40_000, -1), sizes, 3, np.random.default_rng(0))
    expected = {(a, b, c): p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b]) for a, b, c in itertools.permutations(p, 3)}
    assert_frequencies([tuple(tuples(row)) for row in draws], expected)
    th.testing.assert_close(log_prob[0], th.tensor([math.log(p[a]) for a in tuples(draws[0])]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 3000.0])
def test_draws_are_all_different_however_sure_the_policy_is(scale: float) -> None:
    sizes = (3, 1, 7, 2, 10)
    logits = random_logits(sizes, 200, scale=scale)
    for count in (2, 50, 420):
        actions, log_prob = distinct_actions(logits, sizes, count, np.random.default_rng(1))
        assert ((actions >= 0) & (actions < th.tensor(sizes))).all() and log_prob.isfinite().all()
        assert all(len(set(tuples(row))) == count for row in actions)


# --------------------------------------------------------------------------------------------------------------------
# Candidates
# --------------------------------------------------------------------------------------------------------------------


def test_root_candidates_are_from_the_policy_and_from_a_flattened_one() -> None:
    """One of four from the policy; the rest from p^(1 / 9) without it. Order, frequencies and priors."""
    sizes = (2, 3)
    logits = random_logits(sizes, 1)
    p, q = probabilities(logits[0], sizes), probabilities(logits[0], sizes, temperature=9)
    roots = MultiDiscreteCandidates(sizes, 4, 2, 0.25, 3.0).at_root(logits.expand(30_000, -1), np.random.default_rng(0))
    assert roots.actions.shape == (30_000, 4, 2) and (roots.logits == 0).all() and (roots.gumbel == 0).all()
    assert all(len(set(tuples(row))) == 4 for row in roots.actions[:2000])
    expected = {(a, b): p[a] * q[b] / (1 - q[a]) for a, b in itertools.permutations(p, 2)}
    assert_frequencies([tuple(tuples(row[:2])) for row in roots.actions], expected)


@pytest.mark.parametrize(("count", "fraction", "own"), [(16, 0.25, 4), (8, 0.5, 4), (8, 1.0, 8), (5, 0.0, 1)])
def test_the_share_of_the_policy(count: int, fraction: float, own: int) -> None:
    """A policy that is sure of a few actions gives these; the flattened one any."""
    sizes = (12, 12)
    logits = th.zeros(500, 24)
    logits[:, [0, 1, 2, 12, 13, 14]] = 18.0  # 9 of 144 actions, and a ninth of that in the flattened policy
    roots = MultiDiscreteCandidates(sizes, count, 2, fraction, 3.0).at_root(logits, np.random.default_rng(0))
    likely = (roots.actions < 3).all(-1).float().mean(0)  # [K]
    assert (likely[:own] > 0.99).all() and (likely[own:] < 0.9).all()
    assert all(len(set(tuples(row))) == count for row in roots.actions)


def test_where_all_actions_are_candidates_the_root_is_that_of_discrete_actions() -> None:
    sizes = (3, 2)
    logits = random_logits(sizes, 7)
    candidates = MultiDiscreteCandidates(sizes, 16, 2, 0.25, 3.0)
    assert candidates.n_root == 6
    for rng in (None, np.random.default_rng(3)):
        roots = candidates.at_root(logits, rng)
        assert all(tuples(row) == all_actions(sizes) for row in roots.actions)
        expected = th.tensor([list(probabilities(row, sizes).values()) for row in logits])
        th.testing.assert_close(roots.logits.exp(), expected, rtol=1e-5, atol=1e-7)
        if rng is None:
            assert (roots.gumbel == 0).all()
        else:
            np.testing.assert_array_equal(roots.gumbel, np.random.default_rng(3).gumbel(size=(7, 6)).astype(np.float32))


def test_equal_inner_candidates_become_one_by_hand() -> None:
    candidates = MultiDiscreteCandidates((2, 3), 4, 3, 0.25, 3.0)
    logits = th.log(th.tensor([[0.5, 0.5, 0.2, 0.3, 0.5]]))
    noise = th.tensor([[[0.1, 0.1], [0.9, 0.9], [0.2, 0.15]], [[0.9, 0.4], [0.6, 0.3], [0.7, 0.45]]])
    out = th.zeros(6, 2, dtype=th.int64)
    priors = candidates.at_node(logits, noise, out)
    assert out.tolist() == [[0, 0], [1, 2], [0, 0], [1, 1], [1, 1], [1, 1]]
    th.testing.assert_close(th.softmax(priors, -1), th.tensor([[2 / 3, 1 / 3, 0], [1, 0, 0]]))


def test_inner_candidates_are_of_the_policy() -> None:
    sizes = (2, 3)
    logits = random_logits(sizes, 1)
    candidates = MultiDiscreteCandidates(sizes, 4, 2, 0.25, 3.0)
    noise = candidates.inner_noise(1, 20_000, np.random.default_rng(0))[0]
    out = th.zeros(40_000, 2, dtype=th.int64)
    candidates.at_node(logits.expand(20_000, -1), noise, out)
    p = probabilities(logits[0], sizes)
    # pairs: independent of each other
    pairs = [tuple(tuples(row)) for row in out.unflatten(0, (-1, 2))]
    assert_frequencies(pairs, {(a, b): p[a] * p[b] for a in p for b in p})
    # fixed without a generator, and the same for every root
    fixed = candidates.inner_noise(5, 20_000, None)
    assert fixed.shape == (5, 1, 2, 2) and th.equal(fixed, candidates.inner_noise(5, 1, None))


# --------------------------------------------------------------------------------------------------------------------
# Searches
# --------------------------------------------------------------------------------------------------------------------


class Recorder(RecordingGenerator):
    def random(self, *args: Any, **kwargs: Any) -> Any:
        self.drawn.append(super().random(*args, **kwargs))
        return self.drawn[-1]


class MultiSearch(NetworkSearch):
    """The plain search of one root. Its inner candidates are drawn dimension by dimension in plain Python."""

    def drawn(self, simulation: int) -> list[tuple[int, ...]]:
        assert self.noise is not None
        sizes = self.network.category_sizes
        parts = [th.softmax(part, -1).tolist() for part in self.states[simulation + 1][3][0].split(sizes)]
        if len(self.noise[simulation]) == math.prod(sizes):
            return all_actions(sizes)
        return [
            tuple(
                next(i for i in range(len(part)) if i == len(part) - 1 or math.fsum(part[: i + 1]) > u)
                for part, u in zip(parts, numbers)
            )
            for numbers in self.noise[simulation].tolist()
        ]

    def prior(self, state: int) -> np.ndarray:
        drawn = self.drawn(state - 1)
        p = probabilities(self.states[state][3][0], self.network.category_sizes)
        if len(drawn) == len(p):
            return np.array([math.log(p[action]) for action in drawn])
        return np.array([math.log(drawn.count(a)) if a not in drawn[:i] else -1e9 for i, a in enumerate(drawn)])

    def candidates(self, simulation: int) -> Any:
        return Rows([th.tensor(action) for action in self.drawn(simulation)])


SEARCHES = pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ((3, 2, 4), SearchSettings(20, 8, 3, gamma=0.9)),
        ((3, 2), SearchSettings(20, 16, 3, gamma=0.9)),
        ((2, 2), SearchSettings(16, 4, 4, gamma=0.9)),
    ],
    ids=["sampled", "all at the root", "all everywhere"],
)


@SEARCHES
def test_search_is_the_plain_search(sizes: tuple[int, ...], settings: SearchSettings) -> None:
    roots = 20
    network = make_network(spaces.MultiDiscrete(list(sizes)))
    obs, rng = observations(roots), Recorder(3)
    result = GumbelSearch(network, settings).run(obs, rng)
    assert result.candidates is not None and result.candidates.dtype == th.int64
    width = result.candidates.shape[1]
    assert width == min(settings.n_sampled_actions, math.prod(sizes))
    sampled = width < math.prod(sizes)
    gumbel = np.zeros((roots, width)) if sampled else rng.noise(roots, width)
    inner = min(settings.n_inner_actions, math.prod(sizes))
    noise = rng.noise(settings.n_simulations, roots, inner, len(sizes))
    clear, deepest = 0, 0
    for root in range(roots):
        with th.no_grad():
            search = MultiSearch(network, obs[root], settings, gumbel[root], list(result.candidates[root]), noise[:, root])
            if not sampled:
                p = probabilities(search.states[0][3][0], sizes)
                search.root.logits = [math.log(p[action]) for action in tuples(result.candidates[root])]
            search.run()
        if search.margin < 1e-4:
            continue
        clear += 1
        deepest = max(deepest, *search.depths)
        visits = max(search.root.visits(action) for action in range(width))
        best = search.choose_at_root(visits)
        assert result.action[root] == best
        assert th.equal(result.best()[root], result.candidates[root, best])
        np.testing.assert_allclose(result.policy[root], search.improved_policy(search.root), atol=1e-3)
        assert result.value[root].item() == pytest.approx(search.root.value(), rel=1e-3, abs=1e-3)
        assert result.depth[root].item() == pytest.approx(np.mean(search.depths), rel=1e-5)
    assert clear >= 14 and deepest >= 3
    assert len(set(result.action.tolist())) > 2 and result.value.std() > 0.1


@pytest.mark.parametrize("rng", [None, 7])
def test_one_dimension_with_all_its_categories_is_discrete(rng: int | None) -> None:
    """The same weights, the same noise, the same search."""
    discrete, multi = make_network(spaces.Discrete(5)), make_network(spaces.MultiDiscrete([5]))
    multi.load_state_dict(discrete.state_dict())
    obs, settings = observations(30), SearchSettings(20, 5, 5, gamma=0.9)
    x, y = (GumbelSearch(n, settings).run(obs, None if rng is None else np.random.default_rng(rng)) for n in (discrete, multi))
    th.testing.assert_close(x.action, y.best()[:, 0])
    assert_same(y._replace(candidates=None), x)


@SEARCHES
def test_without_noise_a_search_depends_on_observation_and_weights_alone(
    sizes: tuple[int, ...], settings: SearchSettings
) -> None:
    network = make_network(spaces.MultiDiscrete(list(sizes)))
    obs = observations(17)
    search = GumbelSearch(network, settings)
    together = search.run(obs, None)
    for row in range(0, 17, 4):
        assert_same(search.run(obs[row : row + 1], None), take(together, slice(row, row + 1)))
    assert_same(GumbelSearch(network, settings, max_roots=5).run(obs, None), together)
    assert not identical(search.run(obs, np.random.default_rng(0)), search.run(obs, np.random.default_rng(1)))
    assert identical(search.run(obs, None), together)
    # the policy's mode is a candidate, the first where they are sampled
    with th.no_grad():
        parts = network.initial_inference(obs)[2].split(sizes, dim=-1)
    mode = th.stack([part.argmax(-1) for part in parts], dim=-1)
    assert together.candidates is not None
    is_mode = (together.candidates == mode.unsqueeze(1)).all(-1)
    assert is_mode.any(1).all() and (is_mode[:, 0].all() or math.prod(sizes) == together.candidates.shape[1])


def test_the_best_of_all_candidates_is_found() -> None:
    """A model whose reward tells how many dimensions are right: the best candidate that was drawn wins."""
    sizes = (4, 4, 4)
    goals = th.randint(4, (40, 3), generator=th.Generator().manual_seed(0))

    class Model:
        discrete, training, category_sizes, action_dim, state_dim = False, False, sizes, 12, 2
        reward_support = make_network(spaces.Discrete(2)).reward_support

        def eval(self) -> Any:
            return self

        def initial_inference(self, obs: th.Tensor) -> Any:
            return th.cat([obs, th.zeros(len(obs), 1)], 1), th.zeros(len(obs)), th.zeros(len(obs), 12)

        def recurrent_inference(self, state: th.Tensor, action: th.Tensor) -> Any:
            right = (action == goals[state[:, 0].long()]).float().mean(-1)
            reward = th.where(state[:, 1] == 0, right, 0.0)  # of the first step alone
            return state + th.tensor([0.0, 1.0]), reward, th.zeros(len(state)), th.zeros(len(state), 12)

    model: Any = Model()
    result = GumbelSearch(model, SearchSettings(64, 16, 2)).run(th.arange(40.0).unsqueeze(1), np.random.default_rng(0))
    assert result.candidates is not None
    right = (result.candidates == goals.unsqueeze(1)).float().mean(-1)
    chosen = right.gather(1, result.action.unsqueeze(1)).squeeze(1)
    assert th.equal(chosen, right.amax(1)) and chosen.mean() > 0.6


def test_models_in_cpp_are_for_other_actions() -> None:
    search = GumbelSearch(make_network(spaces.MultiDiscrete([3, 2])), SearchSettings())
    assert search._native.get() is None
    assert GumbelSearch(make_network(spaces.Discrete(3)), SearchSettings())._native.get() is not None


def test_nan_is_said() -> None:
    for sizes in ((2, 2), (5, 5)):
        network = make_network(spaces.MultiDiscrete(list(sizes)))
        nn.init.constant_(last_layer(network.dynamics.joint).bias, float("nan"))
        with pytest.raises(ValueError, match=r"^the model's outputs .* NaN or infinite"):
            GumbelSearch(network, SearchSettings(4, 8)).run(observations(3), np.random.default_rng(0))


# --------------------------------------------------------------------------------------------------------------------
# Networks, losses, replay, targets
# --------------------------------------------------------------------------------------------------------------------


def one_hots(actions: th.Tensor, sizes: tuple[int, ...]) -> th.Tensor:
    """:param actions: int64 [B, D] :return: [B, L]"""
    return th.cat([th.nn.functional.one_hot(actions[:, d], size) for d, size in enumerate(sizes)], dim=1).float()


@pytest.mark.parametrize("images", [False, True])
def test_networks_see_one_one_hot_per_dimension(images: bool) -> None:
    sizes = (3, 2, 4)
    space = spaces.MultiDiscrete(list(sizes))
    network: Any = make_network(space)
    if images:
        support = SupportSpec(299.0, 21, "h")
        network = ImageNetwork(spaces.Box(0, 255, (1, 16, 16), np.uint8), space, [8], 4, 1, 2, 2, 2, 4, support, support)
        network.eval()
    assert last_layer(network.policy_head).out_features == 9 and network.dynamics.embedding[0].in_features == 9
    state = th.randn(6, *network.state_shape, generator=th.Generator().manual_seed(0))
    actions = th.tensor(all_actions(sizes))[[0, 1, 7, 13, 22, 23]]
    with th.no_grad():
        th.testing.assert_close(
            network.dynamics_step(state, actions), network.dynamics(state, one_hots(actions, sizes)), rtol=0, atol=0
        )
    assert not any("one_hot" in name or "first" in name for name in network.state_dict())


@pytest.mark.parametrize("count", [1, 5])
def test_policy_losses_are_those_of_loops(count: int) -> None:
    """Eq. 8, and Eq. 9 where there is one candidate; the entropy is exact, and no random number is drawn for it."""
    sizes = (3, 2, 4)
    network = make_network(spaces.MultiDiscrete(list(sizes))).eval()
    buffer = fill(SequenceReplayBuffer(60, BOX, spaces.MultiDiscrete(list(sizes)), "cpu", td_steps=3, unroll_steps=2, seed=0))
    batch = buffer.sequences(np.arange(6))
    generator = th.Generator().manual_seed(0)
    candidates = th.stack([th.randint(size, (6, 3, count), generator=generator) for size in sizes], dim=-1)
    policies = th.softmax(th.randn(6, 3, count, generator=generator), -1)
    targets = Targets(th.zeros(6, 3), batch.value_mask, policies, candidates)
    rng = np.random.default_rng(0)
    losses = compute_losses(network, batch, targets, rng, ent_coef=0.5)
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state
    with th.no_grad():
        states = unroll(network, batch.observations, batch.actions)
        policy, entropies = 0.0, []
        for b, k in itertools.product(range(6), range(3)):
            if not batch.policy_mask[b, k]:
                continue
            p = probabilities(network.policy_head(states[k, b : b + 1])[0], sizes)
            entropies.append(-sum(x * math.log(x) for x in p.values()))
            for weight, action in zip(policies[b, k].tolist(), tuples(candidates[b, k])):
                policy -= weight * math.log(p[action]) / 6 / 2
    assert losses.policy.item() == pytest.approx(policy, rel=1e-4)
    assert losses.entropy.item() == pytest.approx(np.mean(entropies), rel=1e-4)
    parts = losses.reward + losses.policy + 0.25 * losses.value + 2 * losses.consistency
    assert losses.total.item() == pytest.approx(parts.item() - 0.5 * sum(entropies) / 6 / 2, rel=1e-4)


def fill(buffer: SequenceReplayBuffer, steps: int = 30) -> SequenceReplayBuffer:
    """One environment with random actions and observations, and episodes of 7 steps."""
    rng = np.random.default_rng(0)
    sizes = category_sizes(buffer.action_space)
    for step in range(steps):
        obs = rng.normal(size=(1, 3)).astype(np.float32)
        buffer.add(obs, obs, rng.integers(sizes, size=(1, len(sizes))), np.ones(1), np.array([step % 7 == 6]), [{}])
    return buffer


@pytest.mark.parametrize("space", [spaces.MultiDiscrete([3, 1, 4], start=[7, 0, -2]), spaces.MultiBinary(3)], ids=str)
def test_replay_counts_categories_from_zero(space: spaces.Space) -> None:
    sizes = category_sizes(space)
    buffer = fill(SequenceReplayBuffer(400, BOX, space, "cpu", td_steps=3, unroll_steps=4, seed=0), 300)
    assert buffer.actions.dtype == np.int64 and buffer.actions.shape == (400, 3)
    starts = np.flatnonzero(buffer.kinds[: buffer.written[0]] == 0)
    batch = buffer.sequences(starts)
    assert batch.actions.dtype == th.int64 and batch.actions.shape == (len(starts), 4, 3)
    real = batch.policy_mask[:, :4].numpy()
    np.testing.assert_array_equal(batch.actions.numpy()[real], buffer.actions[batch.slots[:, :4][real]])
    padding = batch.actions.numpy()[~real]
    for d, size in enumerate(sizes):
        assert set(padding[:, d].tolist()) == set(range(size))
    arrays = [*vars(buffer).values(), *buffer.store.arrays.values()]
    nbytes = sum(x.nbytes for x in arrays if isinstance(x, np.ndarray) and len(x) == 400)
    assert SequenceReplayBuffer.estimate_nbytes(400, BOX, space) == pytest.approx(nbytes, rel=0.05)


class QuietSearch(GumbelSearch):
    """Without noise, so that a state's search is always the same."""

    def run(self, obs: Any, rng: Any) -> Any:
        return super().run(obs, None)


@pytest.mark.parametrize("best_action", [True, False])
@pytest.mark.parametrize("sizes", [(4, 4, 4), (2, 2)], ids=str)
def test_the_cache_changes_no_target(sizes: tuple[int, ...], best_action: bool) -> None:
    network = make_network(spaces.MultiDiscrete(list(sizes)))
    buffer = fill(SequenceReplayBuffer(60, BOX, spaces.MultiDiscrete(list(sizes)), "cpu", td_steps=3, unroll_steps=2, seed=0))
    search = QuietSearch(network, SearchSettings(8, 6, 2))
    cached, plain = (Reanalyzer(search, network, buffer, best_action=best_action, cache=cache) for cache in (True, False))
    rng = np.random.default_rng(0)
    for _ in range(4):
        batch = buffer.sequences(rng.choice(6, size=5))
        (x, _), (y, _) = (reanalyzer.targets(batch, 0, rng) for reanalyzer in (cached, plain))
        assert x.candidates is not None and y.candidates is not None
        assert x.candidates.dtype == th.int64 and th.equal(x.candidates, y.candidates)
        th.testing.assert_close(x.policies, y.policies, rtol=1e-3, atol=1e-4)
        assert x.candidates.shape[2] == (1 if best_action else min(6, math.prod(sizes)))
        # the candidates are those of the searches of these very states
        direct = search.run(batch.observations[0, :1], None)
        assert direct.candidates is not None
        th.testing.assert_close(x.candidates[0, 0], direct.best() if best_action else direct.candidates[0])


@pytest.mark.parametrize(
    ("space", "best_action"),
    [
        (spaces.MultiDiscrete([4, 4]), False),  # all 16 actions are candidates
        (spaces.MultiDiscrete([17]), False),
        (spaces.MultiDiscrete([4, 5]), True),
        (spaces.MultiDiscrete([10] * 40), True),
        (spaces.MultiBinary(4), False),
        (spaces.MultiBinary(5), True),
        (spaces.Discrete(99), False),
        (spaces.Box(-1.0, 1.0, (1,)), False),
        (spaces.Box(-1.0, 1.0, (2, 1)), True),
    ],
    ids=str,
)
def test_what_auto_means(space: spaces.Space, best_action: bool) -> None:
    assert learns_best_action("auto", space, 16) == best_action
    assert learns_best_action("best_action", space, 16) and not learns_best_action("candidates", space, 16)


# --------------------------------------------------------------------------------------------------------------------
# Agents
# --------------------------------------------------------------------------------------------------------------------


class Locks(gym.Env):
    """
    Two locks take turns. Each has a combination of its own; the reward is the share of the dials that are set as it says.

    :param sizes: positions of the dials
    """

    def __init__(self, sizes: list[int]):
        self.observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)
        self.action_space = spaces.MultiDiscrete(list(sizes))
        # the last positions of one, and the middle ones of the other
        self.combinations = np.array([np.array(sizes) - 1, np.array(sizes) // 2])
        self.steps = 0

    def _observe(self) -> np.ndarray:
        return np.eye(2, dtype=np.float32)[self.steps % 2]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float((action == self.combinations[self.steps % 2]).mean())
        self.steps += 1
        return self._observe(), reward, self.steps == 6, False, {}


class Dials(gym.Env):
    """Bring two dials from 3 to 5 steps away to 0 and keep them there. A reward of 1/2 for each dial near 0."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-4.0, 4.0, (2,), np.float32)
        self.action_space = spaces.MultiDiscrete([5, 5])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.x, self.steps = self.np_random.uniform(1, 2, 2) * self.np_random.choice([-1, 1], 2), 0
        return self.x.astype(np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.x = np.clip(self.x + 0.2 * (action - 2), -4, 4)
        self.steps += 1
        return self.x.astype(np.float32), float((np.abs(self.x) < 0.4).mean()), False, self.steps == 20, {}


class Controller:
    """The best policy, nearly."""

    def predict(self, observation: np.ndarray, *args: Any, **kwargs: Any) -> tuple[np.ndarray, None]:
        return np.round(np.clip(-observation / 0.2, -2, 2)).astype(int) + 2, None


def score(policy: Any) -> float:
    env = make_vec_env(Dials, n_envs=20, seed=7)
    mean, _ = evaluate_policy(policy, env, n_eval_episodes=20, deterministic=True, warn=False)
    assert isinstance(mean, float)
    return mean


def test_learns() -> None:
    """
    25 actions, of which 8 are candidates. A run this short is far from the best, and far from one that learns nothing; three
    seeds, since one alone can be late for rounding.
    """
    best, before, learned = score(Controller()), [], []
    for seed in (0, 1, 2):
        model = EZV2("MlpPolicy", Dials(), seed=seed, gamma=0.9, **SMALL)
        before.append(score(model))
        model.learn(900)
        learned.append(score(model))
    assert max(before) < 0.08 * best and np.mean(learned) > 0.25 * best, f"before {before}, learned {learned}, best {best:.1f}"


@pytest.mark.parametrize(
    ("space", "settings"),
    [
        (spaces.MultiDiscrete([2, 2], start=[5, -1]), {}),
        (spaces.MultiDiscrete([3, 1, 4], dtype=np.int32), {}),
        (spaces.MultiBinary(3), dict(policy_target="candidates", reanalyze_cache=False)),
        (spaces.MultiDiscrete([9, 9]), dict(n_sampled_actions=1, n_inner_actions=1, n_simulations=1)),
        (spaces.MultiDiscrete([4, 4]), dict(policy_kwargs={**TINY["policy_kwargs"], "value_prefix": True, "lstm_dim": 8})),
    ],
    ids=str,
)
def test_spaces_and_settings(space: spaces.Space, settings: dict[str, Any]) -> None:
    """The environment accepts nothing but actions of its space."""
    model = EZV2("MlpPolicy", make_vec_env(lambda: SpacesEnv(BOX, space), 2), seed=0, **{**TINY, **settings})
    model.learn(54)
    assert model._n_updates == 7 and model.replay_buffer is not None
    stored = model.replay_buffer.actions[model.replay_buffer.stamps >= 0]
    assert stored.min() == 0 and (stored.max(0) == np.array(category_sizes(space)) - 1).all()
    for deterministic in (True, False):
        batch = np.stack([BOX.sample() for _ in range(7)])
        actions, _ = model.predict(batch, deterministic=deterministic)
        assert actions.shape == (7, *space.shape) and all(space.contains(action) for action in actions)  # type: ignore[misc]
        action, _ = model.predict(batch[0], deterministic=deterministic)
        assert space.contains(action)


def test_images() -> None:
    image = spaces.Box(0, 255, (16, 16, 1), np.uint8)
    sizes: dict[str, Any] = dict(channels=4, n_downsamples=2, head_channels=2, action_embedding_dim=2, projection_dim=4)
    settings = {**TINY, "batch_size": 8, "policy_kwargs": {**sizes, "net_arch": [8]}}
    model = EZV2("CnnPolicy", SpacesEnv(image, spaces.MultiDiscrete([3, 4])), seed=0, **settings).learn(46)
    assert model._n_updates == 6
    action, _ = model.predict(image.sample())
    assert model.action_space.contains(action)


def test_save_load_goes_on_identically(tmp_path: Path) -> None:
    def make_env() -> Any:
        return make_vec_env(lambda: Locks([5, 4, 3]), 2, seed=1)

    model = EZV2("MlpPolicy", make_env(), gradient_steps=-1, seed=0, **TINY).learn(60)
    model.save(tmp_path / "agent")
    model.save_replay_buffer(tmp_path / "replay")
    loaded = EZV2.load(tmp_path / "agent", env=make_env())
    loaded.load_replay_buffer(tmp_path / "replay")
    batch = np.stack([model.observation_space.sample() for _ in range(5)])
    expected, _ = model.predict(batch, deterministic=True)
    np.testing.assert_array_equal(loaded.predict(batch, deterministic=True)[0], expected)
    # Both from a reset of equally seeded environments, without remembered searches, which are not saved
    model.set_env(make_env())
    model._reanalyzer = None
    for agent in (model, loaded):
        agent.get_env().seed(1)  # type: ignore[union-attr]
        agent.learn(30, reset_num_timesteps=False)
    assert model._n_updates > 40
    pairs = zip(model.policy.state_dict().items(), loaded.policy.state_dict().items())
    assert all(name == other and th.equal(x, y) for (name, x), (other, y) in pairs)
    with pytest.raises(ValueError, match="Action spaces do not match"):
        EZV2.load(tmp_path / "agent", env=make_vec_env(lambda: Locks([5, 5]), 2))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])),
            r"^MultiDiscrete actions must have one dimension, not the shape \(2, 2\)",
        ),
        (spaces.MultiBinary([2, 2]), r"^MultiBinary actions must have one dimension, not the shape \(2, 2\)"),
        (spaces.MultiDiscrete([]), "no dimension at all"),
        (spaces.Tuple([spaces.Discrete(2)]), "^EZV2 supports Box, Discrete, MultiDiscrete and MultiBinary action spaces, not"),
        (spaces.Dict(a=spaces.Discrete(2)), "^EZV2 supports Box, Discrete, MultiDiscrete and MultiBinary action spaces, not"),
    ],
    ids=str,
)
def test_spaces_that_do_not_work(space: spaces.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EZV2("MlpPolicy", SpacesEnv(BOX, space), **TINY)
