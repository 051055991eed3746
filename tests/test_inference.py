"""
How a search evaluates its model: the C++ model and the traced one against the network itself, and that both always have the
weights of now.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch as th
from common import TINY
from gymnasium import spaces
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn

import sb3_ezv2.search
from sb3_ezv2 import EZV2
from sb3_ezv2.ctree import Mlp, Tree, sample_actions
from sb3_ezv2.distributions import MAX_ACTION, SquashedGaussian, SupportSpec
from sb3_ezv2.inference import NativeModel, TracedModel, _array, _searched_parts, _tensors, bfloat16_is_fast, export_weights
from sb3_ezv2.networks import Ezv2Network
from sb3_ezv2.search import GumbelSearch, SearchResult, SearchSettings

DISCRETE, BOX = spaces.Discrete(5), spaces.Box(-1.0, 1.0, (3,))
SETTINGS = SearchSettings(n_simulations=12, n_sampled_actions=6, n_inner_actions=3, gamma=0.9)
KINDS = pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["discrete", "box"])


def make_network(
    action_space: spaces.Space = BOX,
    seed: int = 0,
    features: int = 4,
    state_dim: int = 24,
    net_arch: tuple[int, ...] = (40,),
    n_blocks: int = 2,
    embedding: int = 12,
    supports: tuple[SupportSpec, SupportSpec] = (SupportSpec(299.0, 21, "h"), SupportSpec(100.0, 33, "symexp")),
) -> Ezv2Network:
    """A network with weights and statistics as after some training."""
    space = spaces.Box(-np.inf, np.inf, (features,))
    th.manual_seed(seed)
    network = Ezv2Network(
        space, action_space, FlattenExtractor(space), net_arch, state_dim, n_blocks, embedding, 8, supports[0], supports[1]
    )
    with th.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * th.randn(parameter.shape))
        network.normalizer.update(3 * th.randn(50, features) + 1)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2.0)
    network.set_reward_scale(2.5)
    return network.eval().requires_grad_(True)


def native(network: Ezv2Network, level: int = 2) -> Mlp:
    weights = export_weights(network)
    assert weights is not None
    return Mlp(weights, network.discrete, [_array(x) for x in _tensors(_searched_parts(network))], level)


def step_native(mlp: Mlp, state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, ...]:
    """
    One step from each of B roots: a search of one simulation, of which all candidates are the action.

    :return: new states; rewards plus values are all that the tree tells of the others
    """
    rows, width = len(state), mlp.action_dim
    actions = width if mlp.discrete else 1
    tree = Tree(rows, 1, actions, width if mlp.discrete else 1, num_considered=1, discount=1.0)
    noise = np.zeros((rows, actions), np.float32)
    if mlp.discrete:
        noise[np.arange(rows), action] = 1e6  # so that this action is taken
    tree.reset(np.zeros(rows, np.float32), np.zeros((rows, actions), np.float32), noise)
    tree.select()
    states = np.zeros((2 * rows, mlp.state_dim), np.float32)
    states[:rows] = state
    if mlp.discrete:
        mlp.search(tree, states, None, None, MAX_ACTION)
    else:
        pool = np.zeros((2 * rows, width), np.float32)
        pool[:rows] = action
        mlp.search(tree, states, pool, np.zeros((1, 1, 1, width), np.float32), MAX_ACTION)
        return th.from_numpy(states[rows:]), th.from_numpy(tree.q_values()[:, 0]), th.from_numpy(pool[rows:])
    return th.from_numpy(states[rows:]), th.from_numpy(tree.q_values()[np.arange(rows), action])


def random_actions(network: Ezv2Network, count: int) -> th.Tensor:
    generator = th.Generator().manual_seed(1)
    if network.discrete:
        return th.randint(network.action_dim, (count,), generator=generator)
    return 2 * th.rand(count, network.action_dim, generator=generator) - 1


# --------------------------------------------------------------------------------------------------------------------
# The C++ model is the network
# --------------------------------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_native_model_of_any_size_is_the_network(data: Any) -> None:
    supports = [
        SupportSpec(data.draw(st.sampled_from([2.0, 299.0])), 2 * data.draw(st.integers(1, 40)) + 1, transform)
        for transform in data.draw(st.sampled_from([("h", "h"), ("symexp", "symexp"), ("h", "symexp")]))
    ]
    discrete = data.draw(st.booleans())
    width = data.draw(st.integers(1, 9))
    network = make_network(
        spaces.Discrete(width) if discrete else spaces.Box(-1.0, 1.0, (width,)),
        seed=data.draw(st.integers(0, 1000)),
        features=data.draw(st.integers(1, 150)),
        state_dim=data.draw(st.integers(1, 140)),
        net_arch=tuple(data.draw(st.lists(st.integers(1, 140), min_size=1, max_size=3))),
        n_blocks=data.draw(st.integers(1, 3)),
        embedding=data.draw(st.integers(1, 70)),
        supports=(supports[0], supports[1]),
    )
    rows = data.draw(st.integers(1, 9))
    obs = 3 * th.randn(rows, network.normalizer.mean.shape[0], generator=th.Generator().manual_seed(0))
    mlp = native(network, level=data.draw(st.sampled_from([0, 1, 2])))
    with th.no_grad():
        state, value, policy = network.initial_inference(obs)
        after, reward, next_value, next_policy = network.recurrent_inference(state, random_actions(network, rows))
    found = [th.from_numpy(x) for x in mlp.initial(network.features(obs).numpy())]
    for x, y in zip(found, (state, value, policy)):
        th.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    found = list(step_native(mlp, state, random_actions(network, rows)))
    th.testing.assert_close(found[0], after, rtol=1e-4, atol=1e-4)
    th.testing.assert_close(found[1], reward + next_value, rtol=1e-4, atol=1e-3)
    if not discrete:
        th.testing.assert_close(found[2], SquashedGaussian(next_policy).sample(th.zeros(width)), rtol=1e-4, atol=1e-4)


@KINDS
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_row_does_not_see_the_others_of_its_batch(space: spaces.Space, level: int) -> None:
    network = make_network(space)
    mlp = native(network, level)
    features = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
    together = mlp.initial(features)
    state = th.from_numpy(together[0])
    action = random_actions(network, 11)
    after = step_native(mlp, state, action)
    for row in range(11):
        for x, y in zip(mlp.initial(features[row : row + 1]), together):
            np.testing.assert_array_equal(x[0], y[row])
        for z, w in zip(step_native(mlp, state[row : row + 1], action[row : row + 1]), after):
            assert th.equal(z[0], w[row])


def test_an_untrained_model_is_worth_exactly_nothing() -> None:
    network = make_network()
    for head in (network.value_head, network.reward_head, network.policy_head):
        last = head.mlp[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    state, value, policy = native(network).initial(np.ones((3, 4), np.float32))
    assert (value == 0).all() and (policy == 0).all()
    assert (step_native(native(network), th.from_numpy(state), random_actions(network, 3))[1] == 0).all()


@pytest.mark.parametrize("shared", [False, True])
def test_sampled_actions_are_those_of_the_squashed_gaussian(shared: bool) -> None:
    rng = np.random.default_rng(0)
    params = (rng.normal(size=(500, 14)) * rng.choice([0.01, 1.0, 30.0], size=(500, 1))).astype(np.float32)
    noise = rng.normal(size=(1 if shared else 500, 3, 7)).astype(np.float32)
    out = np.zeros((1500, 7), np.float32)
    sample_actions(params, noise, MAX_ACTION, out)
    expected = SquashedGaussian(th.from_numpy(params).unsqueeze(1)).sample(th.from_numpy(noise))
    np.testing.assert_allclose(out, expected.flatten(0, 1).numpy(), atol=2e-6)
    params[3, 2] = np.nan  # is not hidden
    sample_actions(params, noise, MAX_ACTION, out)
    assert np.isnan(out.reshape(500, 3, 7)[3, :, 2]).all() and np.isfinite(np.delete(out.reshape(500, -1), 3, axis=0)).all()


# --------------------------------------------------------------------------------------------------------------------
# Which models it serves
# --------------------------------------------------------------------------------------------------------------------


class OtherNetwork(Ezv2Network):
    """A subclass may do anything."""

    def dynamics_step(self, state: th.Tensor, action: th.Tensor) -> th.Tensor:
        return super().dynamics_step(state, action) + 1


class Features(BaseFeaturesExtractor):
    """A features extractor with weights of its own."""

    def __init__(self, observation_space: spaces.Space):
        super().__init__(observation_space, 6)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.net(observations)


def run(network: Any, count: int = 5, seed: int = 0) -> SearchResult:
    obs = th.randn(count, 4, generator=th.Generator().manual_seed(seed))
    return GumbelSearch(network, SETTINGS).run(obs, None)


def both(network: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[SearchResult, SearchResult]:
    """:return: with the C++ model where that is possible, and without"""
    found = run(network)
    with monkeypatch.context() as patch:
        patch.setattr(sb3_ezv2.search, "NATIVE_MAX_ROOTS", 0)
        return found, run(network)


def test_only_what_networks_builds_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear_without_bias(network: Ezv2Network) -> None:
        network.dynamics.joint[1] = nn.Linear(36, 40, bias=False)

    def other_activation(network: Ezv2Network) -> None:
        network.value_head.mlp[2] = nn.GELU()  # type: ignore[assignment]

    def another_layer(network: Ezv2Network) -> None:
        network.representation.append(nn.ReLU())

    def other_epsilon(network: Any) -> None:
        network.dynamics.tower[0].branch[0] = nn.LayerNorm(24, eps=1e-2)

    def hook(network: Ezv2Network) -> None:
        network.value_head.register_forward_hook(lambda module, inputs, output: 2 * output)

    changes: list[Callable[[Ezv2Network], Any]] = [
        linear_without_bias,
        other_activation,
        another_layer,
        other_epsilon,
        hook,
        lambda network: nn.utils.parametrizations.weight_norm(network.dynamics.joint[1]),
    ]
    assert NativeModel(make_network()).get() is not None
    for change in changes:
        network = make_network()
        model = NativeModel(network)
        assert model.get() is not None
        change(network)
        network.eval()
        fresh = NativeModel(network)
        assert fresh.get() is None and fresh.get() is None
        found, expected = both(network, monkeypatch)
        th.testing.assert_close(found.value, expected.value)
    space = spaces.Box(-np.inf, np.inf, (4,))
    other = OtherNetwork(
        space, BOX, FlattenExtractor(space), [8], 8, 1, 4, 8, SupportSpec(9.0, 5, "h"), SupportSpec(9.0, 5, "h")
    )
    assert NativeModel(other.eval()).get() is None
    assert NativeModel(make_network().double()).get() is None  # type: ignore[arg-type]


def test_a_replaced_module_is_seen() -> None:
    network = make_network()
    model = NativeModel(network)
    assert model.get() is not None
    network.value_head.mlp[2] = nn.GELU()  # type: ignore[assignment]
    assert model.get() is None
    network.value_head = make_network(seed=1).value_head
    assert model.get() is not None
    network.double()
    assert model.get() is None


@KINDS
def test_custom_features_are_used(space: spaces.Space, monkeypatch: pytest.MonkeyPatch) -> None:
    box = spaces.Box(-np.inf, np.inf, (4,))
    th.manual_seed(0)
    support = SupportSpec(9.0, 5, "h")
    network = Ezv2Network(box, space, Features(box), [8], 8, 1, 4, 8, support, support).eval()
    assert NativeModel(network).get() is not None
    before, expected = both(network, monkeypatch)
    th.testing.assert_close(before.network_value, expected.network_value, rtol=1e-4, atol=1e-5)
    nn.init.normal_(network.value_head.mlp[-1].weight)  # type: ignore[arg-type]
    before = run(network)
    nn.init.normal_(network.features_extractor.net[0].weight)  # type: ignore[index, union-attr]
    assert not th.allclose(run(network).network_value, before.network_value)


# --------------------------------------------------------------------------------------------------------------------
# The weights of now
# --------------------------------------------------------------------------------------------------------------------


def by_data(network: Any) -> None:
    """Past autograd's version counters."""
    network.dynamics.joint[1].weight.data.mul_(1.5)


