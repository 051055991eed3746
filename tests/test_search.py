"""GumbelSearch, the loop between model and tree, against the plain search of ``oracles`` and against known answers.

Letters in shapes: B roots, S simulations, K root actions, M inner actions, A action dimensions.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from oracles import Node, PlainSearch, Problem, Settings, plain_search, random_problem, sequential_halving
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

import sb3_ezv2.search
from sb3_ezv2.ctree import fill_normal
from sb3_ezv2.distributions import CategoricalSupport, SquashedGaussian, SupportSpec
from sb3_ezv2.networks import Ezv2Network
from sb3_ezv2.search import GumbelSearch, SearchResult, SearchSettings

OBS_DIM = 3


class RecordingGenerator(np.random.Generator):
    """Remembers all noise, so that a reference can search with the same."""

    def __init__(self, seed: int):
        super().__init__(np.random.PCG64(seed))
        self.drawn: list[np.ndarray] = []
        self.keys: list[np.uint64] = []

    def gumbel(self, *args: Any, **kwargs: Any) -> Any:
        self.drawn.append(super().gumbel(*args, **kwargs))
        return self.drawn[-1]

    def integers(self, *args: Any, **kwargs: Any) -> Any:
        self.keys.append(super().integers(*args, **kwargs))
        return self.keys[-1]

    def noise(self, *shape: int) -> np.ndarray:
        """The one array of this shape that was drawn."""
        (array,) = [x for x in self.drawn if x.shape == shape]
        return array

    def inner_noise(self, settings: SearchSettings, roots: int, action_dim: int) -> np.ndarray:
        """The noise [S, B, M, A] of Box candidates at inner nodes. Of the one key's numbers those of the roots come first."""
        shape = settings.n_simulations, roots, settings.n_inner_actions, action_dim
        size = int(np.prod(shape))
        numbers = np.empty(roots * settings.n_sampled_actions * action_dim + size, np.float32)
        (key,) = self.keys
        fill_normal(key, numbers)
        return numbers[-size:].reshape(shape)


class EagerModel:
    """
    Base of the models below, which are no modules, so that nothing is traced.

    :param action_space: tells whether actions are discrete, and how many or of how many dimensions
    """

    def __init__(self, action_space: spaces.Space, state_dim: int):
        self.discrete = isinstance(action_space, spaces.Discrete)
        self.category_sizes: tuple[int, ...] = ()
        self.action_dim = int(action_space.n) if isinstance(action_space, spaces.Discrete) else spaces.flatdim(action_space)
        self.state_dim = state_dim
        self.training = False
        self.reward_support = CategoricalSupport(SupportSpec(299.0, 51, "h"))

    def eval(self) -> EagerModel:
        self.training = False
        return self

    def state_dict(self) -> dict[str, th.Tensor]:
        return {}  # it learns nothing


