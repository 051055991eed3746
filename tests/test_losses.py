"""
The losses against loops over sequences and steps, their masks and gradients, and a batch that is learnt by heart.

Shapes: B sequences, U unroll steps, K candidates, A action dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from sb3_ezv2.distributions import SquashedGaussian, SupportSpec
from sb3_ezv2.losses import Losses, Targets, compute_losses
from sb3_ezv2.networks import Ezv2Network
from sb3_ezv2.replay_buffer import Batch
from sb3_ezv2.unroll import unroll

OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
DISCRETE = spaces.Discrete(4)
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
KINDS = pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["discrete", "box"])
NO_COEFS: dict[str, Any] = dict(reward_coef=0.0, policy_coef=0.0, vf_coef=0.0, consistency_coef=0.0, ent_coef=0.0)


def make_network(
    space: spaces.Space, seed: int = 0, trained: bool = True, width: int = 16, predicts_observations: bool = False
) -> Ezv2Network:
    """:param trained: no last layer is zero"""
    th.manual_seed(seed)
    network = Ezv2Network(
        OBS,
        space,
        FlattenExtractor(OBS),
        net_arch=[width],
        state_dim=8,
        n_blocks=1,
        action_embedding_dim=4,
        projection_dim=width,
        value_support=SupportSpec(50.0, 21, "h"),
        reward_support=SupportSpec(10.0, 21, "symexp"),
        predicts_observations=predicts_observations,
    )
    network.set_reward_scale(2.0)
    if trained:
        for head in (network.value_head, network.reward_head, network.policy_head):
            for parameter in head.mlp[-1].parameters():
                nn.init.normal_(parameter, std=0.5)
    return network


def make_data(space: spaces.Space, size: int = 6, steps: int = 3, seed: int = 0, count: int = 5) -> tuple[Batch, Targets]:
    """
    A random batch whose masks are all drawn on their own, so that none can stand in for another.

    :param count: K, for Box actions
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> th.Tensor:
        return th.from_numpy(rng.normal(scale=scale, size=shape)).float()

    def mask(*shape: int) -> th.Tensor:
        return th.from_numpy(rng.random(shape) < 0.7)

    if isinstance(space, spaces.Discrete):
        actions = th.from_numpy(rng.integers(space.n, size=(size, steps)))
        candidates, count = None, int(space.n)
    else:
        actions = th.tanh(normal(size, steps, 2))
        candidates = th.tanh(normal(size, steps + 1, count, 2))
    batch = Batch(
        slots=np.zeros((size, steps + 1), np.int64),
        observations=normal(size, steps + 1, 3),
        actions=actions,
        rewards=normal(size, steps, scale=3.0),
        returns=normal(size, steps + 1),
        bootstrap_observations=normal(size, steps + 1, 3),
        bootstrap_discounts=normal(size, steps + 1),
        observed=mask(size, steps + 1),
        reward_mask=mask(size, steps),
        value_mask=mask(size, steps + 1),
        policy_mask=mask(size, steps + 1),
        weights=th.from_numpy(rng.uniform(0.1, 1, size)).float(),
        ages=np.zeros(size, np.int64),
    )
    policies = th.softmax(normal(size, steps + 1, count), -1)
    return batch, Targets(normal(size, steps + 1, scale=20.0), mask(size, steps + 1), policies, candidates)


def losses_of(network: Ezv2Network, batch: Batch, targets: Targets, seed: int = 0, **coefs: Any) -> Losses:
    return compute_losses(network, batch, targets, np.random.default_rng(seed), **coefs)


def policies_of(network: Ezv2Network, batch: Batch) -> th.Tensor:
    """Outputs of the policy head at all steps. :return: [B, U + 1, outputs]"""
    states = unroll(network, batch.observations, batch.actions)
    return network.policy_head(states.flatten(0, 1)).unflatten(0, states.shape[:2]).transpose(0, 1)


