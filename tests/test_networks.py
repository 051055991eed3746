"""The model for vector observations: sizes of the paper, outputs before training, normalisation, batches."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_ezv2.distributions import SquashedGaussian, SupportSpec
from sb3_ezv2.networks import Ezv2Network, ResidualBlock, RunningNorm

BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTION_SPACES = [spaces.Discrete(4), spaces.Box(-1.0, 1.0, (1,)), spaces.Box(-1.0, 1.0, (2, 3))]


def make(observation_space: spaces.Space = BOX, action_space: spaces.Space = ACTION_SPACES[0], **settings: Any) -> Ezv2Network:
    """A small model with weights of its own."""
    defaults: dict[str, Any] = dict(
        net_arch=[16],
        state_dim=8,
        n_blocks=1,
        action_embedding_dim=4,
        projection_dim=12,
        value_support=SupportSpec(299.0, 51, "h"),
        reward_support=SupportSpec(2.0, 21, "h"),
    )
    th.manual_seed(0)
    return Ezv2Network(observation_space, action_space, FlattenExtractor(observation_space), **{**defaults, **settings})


def paper_model() -> Ezv2Network:
    """Of Table 7: Walker Run has 24 observations and 6 actions."""
    observation_space, action_space = spaces.Box(-np.inf, np.inf, (24,)), spaces.Box(-1.0, 1.0, (6,))
    sizes: dict[str, Any] = dict(net_arch=[256], state_dim=128, n_blocks=3, action_embedding_dim=64, projection_dim=512)
    return make(observation_space, action_space, reward_support=SupportSpec(2.0, 51, "h"), **sizes)


def randomise(network: Ezv2Network, seed: int = 1) -> Ezv2Network:
    """As if it had been trained: no layer is zero, and batch norm has seen something."""
    generator = th.Generator().manual_seed(seed)
    with th.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * th.randn(parameter.shape, generator=generator))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean += 0.3 * th.randn(module.running_mean.shape, generator=generator)
                module.running_var *= 1 + th.rand(module.running_var.shape, generator=generator)
    return network


def random_actions(network: Ezv2Network, count: int) -> th.Tensor:
    generator = th.Generator().manual_seed(2)
    if network.discrete:
        return th.randint(network.action_dim, (count,), generator=generator)
    return 2 * th.rand(count, network.action_dim, generator=generator) - 1


# --------------------------------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------------------------------


def test_size_of_the_papers_model() -> None:
    """Table 7: 1.3e6 parameters."""
    count = sum(parameter.numel() for parameter in paper_model().parameters())
    assert 1.25e6 <= count < 1.35e6


def test_parts_of_the_papers_model() -> None:
    """App. G, counted by hand: a Linear of n to m has nm + m numbers, a norm of n has 2n."""

    def linear(*widths: int) -> int:
        return sum(n * m + m for n, m in itertools.pairwise(widths))

    network = paper_model()
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    block = 2 * 128 + linear(128, 256, 128)
    assert count["normalizer"] == 0
    assert count["representation"] == linear(24, 128) + 2 * 128 + 3 * block
    action = linear(6, 64) + 2 * 64
    assert count["dynamics"] == action + 2 * (128 + 64) + linear(128 + 64, 256, 128) + 3 * block
    for name, outputs in (("value_head", 51), ("reward_head", 51), ("policy_head", 2 * 6)):
        assert count[name] == block + 2 * 128 + linear(128, 256, outputs) + 2 * 256
    assert count["projection"] == linear(128, 512, 512, 128) + 2 * 2 * 512
    assert count["projection_predictor"] == linear(128, 512, 128) + 2 * 512


def test_net_arch_is_the_heads_hidden_widths() -> None:
    network = make(net_arch=[16, 24])
    widths = [m.out_features for m in network.value_head.mlp.modules() if isinstance(m, nn.Linear)]
    assert widths == [16, 24, 51]


# --------------------------------------------------------------------------------------------------------------------
# Outputs
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("action_space", ACTION_SPACES, ids=str)
def test_before_training_every_output_is_exactly_zero(action_space: spaces.Space, training: bool) -> None:
    network = make(action_space=action_space).train(training)
    network.set_reward_scale(12.5)
    observations = 100 * th.randn(9, 3, generator=th.Generator().manual_seed(0))
    state, value, policy = network.initial_inference(observations)
    assert (value == 0).all() and (policy == 0).all() and (network.values(observations) == 0).all()
    for _ in range(3):
        state, reward, value, policy = network.recurrent_inference(state, random_actions(network, 9))
        assert (reward == 0).all() and (value == 0).all() and (policy == 0).all()
    if network.discrete:
        th.testing.assert_close(th.softmax(policy, -1), th.full((9, 4), 0.25))
    else:
        distribution = SquashedGaussian(policy)
        assert (distribution.mean == 0).all() and distribution.mean.shape == (9, network.action_dim)
        th.testing.assert_close(distribution.std, th.full((9, network.action_dim), math.log1p(math.e) + 0.1))


@pytest.mark.parametrize("action_space", ACTION_SPACES, ids=str)
def test_shapes_and_parts(action_space: spaces.Space) -> None:
    network = randomise(make(action_space=action_space)).eval()
    observations, actions = th.randn(5, 3), random_actions(network, 5)
    state, value, policy = network.initial_inference(observations)
    outputs = network.action_dim if network.discrete else 2 * network.action_dim
    assert network.action_dim == (4 if network.discrete else spaces.flatdim(action_space))
    assert state.shape == (5, 8) and value.shape == (5,) and policy.shape == (5, outputs)
    th.testing.assert_close(state, network.represent(observations))
    th.testing.assert_close(value, network.values(observations))
    th.testing.assert_close(value, network.value_support.decode(network.value_head(state)))
    th.testing.assert_close(policy, network.policy_head(state))
    following, reward, value, policy = network.recurrent_inference(state, actions)
    th.testing.assert_close(following, network.dynamics_step(state, actions))
    # R and V are of the state that the action leads to
    th.testing.assert_close(reward, network.reward_support.decode(network.reward_head(following)))
    th.testing.assert_close(value, network.value_support.decode(network.value_head(following)))
    th.testing.assert_close(policy, network.policy_head(following))
    assert following.shape == (5, 8) and reward.shape == (5,) and network.project(state).shape == (5, 8)
    assert network.projection_predictor(network.project(state)).shape == (5, 8)
    for tensor in (state, value, policy, following, reward):
        assert tensor.std() > 1e-3


@pytest.mark.parametrize("action_space", ACTION_SPACES, ids=str)
def test_a_row_does_not_depend_on_its_batch(action_space: spaces.Space) -> None:
    network = randomise(make(action_space=action_space)).eval()
    observations, actions = th.randn(6, 3), random_actions(network, 6)
    state, *batch = network.initial_inference(observations)
    together = [state, *batch, *network.recurrent_inference(state, actions)]
    for row in range(6):
        one, *single = network.initial_inference(observations[row : row + 1])
        alone = [one, *single, *network.recurrent_inference(one, actions[row : row + 1])]
        for x, y in zip(alone, together):
            th.testing.assert_close(x[0], y[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("action_space", ACTION_SPACES, ids=str)
def test_the_next_state_depends_on_state_and_every_part_of_the_action(action_space: spaces.Space) -> None:
    network = randomise(make(action_space=action_space)).eval()
    state = network.represent(th.randn(1, 3))
    if network.discrete:
        nexts = network.dynamics_step(state.expand(4, -1), th.arange(4))
        assert th.pdist(nexts).min() > 1e-3
        return
    action = th.zeros(1, network.action_dim, requires_grad=True)
    state = state.detach().requires_grad_()
    network.dynamics_step(state, action).square().sum().backward()
    assert action.grad is not None and state.grad is not None
    assert (action.grad.abs() > 1e-6).all() and (state.grad.abs() > 1e-6).all()


def test_states_pass_through_residual_links() -> None:
    """Branches that give 0 leave the state alone: in the dynamics as a whole, and in every tower."""
    network = randomise(make()).eval()
    for tower in (network.representation, network.dynamics.tower, network.value_head.trunk[0]):
        for block in tower.modules():
            if isinstance(block, ResidualBlock):
                for parameter in block.branch[-1].parameters():
                    nn.init.zeros_(parameter)
    for parameter in network.dynamics.joint[-1].parameters():
        nn.init.zeros_(parameter)
    observations = th.randn(5, 3)
    state = network.represent(observations)
    linear, norm = network.representation[0], network.representation[1]
    th.testing.assert_close(state, th.tanh(norm(linear(network.normalizer(network.features(observations))))))
    assert th.equal(network.dynamics_step(state, random_actions(network, 5)), state)
    th.testing.assert_close(network.value_head.trunk(state), network.value_head.trunk[1](state))


@pytest.mark.parametrize(
    "space",
    [
        BOX,
        spaces.Box(-1.0, 1.0, (2, 2), np.float64),
        spaces.Discrete(6),
        spaces.MultiBinary(4),
        spaces.MultiDiscrete([3, 2, 4]),
    ],
    ids=str,
)
def test_observation_spaces(space: spaces.Space) -> None:
    """All as a replay buffer gives them; different observations are different states."""
    network = randomise(make(space)).eval()
    space.seed(0)
    distinct = {np.asarray(x).tobytes(): np.asarray(x) for x in (space.sample() for _ in range(60))}
    observations = np.stack(list(distinct.values()))
    state = network.represent(th.as_tensor(observations))
    assert state.shape == (len(observations), 8) and len(observations) >= 6
    assert th.pdist(state).min() > 1e-3
    if isinstance(space, spaces.Discrete):
        th.testing.assert_close(network.represent(th.as_tensor(observations).unsqueeze(1)), state)


def test_the_scale_is_the_unit_of_rewards_and_values() -> None:
    network = randomise(make()).eval()
    observations, actions = th.randn(5, 3), random_actions(network, 5)

    def outputs() -> tuple[th.Tensor, ...]:
        state, value, policy = network.initial_inference(observations)
        _, reward, next_value, next_policy = network.recurrent_inference(state, actions)
        return value, reward, next_value, network.values(observations), policy, next_policy

    before = outputs()
    network.set_reward_scale(1000.0)
    after = outputs()
    for x, y in zip(before[:4], after[:4]):
        th.testing.assert_close(1000 * x, y)
    for x, y in zip(before[4:], after[4:]):
        th.testing.assert_close(x, y)
    assert network.value_support.limit == 299_000 and network.reward_support.limit == 2000


# --------------------------------------------------------------------------------------------------------------------
# The running mean block
# --------------------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_batches() -> None:
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(50, 32, 4)) * [1e-3, 1.0, 50.0, 0.0] + [0.0, 3.0, -200.0, 7.0]).astype(np.float32)
    data[25:] += 1  # the distribution drifts
    norm = RunningNorm(4)
    for count in range(1, 51):
        norm.update(th.from_numpy(data[count - 1]))
        if count in (1, 2, 30, 50):
            seen = data[:count].reshape(-1, 4).astype(np.float64)
            np.testing.assert_allclose(norm.mean, seen.mean(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(norm.var, seen.var(0), rtol=1e-3, atol=1e-6)
    x = th.from_numpy(data[3])
    expected = (data[3] - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-5)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-2, atol=1e-2)


def test_old_statistics_fade_at_the_slowest_rate() -> None:
    rng = np.random.default_rng(1)
    norm = RunningNorm(2, slowest_rate=0.25)
    first, second = 0.0, 0.0  # moments: their mean with rates 1, 1/2, 1/3, 1/4, 1/4 ...
    for count in range(1, 13):
        x = rng.normal(loc=count, size=(8, 2)).astype(np.float32)
        norm.update(th.from_numpy(x))
        rate = max(1 / count, 0.25)
        first = (1 - rate) * first + rate * x.mean(0, dtype=np.float64)
        second = (1 - rate) * second + rate * np.square(x, dtype=np.float64).mean(0)
        np.testing.assert_allclose(norm.mean, first, rtol=1e-5)
        np.testing.assert_allclose(norm.var, second - first**2, rtol=1e-4)


def test_rare_and_constant_features_are_bounded() -> None:
    norm = RunningNorm(2)
    norm.update(th.tensor([[5.0, 0.0], [5.0, 1.0]]))
    x = norm(th.tensor([[5.0, 0.5], [6.0, 1e9], [4.0, -1e9]]))
    th.testing.assert_close(x, th.tensor([[0.0, 0.0], [10.0, 10.0], [-10.0, -10.0]]))


def test_only_update_changes_statistics() -> None:
    """Whether a model is evaluated or trained, an observation means the same, and looking at it leaves no trace."""
    network = randomise(make())
    network.normalizer.update(3 + 2 * th.randn(64, 3))
    before = {name: tensor.clone() for name, tensor in network.normalizer.state_dict().items()}
    observations = 100 * th.randn(16, 3)
    states = [network.train(training).represent(observations) for training in (True, False)]
    th.testing.assert_close(*states)
    network.train().initial_inference(observations)
    for name, tensor in network.normalizer.state_dict().items():
        assert (tensor == before[name]).all()
    assert set(before) == {"mean", "var", "batches"} and not list(network.normalizer.parameters())


def test_evaluation_changes_nothing() -> None:
    network = randomise(make()).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state, _, _ = network.initial_inference(th.randn(16, 3))
    state, *_ = network.recurrent_inference(state, random_actions(network, 16))
    network.projection_predictor(network.project(state))
    assert all((tensor == before[name]).all() for name, tensor in network.state_dict().items())