class TableModel(EagerModel):
    """
    The tables of a :class:`oracles.Problem` as a model. An observation is the index of a root; a state is that and the
    state of the root's model. Box actions select action codes.

    :param params: output of the policy head everywhere, if actions are continuous
    """

    def __init__(self, problem: Problem, params: th.Tensor | None = None):
        actions = problem.num_root_actions
        super().__init__(spaces.Discrete(actions) if params is None else spaces.Box(-1, 1, (len(params) // 2,)), 2)
        self.problem = problem
        self.params = params
        self.rows_seen: list[int] = []

    def codes(self, actions: th.Tensor) -> np.ndarray:
        """Action codes of [..., A] actions: cells of the first dimension."""
        count = self.problem.reward.shape[2]
        return ((actions[..., 0].numpy() + 1) / 2 * count).astype(np.int64).clip(0, count - 1)

    def initial_inference(self, obs: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        root = obs[:, 0].long().numpy()
        state = th.stack([obs[:, 0], th.zeros(len(obs))], dim=1)
        logits = self.problem.root_logits[root] if self.params is None else self.params.expand(len(obs), -1)
        return state, th.from_numpy(self.problem.root_value[root]), th.as_tensor(logits)

    def recurrent_inference(self, state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        problem, (root, before) = self.problem, state.long().T.numpy()
        self.rows_seen.append(len(root))
        code = action.numpy() if self.params is None else self.codes(action)
        after = problem.next_state[root, before, code]
        logits = problem.logits[root, after] if self.params is None else self.params.expand(len(root), -1)
        new_state = th.from_numpy(np.stack([root, after], axis=1)).float()
        reward, value = problem.reward[root, before, code], problem.value[root, after]
        return new_state, th.from_numpy(reward), th.from_numpy(value), th.as_tensor(logits)


class ConstantPolicyModel(EagerModel):
    """
    Box actions whose reward is a function of the observation and the action. Nothing is worth anything later.

    :param params: [2A], output of the policy head everywhere
    :param reward: from states [B, 1 + A] and actions [B, A] to [B]; a state is the observation, then the last action
    """

    def __init__(self, params: th.Tensor, reward: Callable[[th.Tensor, th.Tensor], th.Tensor] | None = None):
        dims = len(params) // 2
        super().__init__(spaces.Box(-1, 1, (dims,)), 1 + dims)
        self.params = params
        self.reward = reward

    def initial_inference(self, obs: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        state = th.cat([obs[:, :1], th.full((len(obs), self.action_dim), 9.0)], dim=1)
        return state, th.zeros(len(obs)), self.params.expand(len(obs), -1)

    def recurrent_inference(self, state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        reward = th.zeros(len(state)) if self.reward is None else self.reward(state, action)
        return th.cat([state[:, :1], action], 1), reward, th.zeros(len(state)), self.params.expand(len(state), -1)


def make_network(action_space: spaces.Space, seed: int = 0) -> Ezv2Network:
    """A small network whose outputs differ clearly between states and actions."""
    space = spaces.Box(-np.inf, np.inf, (OBS_DIM,))
    th.manual_seed(seed)
    network = Ezv2Network(
        space,
        action_space,
        FlattenExtractor(space),
        net_arch=[16],
        state_dim=8,
        n_blocks=1,
        action_embedding_dim=4,
        projection_dim=8,
        value_support=SupportSpec(299.0, 21, "h"),
        reward_support=SupportSpec(299.0, 21, "h"),
    )
    with th.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.4 * th.randn(parameter.shape))
        # last layers start at zero; narrower policies leave room between the clipped actions
        for head, scale in ((network.value_head, 0.2), (network.reward_head, 0.2), (network.policy_head, 0.2)):
            nn.init.normal_(last_layer(head).weight, std=scale)
    return network.eval()


def last_layer(module: nn.Module) -> nn.Linear:
    return [part for part in module.modules() if isinstance(part, nn.Linear)][-1]


def observations(count: int, seed: int = 0) -> th.Tensor:
    return th.randn(count, OBS_DIM, generator=th.Generator().manual_seed(seed))


def assert_same(found: SearchResult, expected: SearchResult, tolerance: float = 1e-4) -> None:
    th.testing.assert_close(found.action, expected.action)
    for name in ("policy", "value", "candidates", "network_value", "depth"):
        x, y = getattr(found, name), getattr(expected, name)
        if x is None or y is None:
            assert x is None and y is None
            continue
        th.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=name)


def take(result: SearchResult, rows: Any) -> SearchResult:
    return SearchResult(*(None if x is None else x[rows] for x in result))  # type: ignore[arg-type]


def identical(x: SearchResult, y: SearchResult) -> bool:
    return all(a is b is None or (a is not None and b is not None and th.equal(a, b)) for a, b in zip(x, y))


DISCRETE = spaces.Discrete(5)
BOX = spaces.Box(-1.0, 1.0, (2,))
SETTINGS = SearchSettings(n_simulations=20, n_sampled_actions=8, n_inner_actions=3, gamma=0.9)
NOISY_SETTINGS = SearchSettings(n_simulations=2, n_sampled_actions=2)
"""So few of the discrete actions are considered that the noise shows in every result."""


def kinds(test: Callable[..., None]) -> Callable[..., None]:
    """Both kinds of actions, with the model in C++ and with the one that serves large batches."""
    test = pytest.mark.parametrize("engine", ["native", "traced"], indirect=True)(test)
    return pytest.mark.usefixtures("engine")(pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["discrete", "box"])(test))


@pytest.fixture
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "traced":
        monkeypatch.setattr(sb3_ezv2.search, "NATIVE_MAX_ROOTS", 0)


# --------------------------------------------------------------------------------------------------------------------
# Against the plain search
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exploring", [True, False])
@pytest.mark.parametrize(("actions", "considered", "simulations"), [(4, 4, 16), (9, 5, 24), (3, 16, 7)])
def test_discrete_search_of_tables(actions: int, considered: int, simulations: int, exploring: bool) -> None:
    """The noise is at the root and only when exploring; at most as many actions as there are enter the halving."""
    problem = random_problem(np.random.default_rng(actions), 40, simulations, actions)
    settings = SearchSettings(n_simulations=simulations, n_sampled_actions=considered, gamma=0.95)
    search = GumbelSearch(TableModel(problem), settings)
    rng = RecordingGenerator(1)
    result = search.run(th.arange(40.0).unsqueeze(1), rng if exploring else None)
    gumbel = rng.noise(40, actions).astype(np.float32) if exploring else np.zeros((40, actions), np.float32)
    problem = dataclasses.replace(problem, gumbel=gumbel)
    assert_plain(result, problem, Settings(min(considered, actions), 0.95))
    assert result.candidates is None and th.equal(result.best(), result.action)


@pytest.mark.parametrize(("candidates", "inner", "simulations"), [(16, 2, 32), (5, 3, 12), (1, 1, 4), (8, 1, 3)])
def test_sampled_search_of_tables(candidates: int, inner: int, simulations: int) -> None:
    """Every edge of the tree leads to the action of that node's candidate, in the model's own table."""
    roots = 30
    params = th.tensor([0.2, -1.5, -1.0, 0.0])  # 2 dimensions, the first selects the table's columns
    problem = random_problem(np.random.default_rng(simulations), roots, simulations, candidates, inner)
    model = TableModel(problem, params)
    settings = SearchSettings(simulations, candidates, inner, gamma=0.95)
    rng = RecordingGenerator(2)
    result = GumbelSearch(model, settings).run(th.arange(float(roots)).unsqueeze(1), rng)
    assert result.candidates is not None and result.candidates.shape == (roots, candidates, 2)
    inner_actions = SquashedGaussian(params).sample(th.from_numpy(rng.inner_noise(settings, roots, 2)))
    problem = dataclasses.replace(problem, root_codes=model.codes(result.candidates), inner_codes=model.codes(inner_actions))
    assert_plain(result, problem, Settings(candidates, 0.95))
    assert model.rows_seen == [roots] * simulations


def assert_plain(result: SearchResult, problem: Problem, settings: Settings) -> None:
    expected = plain_search(problem, settings)
    clear = expected.margin > 1e-5  # elsewhere rounding decides
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(result.action.numpy()[clear], expected.best_action[clear])
    np.testing.assert_allclose(result.policy.numpy()[clear], expected.policy[clear], atol=2e-4)
    unit = np.abs(problem.value).max(1)[clear]
    np.testing.assert_allclose(result.value.numpy()[clear] / unit, expected.root_value[clear] / unit, atol=1e-4)
    np.testing.assert_allclose(result.depth.numpy()[clear], expected.depth[clear], rtol=1e-5)
    np.testing.assert_array_equal(result.network_value.numpy(), problem.root_value)


class LazyTable:
    """An array whose entries are worked out when they are read."""

    def __init__(self, entry: Callable[[Any], Any]):
        self.entry = entry

    def __getitem__(self, key: Any) -> Any:
        return self.entry(key)


class NetworkSearch(PlainSearch):
    """
    The plain search of one root with a network, evaluated row by row. A state's number is its place in ``self.states``; the
    code of an action is the action itself.

    :param root_actions: one for each root candidate
    :param noise: [S, M, A], of the inner nodes; None for discrete actions
    """

    def __init__(
        self,
        network: Ezv2Network,
        observation: th.Tensor,
        settings: SearchSettings,
        gumbel: np.ndarray,
        root_actions: list[Any],
        noise: np.ndarray | None,
    ):
        self.network = network
        self.noise = noise
        considered = min(len(root_actions), settings.n_sampled_actions)
        self.settings = Settings(considered, settings.gamma, settings.c_visit, settings.c_scale)
        self.num_simulations = settings.n_simulations
        state, value, policy = network.initial_inference(observation.unsqueeze(0))
        self.states: list[tuple[th.Tensor, float, float, th.Tensor]] = [(state, 0.0, value.item(), policy)]
        self.gumbel = gumbel.tolist()
        logits = policy[0].tolist() if network.discrete else [0.0] * len(root_actions)
        self.root = Node(0, 0, 0.0, value.item(), logits, root_actions)
        self.next_state = LazyTable(lambda key: self.step(*key))  # type: ignore[assignment]
        self.reward = LazyTable(lambda key: self.states[-1][1])  # type: ignore[assignment]
        self.model_value = LazyTable(lambda state: self.states[state][2])  # type: ignore[assignment]
        self.model_logits = LazyTable(self.prior)  # type: ignore[assignment]
        self.inner_codes = LazyTable(self.candidates)  # type: ignore[assignment]
        self.seen_q: list[float] = []
        self.parents: list[int] = []
        self.actions: list[int] = []
        self.depths: list[int] = []
        self.margin = math.inf

    def step(self, state: int, action: Any) -> int:
        row = th.as_tensor(action).unsqueeze(0)
        after, reward, value, policy = self.network.recurrent_inference(self.states[state][0], row)
        self.states.append((after, reward.item(), value.item(), policy))
        return len(self.states) - 1

    def prior(self, state: int) -> np.ndarray:
        policy = self.states[state][3][0].numpy()
        return policy if self.noise is None else np.zeros(self.noise.shape[1])

    def candidates(self, simulation: int) -> Any:
        if self.noise is None:
            return np.arange(self.network.action_dim)
        actions = SquashedGaussian(self.states[-1][3]).sample(th.from_numpy(self.noise[simulation]))
        return Rows(list(actions))


class Rows(list[Any]):
    """As :class:`PlainSearch` reads codes."""

    def tolist(self) -> list[Any]:
        return list(self)


@kinds
def test_search_with_a_network(space: spaces.Space) -> None:
    roots = 24
    network = make_network(space)
    obs = observations(roots)
    rng = RecordingGenerator(3)
    result = GumbelSearch(network, SETTINGS).run(obs, rng)
    width = 5 if network.discrete else SETTINGS.n_sampled_actions
    gumbel, inner_noise = np.zeros((roots, width)), None
    if network.discrete:
        gumbel = rng.noise(roots, 5)
    else:
        inner_noise = rng.inner_noise(SETTINGS, roots, 2)
    clear, deepest = 0, 0
    for root in range(roots):
        candidates = list(range(5)) if result.candidates is None else list(result.candidates[root])
        noise = None if inner_noise is None else inner_noise[:, root]
        with th.no_grad():
            search = NetworkSearch(network, obs[root], SETTINGS, gumbel[root], candidates, noise)
            search.run()
        if search.margin < 1e-4:
            continue
        clear += 1
        deepest = max(deepest, *search.depths)
        visits = max(search.root.visits(action) for action in range(width))
        assert result.action[root] == search.choose_at_root(visits)
        np.testing.assert_allclose(result.policy[root], search.improved_policy(search.root), atol=1e-3)
        assert result.value[root].item() == pytest.approx(search.root.value(), rel=1e-3, abs=1e-3)
        assert result.depth[root].item() == pytest.approx(np.mean(search.depths), rel=1e-5)
        assert result.network_value[root].item() == pytest.approx(search.root.raw_value, rel=1e-4, abs=1e-5)
    assert clear >= 18 and deepest >= 3
    # The searches have something to decide
    assert len(set(result.action.tolist())) > 2 and result.value.std() > 0.1


def test_schedule_of_the_reference() -> None:
    """All K candidates of Box actions are considered, and all simulations are used."""
    assert len(sequential_halving(8, 20)) == 20
    model = ConstantPolicyModel(th.zeros(2))
    result = GumbelSearch(model, SearchSettings(8, 8, 2)).run(th.zeros(3, 1), np.random.default_rng(0))
    assert (result.depth == 1).all()  # 8 simulations, one of each candidate


# --------------------------------------------------------------------------------------------------------------------
# Known answers
# --------------------------------------------------------------------------------------------------------------------


def test_the_best_candidate_is_found() -> None:
    """Each root has a best action of its own; its nearest candidate wins, and ``best`` returns that."""
    goals = th.linspace(-0.9, 0.9, 20).unsqueeze(1)

    def reward(state: th.Tensor, action: th.Tensor) -> th.Tensor:
        first_step = state[:, 1] == 9
        return th.where(first_step, -((action - state[:, :1]) ** 2).sum(1), 0.0)

    model = ConstantPolicyModel(th.tensor([0.0, 0.0, -1.0, -1.0]), reward)
    for rng in (np.random.default_rng(0), None):
        result = GumbelSearch(model, SearchSettings(n_simulations=64)).run(goals, rng)
        assert result.candidates is not None
        distance = (result.candidates - goals.unsqueeze(1)).square().sum(-1)
        th.testing.assert_close(result.action, distance.argmin(1))
        th.testing.assert_close(result.best(), result.candidates[th.arange(20), distance.argmin(1)])
        # the improved policy prefers it, and the search-based value is below its q
        th.testing.assert_close(result.policy.argmax(1), distance.argmin(1))
        assert (result.value < -distance.amin(1) + 1e-6).all()


@kinds
def test_improved_value_is_the_mean_of_q_under_the_improved_policy(space: spaces.Space) -> None:
    network, obs = make_network(space), observations(6)
    settings = SearchSettings(16, 5, 2)
    mean = GumbelSearch(network, settings).run(obs, np.random.default_rng(0))
    search = GumbelSearch(network, settings._replace(improved_value=True))
    improved = search.run(obs, np.random.default_rng(0))
    # the same search, and another value of it
    assert identical(mean._replace(value=improved.value), improved)
    assert not th.allclose(mean.value, improved.value, atol=1e-4)
    nodes, _ = search.last_tree()
    for root in range(6):
        children = np.flatnonzero(nodes["parent"][root] == 0)
        assert len(children) == 5  # all were visited, so that there is nothing to complete
        policy = improved.policy[root].numpy()[nodes["action"][root, children]]
        assert improved.value[root].item() == pytest.approx((policy * nodes["q"][root, children]).sum(), rel=1e-4, abs=1e-5)


def test_improved_value_by_hand() -> None:
    """Two candidates whose q are 1 and 0, with 16 of 32 simulations each; the improved policy takes the better one."""
    between = 0.0
    model = ConstantPolicyModel(th.zeros(2), lambda state, action: (action[:, 0] > between).float())
    settings = SearchSettings(32, 2, 1, gamma=0.0, c_scale=1.0)
    candidates = GumbelSearch(model, settings).run(th.zeros(1, 1), np.random.default_rng(0)).candidates
    assert candidates is not None
    between = candidates.mean().item()
    for improved, expected in ((False, 16 / 33), (True, 1.0)):
        search = GumbelSearch(model, settings._replace(improved_value=improved))
        assert search.run(th.zeros(1, 1), np.random.default_rng(0)).value.item() == pytest.approx(expected, abs=1e-6)


def test_search_based_value_by_hand() -> None:
    """Two simulations of one candidate: (v0 + (r + g v1) + (r + g (r + g v1))) / 3, see Eq. 10 and 11."""
    model = ConstantPolicyModel(th.zeros(2), lambda state, action: th.full((len(state),), 2.0))
    result = GumbelSearch(model, SearchSettings(2, 1, 1, gamma=0.5)).run(th.zeros(1, 1), None)
    assert result.value.item() == pytest.approx((0 + 2 + 3) / 3) and result.depth.item() == 1.5
    assert result.policy.tolist() == [[1.0]] and result.network_value.item() == 0


# --------------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------------


@kinds
def test_without_noise_a_search_depends_on_observation_and_weights_alone(space: spaces.Space) -> None:
    network = make_network(space)
    obs = observations(17)
    search = GumbelSearch(network, SETTINGS)
    together = search.run(obs, None)
    # another batch with the same storage, other storage, and again
    for row in range(0, 17, 4):
        assert_same(search.run(obs[row : row + 1], None), take(together, slice(row, row + 1)))
    assert_same(GumbelSearch(network, SETTINGS).run(obs.flip(0), None), take(together, th.arange(17).flip(0)))
    # storage and step were made for a single root first
    small = GumbelSearch(network, SETTINGS)
    assert_same(small.run(obs[:1], None), take(together, slice(0, 1)))
    assert_same(small.run(obs, None), together)
    search.run(obs, np.random.default_rng(0))
    np.random.seed(1)
    th.manual_seed(2)
    assert identical(search.run(obs, None), together)
    # a larger batch than any before
    assert_same(take(search.run(th.cat([observations(40, seed=1), obs]), None), slice(40, None)), together)


@kinds
def test_large_batches_are_searched_in_pieces(space: spaces.Space) -> None:
    network = make_network(space)
    obs = observations(23)
    whole = GumbelSearch(network, SETTINGS)
    for max_roots in (1, 7, 23, 24):
        search = GumbelSearch(network, SETTINGS, max_roots=max_roots)
        assert_same(search.run(obs, None), whole.run(obs, None))
        result = search.run(obs, np.random.default_rng(0))
        assert len(result.action) == 23 and len(result.best()) == 23
    # the pieces' noise goes on where it was
    pieces = GumbelSearch(network, NOISY_SETTINGS, max_roots=8).run(obs[:1].expand(16, -1), np.random.default_rng(0))
    assert not th.allclose(pieces.policy[:8], pieces.policy[8:])


@kinds
def test_noise_is_that_of_the_generator(space: spaces.Space) -> None:
    network = make_network(space)
    obs = observations(1).expand(12, -1)
    search = GumbelSearch(network, NOISY_SETTINGS)
    first, again, other = (search.run(obs, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert identical(first, again) and not identical(first, other)
    # each root has its own
    assert len(set(first.value.tolist())) >= (3 if network.discrete else 12)
    numpy_state, torch_state = np.random.get_state(legacy=False), th.get_rng_state()
    assert isinstance(numpy_state, dict)
    search.run(obs, np.random.default_rng(0))
    after = np.random.get_state(legacy=False)
    assert isinstance(after, dict) and after["state"]["pos"] == numpy_state["state"]["pos"]
    assert th.equal(th.get_rng_state(), torch_state)


# --------------------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------------------


@kinds
def test_weights_changed_in_place_are_seen(space: spaces.Space) -> None:
    """By the copy of a state, by an optimizer, and by a new scale of the rewards."""
    network, other = make_network(space), make_network(space, seed=1)
    obs = observations(9)
    search = GumbelSearch(network, SETTINGS)
    before = search.run(obs, None)

    network.load_state_dict(other.state_dict())
    after = search.run(obs, None)
    assert not th.allclose(before.value, after.value)
    assert identical(after, GumbelSearch(other, SETTINGS).run(obs, None))

    optimizer = th.optim.SGD(network.parameters(), lr=0.05)
    for parameter in network.parameters():
        parameter.grad = th.randn(parameter.shape, generator=th.Generator().manual_seed(0))
    optimizer.step()
    stepped = search.run(obs, None)
    assert not th.allclose(after.value, stepped.value)
    assert_same(stepped, GumbelSearch(copy.deepcopy(network), SETTINGS).run(obs, None))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@kinds
def test_the_unit_of_the_rewards_does_not_matter(space: spaces.Space, scale: float) -> None:
    """The least range of the q's is in units of the scale; weak outputs show that."""
    network = make_network(space)
    with th.no_grad():
        for head in (network.value_head, network.reward_head):
            last_layer(head).weight.mul_(1e-4)
            last_layer(head).bias.zero_()
    obs = observations(9)
    search = GumbelSearch(network, SETTINGS)
    before = search.run(obs, None)
    assert 0 < before.network_value.abs().max() < 0.01
    network.set_reward_scale(scale)
    after = search.run(obs, None)
    th.testing.assert_close(after.action, before.action)
    th.testing.assert_close(after.policy, before.policy, rtol=1e-3, atol=1e-4)
    th.testing.assert_close(after.value, scale * before.value, rtol=1e-3, atol=1e-6 * scale)


@kinds
def test_a_model_in_training_mode_is_evaluated(space: spaces.Space) -> None:
    network = make_network(space)
    obs = observations(9)
    expected = GumbelSearch(network, SETTINGS).run(obs, None)
    network.train()
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert identical(GumbelSearch(network, SETTINGS).run(obs, None), expected)
    assert all(th.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    assert not any(x.requires_grad for x in expected if x is not None)


@kinds
def test_copies_search_alike(space: spaces.Space) -> None:
    search = GumbelSearch(make_network(space), SETTINGS, max_roots=6)
    obs = observations(9)
    expected = search.run(obs, None)
    for other in (copy.deepcopy(search), pickle.loads(pickle.dumps(search))):
        assert other.model is not search.model and other.max_roots == 6
        assert identical(other.run(obs, None), expected)
    assert identical(search.run(obs, None), expected)
    assert len(pickle.dumps(search)) < 2 * len(pickle.dumps(GumbelSearch(search.model, SETTINGS)))


@kinds
def test_an_untrained_model_prefers_nothing(space: spaces.Space) -> None:
    network = make_network(space)
    for head in (network.value_head, network.reward_head, network.policy_head):
        nn.init.zeros_(last_layer(head).weight)
        nn.init.zeros_(last_layer(head).bias)
    for rng in (None, np.random.default_rng(0)):
        result = GumbelSearch(network, SETTINGS).run(observations(50), rng)
        th.testing.assert_close(result.policy, th.full_like(result.policy, 1 / result.policy.shape[1]))
        assert (result.value == 0).all() and (result.network_value == 0).all()
        if rng is None:
            assert (result.action == 0).all()  # ties go to the lowest index: the policy's mode in Box
    if network.discrete:
        assert len(set(result.action.tolist())) == 5


@pytest.mark.parametrize("where", ["observation", "model"])
@kinds
def test_nan_is_said(space: spaces.Space, where: str) -> None:
    network = make_network(space)
    obs = observations(4)
    if where == "observation":
        obs[2] = float("nan")
    else:
        nn.init.constant_(last_layer(network.dynamics.joint).bias, float("nan"))
    search = GumbelSearch(network, SETTINGS)
    with pytest.raises(ValueError, match=r"^the model's outputs .* NaN or infinite"):
        search.run(obs, None)
    # and leaves nothing behind
    nn.init.zeros_(last_layer(network.dynamics.joint).bias)
    assert search.run(observations(4), None).value.isfinite().all()


# --------------------------------------------------------------------------------------------------------------------
# Candidates of Box actions
# --------------------------------------------------------------------------------------------------------------------


def sample_candidates(params: th.Tensor, roots: int, **settings: Any) -> th.Tensor:
    """Root candidates [B, K, A] of a search with noise."""
    search = GumbelSearch(ConstantPolicyModel(params), SearchSettings(n_simulations=1, **settings))
    candidates = search.run(th.zeros(roots, 1), np.random.default_rng(0)).candidates
    assert candidates is not None
    return candidates


@pytest.mark.parametrize(
    ("count", "fraction", "flat_scale", "from_policy"),
    [(16, 0.25, 3.0, 4), (8, 0.25, 3.0, 2), (16, 0.5, 2.0, 8), (16, 1.0, 3.0, 16), (5, 0.5, 4.0, None), (1, 0.25, 3.0, 1)],
)
def test_candidates_are_from_the_policy_and_from_a_flattened_one(
    count: int, fraction: float, flat_scale: float, from_policy: int | None
) -> None:
    params = th.tensor([0.3, -0.2, -20.0, -20.0])  # standard deviations 0.1: nothing is clipped
    settings = dict(n_sampled_actions=count, policy_action_fraction=fraction, flat_std_scale=flat_scale)
    actions = sample_candidates(params, 4000, **settings)
    assert actions.shape == (4000, count, 2)
    normal = (th.atanh(actions) - SquashedGaussian(params).mean) / 0.1
    std = normal.std(dim=0)  # [K, A], standard error about 1%
    narrow, wide = (std - 1).abs() < 0.06, (std - flat_scale).abs() < 0.06 * flat_scale
    assert (narrow ^ wide).all() and (narrow[:, 0] == narrow[:, 1]).all()
    if from_policy is None:
        assert narrow[:, 0].sum().item() in (2, 3)  # half of five
    else:
        assert narrow[:, 0].sum() == from_policy
    assert normal.mean(0).abs().max() < 0.07 * flat_scale
    # candidates, dimensions and roots are independent of each other
    flat = (normal / std).flatten(1)
    correlation = (flat.T @ flat / len(flat) - th.eye(flat.shape[1])).abs().max()
    neighbours = (flat[1:] * flat[:-1]).mean(0).abs().max()
    assert correlation < 0.12 and neighbours < 0.08


def test_candidates_are_clipped() -> None:
    actions = sample_candidates(th.tensor([10.0, -10.0, 3.0, 3.0]), 200)
    assert actions.abs().max() == pytest.approx(0.999) and (actions.abs() == actions.abs().max()).float().mean() > 0.3


@pytest.mark.parametrize("count", [1, 4, 16])
def test_without_noise_candidates_are_of_the_policy_with_its_mode(count: int) -> None:
    params = th.tensor([0.3, -0.2, -20.0, 1.0])
    search = GumbelSearch(ConstantPolicyModel(params), SearchSettings(n_sampled_actions=count))
    candidates = search.run(th.zeros(3, 1), None).candidates
    assert candidates is not None
    assert (candidates == candidates[:1]).all()
    distribution = SquashedGaussian(params)
    th.testing.assert_close(candidates[0, 0], th.tanh(distribution.mean))
    if count == 16:
        normal = (th.atanh(candidates[0, 1:]) - distribution.mean) / distribution.std
        # flat ones would make this about 2.6
        assert 0.6 < normal.square().mean().sqrt() < 1.4
        assert len(candidates[0].unique(dim=0)) == 16


def test_inner_candidates_are_of_the_policy() -> None:
    """Without the flattened share, from the policy at the inner node."""
    seen: list[th.Tensor] = []

    def reward(state: th.Tensor, action: th.Tensor) -> th.Tensor:
        seen.append(action[state[:, 1] != 9])
        return th.zeros(len(state))

    params = th.tensor([0.3, -20.0])
    model = ConstantPolicyModel(params, reward)
    GumbelSearch(model, SearchSettings(24, 4, 2)).run(th.zeros(300, 1), np.random.default_rng(0))
    normal = (th.atanh(th.cat(seen)) - SquashedGaussian(params).mean[0]) / 0.1
    assert len(normal) > 1000
    assert normal.std().item() == pytest.approx(1.0, abs=0.06) and normal.mean().abs() < 0.06