def gradients(loss: th.Tensor, network: nn.Module) -> dict[str, th.Tensor]:
    """Of all parameters; zeros where a parameter has no part in the loss."""
    names, parameters = zip(*network.named_parameters())
    found = th.autograd.grad(loss, parameters, allow_unused=True)
    return {name: th.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found)}


# --------------------------------------------------------------------------------------------------------------------
# Against loops
# --------------------------------------------------------------------------------------------------------------------


@KINDS
def test_losses_are_those_of_plain_loops(space: spaces.Space) -> None:
    """Eq. 3 to 9 one step of one sequence at a time; the estimated entropy of squashed Gaussians is tested below."""
    network = make_network(space).eval()
    batch, targets = make_data(space)
    found = losses_of(network, batch, targets, ent_coef=0.0)
    size, steps = batch.rewards.shape
    sums = dict(reward=0.0, policy=0.0, value=0.0, consistency=0.0)

    def cross_entropy(weights: th.Tensor, logits: th.Tensor) -> float:
        return -float((weights * th.log(th.softmax(logits[0], -1))).sum())

    with th.no_grad():
        for b in range(size):
            weight = float(batch.weights[b]) / size / steps
            state = network.represent(batch.observations[b : b + 1, 0])
            for k in range(steps + 1):
                if k > 0:
                    state = network.dynamics_step(state, batch.actions[b : b + 1, k - 1])
                    if batch.reward_mask[b, k - 1]:
                        target = network.reward_support.encode(batch.rewards[b, k - 1])
                        sums["reward"] += weight * cross_entropy(target, network.reward_head(state))
                    if batch.observed[b, k]:
                        real = network.project(network.represent(batch.observations[b : b + 1, k]))[0]
                        predicted = network.projection_predictor(network.project(state))[0]
                        sums["consistency"] -= weight * float(real @ predicted / real.norm() / predicted.norm())
                if targets.value_mask[b, k]:
                    target = network.value_support.encode(targets.values[b, k])
                    sums["value"] += weight * cross_entropy(target, network.value_head(state))
                if not batch.policy_mask[b, k]:
                    continue
                policy = network.policy_head(state)
                if targets.candidates is None:
                    sums["policy"] += weight * cross_entropy(targets.policies[b, k], policy)
                else:
                    gaussian = SquashedGaussian(policy[0])
                    squashed = TransformedDistribution(Normal(gaussian.mean, gaussian.std), [TanhTransform()])
                    log_prob = squashed.log_prob(targets.candidates[b, k].clamp(-0.999, 0.999)).sum(-1)  # [K]
                    sums["policy"] -= weight * float((targets.policies[b, k] * log_prob).sum())
    for name, expected in sums.items():
        assert getattr(found, name).item() == pytest.approx(expected, rel=1e-4, abs=1e-5), name
    total = sums["reward"] + sums["policy"] + 0.25 * sums["value"] + 2 * sums["consistency"]
    assert found.total.item() == pytest.approx(total, rel=1e-4)
    coefs: dict[str, Any] = dict(reward_coef=0.3, policy_coef=5.0, vf_coef=1.7, consistency_coef=0.9, ent_coef=0.0)
    total = 0.3 * sums["reward"] + 5 * sums["policy"] + 1.7 * sums["value"] + 0.9 * sums["consistency"]
    assert losses_of(network, batch, targets, **coefs).total.item() == pytest.approx(total, rel=1e-4)


def test_value_error_is_in_the_units_of_the_rewards() -> None:
    network = make_network(DISCRETE).eval()
    batch, targets = make_data(DISCRETE)
    error = losses_of(network, batch, targets).value_error
    values = network.values(batch.observations[:, 0])
    th.testing.assert_close(error, (values - targets.values[:, 0]).abs(), rtol=1e-4, atol=1e-4)
    assert not error.requires_grad and error.shape == (6,)