def by_fused_adam(network: Ezv2Network) -> None:
    """Which does not count versions either."""
    for parameter in network.parameters():
        parameter.grad = th.randn(parameter.shape, generator=th.Generator().manual_seed(0))
    th.optim.Adam(network.parameters(), lr=0.05, fused=True).step()
    network.zero_grad()


def by_assignment(network: Ezv2Network) -> None:
    network.load_state_dict(make_network(DISCRETE if network.discrete else BOX, seed=3).state_dict(), assign=True)


def by_replacing_a_parameter(network: Ezv2Network) -> None:
    layer = network.value_head.mlp[0]
    assert isinstance(layer, nn.Linear)
    layer.weight = nn.Parameter(-layer.weight.detach())


def by_statistics(network: Ezv2Network) -> None:
    """A forward pass in training mode moves those of the batch norm."""
    network.train()
    network.values(3 * th.randn(64, 4, generator=th.Generator().manual_seed(5)))
    network.eval()


def by_vector(network: Ezv2Network) -> None:
    vector = th.nn.utils.parameters_to_vector(network.parameters()).detach()
    th.nn.utils.vector_to_parameters(1.1 * vector, network.parameters())


def pretend_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches take their model for one on a GPU, whose host copy they may search."""
    on_host = GumbelSearch._on_host
    monkeypatch.setattr(GumbelSearch, "_on_host", lambda self, device: on_host(self, th.device("cuda")))


@KINDS
@pytest.mark.parametrize("engine", ["native", "traced", "host copy"])
@pytest.mark.parametrize(
    "change",
    [
        by_data,
        by_fused_adam,
        by_assignment,
        by_replacing_a_parameter,
        by_statistics,
        by_vector,
        lambda network: network.load_state_dict(make_network(DISCRETE if network.discrete else BOX, seed=3).state_dict()),
        lambda network: network.set_reward_scale(100.0),
        lambda network: network.normalizer.update(10 * th.ones(3, 4)),
        lambda network: setattr(network, "value_head", make_network(seed=1).value_head),
    ],
)
def test_every_change_of_the_weights_is_seen(
    space: spaces.Space, engine: str, change: Callable[[Ezv2Network], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "traced":
        monkeypatch.setattr(sb3_ezv2.search, "NATIVE_MAX_ROOTS", 0)
    if engine == "host copy":
        pretend_a_device(monkeypatch)
    network = make_network(space)
    obs = th.randn(5, 4, generator=th.Generator().manual_seed(0))
    search = GumbelSearch(network, SETTINGS)
    before = search.run(obs, None)
    assert th.equal(search.run(obs, None).value, before.value)
    change(network)
    found = search.run(obs, None)
    assert search._searched_on_host == (engine == "host copy")
    with monkeypatch.context() as patch:
        patch.setattr(GumbelSearch, "_on_host", lambda self, device: None)
        expected = GumbelSearch(copy.deepcopy(network), SETTINGS).run(obs, None)
    assert not th.allclose(found.value, before.value, rtol=1e-6, atol=1e-7)
    assert th.equal(found.value, expected.value) and th.equal(found.policy, expected.policy)


@KINDS
def test_few_roots_of_a_model_on_a_device_are_searched_on_the_host(
    space: spaces.Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network(space)
    obs = th.randn(sb3_ezv2.search.HOST_MAX_ROOTS + 1, 4, generator=th.Generator().manual_seed(0))
    plain, search = GumbelSearch(network, SETTINGS), GumbelSearch(network, SETTINGS)
    assert search._on_host(th.device("cpu")) is None
    pretend_a_device(monkeypatch)
    monkeypatch.setattr(plain, "_on_host", lambda device: None)
    for few in (True, False):
        expected, found = (x.run(obs[few:], np.random.default_rng(0)) for x in (plain, search))
        assert search._searched_on_host == few
        for name, x, y in zip(expected._fields, expected, found):
            assert (x is None and y is None) or th.equal(x, y), name  # type: ignore[arg-type]
        (nodes, actions), (its_nodes, its_actions) = plain.last_tree(), search.last_tree()
        assert all(np.array_equal(x, its_nodes[name]) for name, x in nodes.items())
        assert (actions is None and its_actions is None) or np.array_equal(actions, its_actions)  # type: ignore[arg-type]
    assert search._host_copy.get() is search._host_copy.get() is not network
    again = pickle.loads(pickle.dumps(search))
    assert th.equal(again.run(obs[1:], None).value, plain.run(obs[1:], None).value)


class Masked(FlattenExtractor):
    """Its buffer is of no floats."""

    def __init__(self, observation_space: spaces.Box):
        super().__init__(observation_space)
        self.register_buffer("keeps", th.ones(4, dtype=th.bool))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        assert isinstance(self.keeps, th.Tensor)
        return super().forward(observations) * self.keeps


def test_features_are_those_of_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network()
    extractor = network.features_extractor = Masked(spaces.Box(-np.inf, np.inf, (4,)))
    obs = th.randn(3, 4, generator=th.Generator().manual_seed(0))
    plain, search = GumbelSearch(network, SETTINGS), GumbelSearch(network, SETTINGS)
    monkeypatch.setattr(plain, "_on_host", lambda device: None)
    pretend_a_device(monkeypatch)
    before = search.run(obs, None).value
    extractor.keeps[1] = False  # type: ignore[operator]
    after = search.run(obs, None).value
    assert search._searched_on_host and not th.equal(before, after) and th.equal(after, plain.run(obs, None).value)


@pytest.mark.parametrize("interrupted", ["copy.deepcopy", "torch.Tensor.copy_"])
def test_an_interrupted_transfer_is_made_again(interrupted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network()
    obs = th.randn(3, 4, generator=th.Generator().manual_seed(0))
    search = GumbelSearch(network, SETTINGS)
    pretend_a_device(monkeypatch)
    if interrupted == "torch.Tensor.copy_":
        search.run(obs, None)
        by_vector(network)

    def interrupt(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(interrupted, interrupt)
        search.run(obs, None)
    found = search.run(obs, None).value
    assert search._searched_on_host and th.equal(found, GumbelSearch(network, SETTINGS).run(obs, None).value)


def test_other_models_stay_on_their_device() -> None:
    """Those of other layers or number types, with hooks, for MultiDiscrete actions, and subclasses."""

    class Subclass(Ezv2Network):
        pass

    hooked, other, subclass = make_network(), make_network(), make_network()
    hooked.value_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    other.value_head.mlp[2] = nn.GELU()  # type: ignore[assignment]
    subclass.__class__ = Subclass
    networks = [hooked, other, subclass, make_network().double(), make_network(spaces.MultiDiscrete([2, 3]))]
    for network in networks:
        search = GumbelSearch(network, SETTINGS)
        assert search._on_host(th.device("cuda")) is None and search._host_copy.get() is None
    assert GumbelSearch(make_network(), SETTINGS)._on_host(th.device("cuda")) is not None


def predictions(model: EZV2) -> np.ndarray:
    obs = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    return model.predict(obs, deterministic=True)[0]


def values(model: EZV2) -> th.Tensor:
    obs = th.from_numpy(np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32))
    return model.policy.search.run(obs, None).value


def test_an_agent_predicts_with_the_weights_of_now() -> None:
    model = EZV2("MlpPolicy", "Pendulum-v1", seed=0, **TINY)
    seen = [values(model)]
    predictions(model)
    model.learn(60)
    seen.append(values(model))
    other = EZV2("MlpPolicy", "Pendulum-v1", seed=1, **TINY).learn(50)
    model.set_parameters(other.get_parameters())
    seen.append(values(model))
    assert th.equal(seen[-1], values(other))
    np.testing.assert_array_equal(predictions(model), predictions(other))
    model.policy.to("cpu")
    assert th.equal(values(model), seen[-1])
    model.learn(10, reset_num_timesteps=False)
    seen.append(values(model))
    for one, two in itertools.pairwise(seen):
        assert not th.equal(one, two)
    clones: list[Any] = [copy.deepcopy(model.policy), pickle.loads(pickle.dumps(model.policy))]
    for clone in clones:
        obs = th.zeros(2, 3)
        assert th.equal(clone.search.run(obs, None).value, model.policy.search.run(obs, None).value)
        with th.no_grad():
            clone.averaged_network.dynamics.joint[1].weight.mul_(2)
        assert not th.equal(clone.search.run(obs, None).value, model.policy.search.run(obs, None).value)


@pytest.mark.parametrize("roots", [3, 200])
def test_searches_in_threads_do_not_disturb_each_other(roots: int) -> None:
    """Two agents of one process, as in a study with two jobs: they trace and search at the same time."""
    networks = [make_network(BOX if seed % 2 else DISCRETE, seed) for seed in range(4)]
    obs = th.randn(roots, 4, generator=th.Generator().manual_seed(0))
    expected = [GumbelSearch(network, SETTINGS).run(obs, None).value for network in networks]

    def work(network: Ezv2Network) -> list[th.Tensor]:
        return [GumbelSearch(network, SETTINGS).run(obs, None).value for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(work, networks), expected):
            for x in found:
                th.testing.assert_close(x, alone, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Batch norm and bfloat16
# --------------------------------------------------------------------------------------------------------------------


@KINDS
def test_batch_norm_is_folded(space: spaces.Space) -> None:
    network = make_network(space)
    traced = TracedModel(network)
    state, action = th.randn(70, 24), random_actions(network, 70)
    with th.no_grad():
        found = traced.step(state, action)(state, action)
        expected = network.recurrent_inference(state, action)
    assert len(traced._folds) == 3 and "batch_norm" not in str(traced._step.inlined_graph)  # type: ignore[attr-defined]
    for x, y in zip(found, expected):
        th.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    # the model itself is as it was
    assert any(isinstance(module, nn.BatchNorm1d) for module in network.modules())


@KINDS
def test_bfloat16_is_close(space: spaces.Space) -> None:
    network = make_network(space)
    obs = th.randn(100, 4, generator=th.Generator().manual_seed(0))
    exact, rough = (GumbelSearch(network, SETTINGS, bfloat16=flag).run(obs, None) for flag in (False, True))
    assert th.equal(rough.network_value, exact.network_value)  # the roots themselves are in float32
    th.testing.assert_close(rough.value, exact.value, rtol=0.3, atol=0.3)
    assert rough.value.dtype == th.float32 and th.equal(rough.value, exact.value) != bfloat16_is_fast()


def test_bfloat16_is_a_setting_of_the_policy() -> None:
    policy_kwargs = dict(**TINY["policy_kwargs"], search_dtype="bfloat16")
    model = EZV2("MlpPolicy", "Pendulum-v1", **{**TINY, "policy_kwargs": policy_kwargs})
    policy = model.policy
    assert policy._get_constructor_parameters()["search_dtype"] == "bfloat16"
    assert all(search.bfloat16 for search in (policy.search, policy.acting_search, policy.target_search))
    assert copy.deepcopy(policy).search.bfloat16


# --------------------------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------------------------


def box_search() -> dict[str, Any]:
    tree = Tree(4, 3, 6, 2, num_considered=6, discount=0.9)
    tree.reset(np.zeros(2, np.float32), np.zeros((2, 6), np.float32), np.zeros((2, 6), np.float32))
    tree.select()
    return dict(
        tree=tree,
        states=np.zeros((8, 24), np.float32),
        actions=np.zeros((24, 3), np.float32),
        noise=np.zeros((3, 2, 2, 3), np.float32),
        limit=0.999,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("states", np.zeros((7, 24), np.float32)),
        ("states", np.zeros((8, 23), np.float32)),
        ("states", np.zeros((8, 24))),
        ("states", np.zeros((24, 8), np.float32).T),
        ("states", None),
        ("actions", np.zeros((23, 3), np.float32)),
        ("actions", np.zeros((24, 2), np.float32)),
        ("actions", None),
        ("noise", None),
        ("noise", np.zeros((2, 2, 2, 3), np.float32)),
        ("noise", np.zeros((3, 3, 2, 3), np.float32)),
        ("noise", np.zeros((3, 2, 1, 3), np.float32)),
        ("noise", np.zeros((3, 2, 2, 2), np.float32)),
        ("tree", None),
        ("tree", Tree(4, 3, 6, 2, num_considered=6, discount=0.9)),
    ],
)
def test_bad_arrays_are_refused(name: str, value: Any) -> None:
    mlp = native(make_network(BOX))
    mlp.search(**box_search())
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        mlp.search(**{**box_search(), name: value})
    assert 10 <= len(str(error.value)) <= 200
    with pytest.raises((ValueError, TypeError)):
        native(make_network(DISCRETE)).search(**box_search())


def test_bad_features_and_weights_are_refused() -> None:
    network = make_network(BOX)
    mlp = native(network)
    for features in (np.zeros((2, 5), np.float32), np.zeros((0, 4), np.float32), np.zeros((2, 4)), None):
        with pytest.raises((ValueError, TypeError)):
            mlp.initial(features)  # type: ignore[arg-type]
    weights = export_weights(network)
    assert weights is not None
    for name, entry in weights.items():
        if name.endswith("_blocks") or name.endswith("_support"):
            continue
        wrong = np.zeros((3, 3), np.float32)
        with pytest.raises((ValueError, TypeError)):
            Mlp({**weights, name: wrong if isinstance(entry, np.ndarray) else (wrong, wrong[0], [])}, False, [])
        with pytest.raises(KeyError):
            Mlp({key: x for key, x in weights.items() if key != name}, False, [])
    with pytest.raises(ValueError):
        sample_actions(np.zeros((2, 4), np.float32), np.zeros((2, 3, 2), np.float32), 0.999, np.zeros((2, 4), np.float32))