def test_entropy_of_discrete_policies() -> None:
    network = make_network(DISCRETE).eval()
    batch, targets = make_data(DISCRETE)
    policy = policies_of(network, batch)
    step_entropy = th.distributions.Categorical(logits=policy).entropy() * batch.policy_mask
    losses = losses_of(network, batch, targets, **{**NO_COEFS, "ent_coef": 0.5})
    th.testing.assert_close(losses.entropy, step_entropy.sum() / batch.policy_mask.sum())
    # a bonus: it lowers the loss
    expected = -0.5 * (batch.weights * step_entropy.sum(1)).mean() / 3
    th.testing.assert_close(losses.total, expected)


def test_entropy_of_squashed_gaussians() -> None:
    """The mean over many seeds of its estimate from reparametrised samples, with its gradient."""
    network = make_network(BOX).eval()
    batch, targets = make_data(BOX)
    with th.no_grad():
        gaussian = SquashedGaussian(policies_of(network, batch))
    squashed = TransformedDistribution(Normal(gaussian.mean, gaussian.std), [TanhTransform()])
    th.manual_seed(0)
    step_entropy = -squashed.log_prob(squashed.sample((4000,))).sum(-1).mean(0) * batch.policy_mask
    coefs: dict[str, Any] = {**NO_COEFS, "ent_coef": 0.5}
    many = [losses_of(network, batch, targets, seed, **coefs) for seed in range(200)]
    entropy = th.stack([losses.entropy for losses in many]).mean()
    th.testing.assert_close(entropy, step_entropy.sum() / batch.policy_mask.sum(), rtol=0, atol=0.03)
    total = th.stack([losses.total for losses in many]).mean()
    th.testing.assert_close(total, -0.5 * (batch.weights * step_entropy.sum(1)).mean() / 3, rtol=0, atol=0.03)
    # the noise is that of the generator
    assert losses_of(network, batch, targets, 1, **coefs).total == many[1].total != many[2].total
    # a step along the gradient raises the entropy
    optimizer = th.optim.SGD(network.policy_head.parameters(), lr=0.1)
    for seed in range(20):
        optimizer.zero_grad()
        losses_of(network, batch, targets, seed, **coefs).total.backward()
        optimizer.step()
    assert losses_of(network, batch, targets, **coefs).entropy > many[0].entropy + 0.05


@KINDS
def test_importance_weights(space: spaces.Space) -> None:
    """The loss is the mean over the batch of each sequence's loss times its weight."""
    network = make_network(space).train()
    batch, targets = make_data(space)
    alone = th.stack([losses_of(network, batch._replace(weights=row), targets).total for row in th.eye(6)])  # over B
    total = losses_of(network, batch, targets).total
    th.testing.assert_close(total, (batch.weights * alone).sum(), rtol=1e-4, atol=1e-5)
    assert alone.std() > 0.01
    # they weigh no report of priorities and entropy
    unweighted = losses_of(network, batch._replace(weights=th.ones(6)), targets)
    weighted = losses_of(network, batch, targets)
    th.testing.assert_close(unweighted.value_error, weighted.value_error)
    th.testing.assert_close(unweighted.entropy, weighted.entropy)


# --------------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@KINDS
def test_masked_targets_change_nothing(space: spaces.Space, training: bool) -> None:
    network = make_network(space).train(training)
    batch, targets = make_data(space)
    _, others = make_data(space, seed=1)
    other_batch, _ = make_data(space, seed=1)
    before = losses_of(network, batch, targets)
    masked_policy = batch.policy_mask[..., None]
    candidates = None
    if targets.candidates is not None and others.candidates is not None:
        candidates = th.where(masked_policy[..., None], targets.candidates, others.candidates)
    changed = Targets(
        th.where(targets.value_mask, targets.values, others.values),
        targets.value_mask,
        th.where(masked_policy, targets.policies, 5 * others.policies),
        candidates,
    )
    other = batch._replace(rewards=th.where(batch.reward_mask, batch.rewards, other_batch.rewards))
    after = losses_of(network, other, changed)
    for name in ("total", "reward", "policy", "value", "consistency", "entropy"):
        assert getattr(before, name) == getattr(after, name), name
    x, y = gradients(before.total, network), gradients(after.total, network)
    assert all(th.equal(x[name], y[name]) for name in x)
    # the same change does matter where it is not masked
    everything = th.ones_like(targets.value_mask)
    for one, two in ((targets, changed), (targets._replace(value_mask=everything), changed._replace(value_mask=everything))):
        difference = losses_of(network, batch, one).value - losses_of(network, batch, two).value
        assert (difference == 0) == (one is targets)
    if not training:  # consistency: in training mode the batch norm of the projector sees all observations
        observations = th.where(batch.observed[..., None], batch.observations, other_batch.observations)
        observations[:, 0] = batch.observations[:, 0]
        after = losses_of(network, batch._replace(observations=observations), targets)
        assert after.total == before.total


@KINDS
def test_with_everything_masked_nothing_is_learnt(space: spaces.Space) -> None:
    network = make_network(space).train()
    batch, targets = make_data(space)
    nothing = th.zeros_like(batch.value_mask)
    batch = batch._replace(observed=nothing, reward_mask=nothing[:, 1:], policy_mask=nothing)
    losses = losses_of(network, batch, targets._replace(value_mask=nothing))
    assert losses.total == 0 and losses.entropy == 0
    assert all((gradient == 0).all() for gradient in gradients(losses.total, network).values())


@KINDS
def test_each_loss_trains_its_own_parts(space: spaces.Space) -> None:
    """And a coefficient of 0 takes a loss out."""
    network = make_network(space).train()
    batch, targets = make_data(space)
    own = {
        "reward_coef": {"reward_head"},
        "policy_coef": {"policy_head"},
        "ent_coef": {"policy_head"},
        "vf_coef": {"value_head"},
        "consistency_coef": {"projection", "projection_predictor"},
    }
    for name, heads in own.items():
        losses = losses_of(network, batch, targets, **{**NO_COEFS, name: 1.0})
        found = gradients(losses.total, network)
        parts = {key.split(".")[0] for key, gradient in found.items() if (gradient != 0).any()}
        assert parts == heads | {"representation", "dynamics"}
    everything = gradients(losses_of(network, batch, targets).total, network)
    assert all((gradient != 0).any() for gradient in everything.values())


@KINDS
def test_heads_see_all_steps_as_one_batch(space: spaces.Space) -> None:
    """Their batch norm's statistics are of the mixture of states that a search meets."""
    network = make_network(space).train()
    losses_of(network, *make_data(space))
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm1d):
            # the projection sees the predicted states and the real ones
            assert module.num_batches_tracked == (2 if name.startswith("projection.") else 1), name


# --------------------------------------------------------------------------------------------------------------------
# Gradients
# --------------------------------------------------------------------------------------------------------------------


class LinearToy:
    """States are numbers: s_0 = w x, then s_{k+1} = c s_k + a_k."""

    def __init__(self) -> None:
        self.w = th.tensor(3.0, requires_grad=True)
        self.c = th.tensor(5.0, requires_grad=True)

    def represent(self, obs: th.Tensor) -> th.Tensor:
        return self.w * obs

    def dynamics_step(self, state: th.Tensor, action: th.Tensor) -> th.Tensor:
        return self.c * state + action


def test_the_gradient_is_halved_at_every_step_by_hand() -> None:
    toy = LinearToy()
    batch, _ = make_data(DISCRETE, size=1, steps=2)
    batch = batch._replace(observations=th.full((1, 3, 1), 2.0), actions=th.tensor([[[7.0], [11.0]]]))
    states = unroll(toy, batch.observations, batch.actions)[:, 0, 0]  # type: ignore[arg-type]
    assert states.tolist() == [6, 37, 196]  # values are whole
    of_w = [th.autograd.grad(state, toy.w, retain_graph=True)[0].item() for state in states]
    assert of_w == [2, 0.5 * 5 * 2, 0.25 * 25 * 2]
    of_c = [th.autograd.grad(state, toy.c, retain_graph=True)[0].item() for state in states[1:]]
    assert of_c == [6, 37 + 0.5 * 5 * 6]


@pytest.mark.parametrize("name", ["reward", "value", "policy", "consistency"])
@KINDS
def test_the_gradient_is_halved_at_every_step_of_the_model(space: spaces.Space, name: str) -> None:
    """Of a loss at step k alone, the representation gets 2^-k of the gradient of a plain unroll."""
    network = make_network(space).eval()
    batch, targets = make_data(space)
    nothing = th.zeros_like(batch.value_mask)
    coef = "vf_coef" if name == "value" else f"{name}_coef"
    for k in range(4):
        only = nothing.clone()
        only[:, k] = True
        if name in ("reward", "consistency") and k == 0:
            continue
        masks: dict[str, Any] = dict(observed=only, policy_mask=only, reward_mask=only[:, 1:])
        arguments = batch._replace(**masks), targets._replace(value_mask=only)
        loss = losses_of(network, *arguments, **{**NO_COEFS, coef: 1.0}).total
        found = gradients(loss, network)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sb3_ezv2.unroll.unroll", plain_unroll)
            whole = losses_of(network, *arguments, **{**NO_COEFS, coef: 1.0}).total
        th.testing.assert_close(loss, whole)
        expected = gradients(whole, network)
        for part, gradient in found.items():
            if part.startswith("representation"):
                th.testing.assert_close(gradient, 0.5**k * expected[part], rtol=1e-3, atol=1e-7)
            elif not part.startswith("dynamics"):
                th.testing.assert_close(gradient, expected[part], rtol=1e-3, atol=1e-7)
        assert any((found[part] != 0).any() for part in found if part.startswith("representation"))


def plain_unroll(network: Ezv2Network, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
    states = [network.represent(observations[:, 0])]
    for k in range(actions.shape[1]):
        states.append(network.dynamics_step(states[-1], actions[:, k]))
    return th.stack(states)


def test_the_consistency_target_has_no_gradient() -> None:
    network = make_network(DISCRETE).train()
    batch, targets = make_data(DISCRETE)
    observations = batch.observations.clone().requires_grad_()
    losses = losses_of(network, batch._replace(observations=observations), targets)
    (gradient,) = th.autograd.grad(losses.total, observations)
    assert (gradient[:, 0] != 0).any() and (gradient[:, 1:] == 0).all()


@KINDS
def test_the_observation_loss_by_hand(space: spaces.Space) -> None:
    network = make_network(space, predicts_observations=True).train()
    assert network.observation_head is not None
    batch, targets = make_data(space)
    network.update_statistics(batch.observations, batch.observed)
    plain = losses_of(network, batch, targets)
    losses = losses_of(network, batch, targets, observation_coef=3.0)
    with th.no_grad():
        states, expected = unroll(network, batch.observations, batch.actions), 0.0
        for b in range(6):
            for k in range(1, 4):
                if batch.observed[b, k]:
                    normalised = network.normalizer(batch.observations[b, k])
                    told = network.observation_head(states[k, b])
                    expected += float(batch.weights[b] * (told - normalised).square().mean()) / (6 * 3)
    assert losses.observation == plain.observation == pytest.approx(expected, rel=1e-5)
    assert (losses.total - plain.total).item() == pytest.approx(3 * expected, rel=1e-4)
    found = gradients(losses.total - plain.total, network)
    reached = {name.split(".")[0] for name, gradient in found.items() if gradient.abs().max() > 1e-4}
    assert reached == {"representation", "dynamics", "observation_head"}


def test_consistency_is_at_least_minus_one_per_step() -> None:
    network = make_network(DISCRETE).eval()
    batch, targets = make_data(DISCRETE)
    batch = batch._replace(observed=th.ones_like(batch.observed), weights=th.ones(6))
    assert losses_of(network, batch, targets).consistency > -1
    network.projection_predictor = nn.Sequential()  # passes on what it gets
    with pytest.MonkeyPatch.context() as patch:
        # a model that predicts exactly
        patch.setattr(
            "sb3_ezv2.unroll.unroll",
            lambda model, obs, actions: model.represent(obs.transpose(0, 1).flatten(0, 1)).unflatten(0, (4, 6)),
        )
        consistency = losses_of(network, batch, targets).consistency
    assert consistency.item() == pytest.approx(-1.0, abs=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Learning
# --------------------------------------------------------------------------------------------------------------------


def fit(network: Ezv2Network, batch: Batch, targets: Targets, updates: int, **coefs: Any) -> Losses:
    network.train()
    optimizer = th.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(updates):
        losses = losses_of(network, batch, targets, **coefs)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    return losses_of(network, batch, targets, **coefs)


def unmasked(batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
    everything = th.ones_like(batch.value_mask)
    batch = batch._replace(observed=everything, policy_mask=everything, reward_mask=everything[:, 1:])
    return batch._replace(weights=th.ones_like(batch.weights)), targets._replace(value_mask=everything)


def test_a_batch_is_learnt_by_heart_with_discrete_actions() -> None:
    """Each loss falls to the entropy of its targets, and priorities to nearly 0."""
    network = make_network(DISCRETE, trained=False, width=32)
    batch, targets = unmasked(*make_data(DISCRETE, size=8, steps=2))
    first = losses_of(network.train(), batch, targets, ent_coef=0.0)
    last = fit(network, batch, targets, 250, ent_coef=0.0)

    def entropy(probs: th.Tensor, count: int) -> float:
        """Sum over the steps of the mean over the batch, over U."""
        return float(th.special.entr(probs).sum(-1).sum(1).mean()) / 2

    floors = dict(
        reward=entropy(network.reward_support.encode(batch.rewards), 2),
        value=entropy(network.value_support.encode(targets.values), 3),
        policy=entropy(targets.policies, 3),
        consistency=-1.0,
    )
    for name, floor in floors.items():
        start, end = getattr(first, name).item() - floor, getattr(last, name).item() - floor
        assert -1e-4 < end < 0.05 * start, name
    assert first.value_error.mean() > 10 and last.value_error.mean() < 0.5
    th.testing.assert_close(last.total, last.reward + last.policy + 0.25 * last.value + 2 * last.consistency)


@pytest.mark.parametrize("count", [1, 5])
def test_a_batch_is_learnt_by_heart_with_box_actions(count: int) -> None:
    """Eq. 9 (one candidate) and Eq. 8: the policy is the best squashed Gaussian for the weighted candidates."""
    network = make_network(BOX, trained=False, width=32)
    batch, targets = unmasked(*make_data(BOX, size=8, steps=1, count=count))
    assert targets.candidates is not None
    candidates = targets.candidates.clamp(-0.95, 0.95)
    targets = targets._replace(candidates=candidates)
    first = losses_of(network.train(), batch, targets, ent_coef=0.0)
    last = fit(network, batch, targets, 250, ent_coef=0.0)
    # the likeliest Gaussian has the mean and variance of atanh of the candidates, its variance at least 0.01
    weights, unsquashed = targets.policies.unsqueeze(-1), th.atanh(candidates)
    mean = (weights * unsquashed).sum(2)
    std = (weights * (unsquashed - mean.unsqueeze(2)) ** 2).sum(2).sqrt().clamp(min=0.1)
    with th.no_grad():
        found = SquashedGaussian(policies_of(network, batch))
    slopes = 2 * (math.log(2) - unsquashed - nn.functional.softplus(-2 * unsquashed))
    log_prob = Normal(mean.unsqueeze(2), std.unsqueeze(2)).log_prob(unsquashed) - slopes
    floor = -float((weights * log_prob).sum((-1, -2)).sum(1).mean())
    start, end = first.policy.item() - floor, last.policy.item() - floor
    assert -1e-3 < end < 0.1 * start
    assert (found.mean - mean).abs().mean() < 0.1
    assert first.value_error.mean() > 10 and last.value_error.mean() < 0.5


def test_the_same_seed_is_the_same_update() -> None:
    def weights(seed: int) -> list[Any]:
        network = make_network(BOX)
        fit(network, *make_data(BOX), 3, ent_coef=0.1)
        return [parameter.tolist() for parameter in network.parameters()]

    assert weights(0) == weights(0)
