"""Custom policies, features extractors, learning-rate schedules and optimizers."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from common import BOX, weights
from gymnasium import spaces
from sb3_agents import DISCRETE, IMAGE, OBSERVATIONS, STATE_SIZES, agent, vec_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from stable_baselines3.dqn.policies import MlpPolicy as DQNPolicy

from sb3_ezv2 import EZV2, CnnPolicy, Ezv2Policy, MlpPolicy
from sb3_ezv2.networks import Ezv2Network


class Scaled(Ezv2Network):
    """The model with observations divided by ten."""

    def features(self, obs: Any) -> th.Tensor:
        return super().features(obs) / 10


class ScaledPolicy(MlpPolicy):
    """A policy of one's own: another network, and an argument that says which."""

    def __init__(self, *args: Any, divide: bool = True, **kwargs: Any):
        self.divide = divide
        super().__init__(*args, **kwargs)

    def _make_network(self) -> Ezv2Network:
        network = super()._make_network()
        assert isinstance(network, Ezv2Network)
        if self.divide:
            network.__class__ = Scaled
        return network

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "divide": self.divide}


class Tower(BaseFeaturesExtractor):
    """A features extractor with weights of its own."""

    def __init__(self, observation_space: gym.Space, features_dim: int = 6):
        super().__init__(observation_space, features_dim)
        width = spaces.flatdim(observation_space)
        self.net = th.nn.Sequential(th.nn.Flatten(), th.nn.Linear(width, features_dim), th.nn.ReLU())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.net(observations)


def reload(model: EZV2, **kwargs: Any) -> EZV2:
    file = io.BytesIO()
    model.save(file)
    return EZV2.load(file, device="cpu", **kwargs)


@pytest.mark.parametrize("policy", [MlpPolicy, CnnPolicy], ids=lambda policy: policy.__name__)
def test_policies_as_classes(policy: type[Ezv2Policy]) -> None:
    env = vec_env(observations=OBSERVATIONS[policy.__name__])
    models = [agent(name, env) for name in (policy, policy.__name__)]
    assert type(models[0].policy) is type(models[1].policy) is policy
    assert th.equal(*(weights(model) for model in models))


@pytest.mark.parametrize("divide", [True, False])
def test_a_policy_of_ones_own(tmp_path: Any, divide: bool) -> None:
    kwargs = {**STATE_SIZES, "divide": divide}
    model = agent(ScaledPolicy, vec_env(2), policy_kwargs=kwargs, gradient_steps=-1).learn(16)
    networks = model.policy.networks()
    assert all(isinstance(network, Scaled) == divide for network in networks)
    obs = BOX.sample()
    loaded = reload(model, env=vec_env(2))
    assert type(loaded.policy) is ScaledPolicy and loaded.policy.divide == divide
    assert th.equal(weights(loaded), weights(model))
    model.policy.save(str(tmp_path / "policy"))
    for policy in (loaded.policy, ScaledPolicy.load(str(tmp_path / "policy"), device="cpu")):
        assert isinstance(policy, ScaledPolicy) and policy.divide == divide
        np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], policy.predict(obs, deterministic=True)[0])
    loaded.learn(4, reset_num_timesteps=False)


@pytest.mark.parametrize("policy", [DQNPolicy, th.nn.Module], ids=str)
def test_policies_of_other_algorithms(policy: Any) -> None:
    with pytest.raises(ValueError, match=r"does not apply, policy must be .*a subclass of sb3_ezv2\.Ezv2Policy"):
        EZV2(policy, vec_env())
    with pytest.raises(ValueError, match="Policy LstmPolicy unknown"):
        EZV2("LstmPolicy", vec_env())


@pytest.mark.parametrize(
    "space", [BOX, spaces.Discrete(4), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)], ids=lambda space: str(space)
)
def test_a_features_extractor_of_ones_own(space: spaces.Space) -> None:
    kwargs = dict(features_extractor_class=Tower, features_extractor_kwargs=dict(features_dim=5))
    model = agent(env=vec_env(observations=space), policy_kwargs=kwargs, learning_starts=5)
    network = model.policy.network
    assert isinstance(network, Ezv2Network) and isinstance(network.features_extractor, Tower)
    assert network.normalizer.mean.shape == (5,)
    before = [x.clone() for x in network.features_extractor.parameters()]
    model.learn(14)
    # it is learned with the rest, and the copies of the network have copies of it
    assert not any(th.equal(x, y) for x, y in zip(before, network.features_extractor.parameters()))
    extractors = [x.features_extractor for x in model.policy.networks()]  # type: ignore[union-attr]
    assert len({id(x) for x in extractors}) == 5 and all(isinstance(x, Tower) for x in extractors)
    loaded = reload(model, env=vec_env(observations=space))
    assert isinstance(loaded.policy.network.features_extractor, Tower)
    assert th.equal(weights(loaded), weights(model))
    loaded.learn(3, reset_num_timesteps=False)


def test_images_through_a_features_extractor() -> None:
    """MlpPolicy leaves how images become vectors to the extractor."""
    space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    kwargs = dict(features_extractor_class=NatureCNN, features_extractor_kwargs=dict(features_dim=7))
    model = agent(env=vec_env(observations=space), policy_kwargs=kwargs).learn(13)
    assert model._n_updates == 3 and model.policy.network.normalizer.mean.shape == (7,)  # type: ignore[union-attr]
    model.predict(space.sample())


def test_policy_arguments_that_do_not_exist() -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("CnnPolicy", dict(features_extractor_class=NatureCNN), "'features_extractor_class': .* is for MlpPolicy"),
        ("CnnPolicy", dict(features_extractor_kwargs={}), "'features_extractor_kwargs': .* is for MlpPolicy"),
        ("CnnPolicy", dict(normalize_images=False), "'normalize_images': its images are always divided by 255"),
        ("CnnPolicy", dict(state_dim=3), "'state_dim': it has net_arch, channels, n_blocks"),
        ("MlpPolicy", dict(activation_fn=th.nn.ReLU), "'activation_fn': the activations are the paper's"),
        ("MlpPolicy", dict(net_arc=[3]), "'net_arc': it has net_arch, state_dim"),
        ("MlpPolicy", dict(lr_schedule=None), "'lr_schedule': it has"),
    ]
    for policy, kwargs, message in cases:
        with pytest.raises(TypeError, match=f"policy_kwargs: {policy} takes no argument {message}"):
            agent(policy, policy_kwargs=kwargs)
    with pytest.raises(ValueError, match="net_arch must be a list of hidden widths"):
        agent(policy_kwargs=dict(net_arch=dict(pi=[8], qf=[8])))


class Rates(BaseCallback):
    """The learning rate of every update, seen at the step after it."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def _on_step(self) -> bool:
        if self.model._n_updates > 0:
            self.rates.append(self.model.policy.optimizer.param_groups[0]["lr"])
        return True


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (1e-3, lambda left: np.full_like(left, 1e-3)),
        (ConstantSchedule(2e-3), lambda left: np.full_like(left, 2e-3)),
        (LinearSchedule(1e-2, 1e-3, 0.5), lambda left: np.where(left < 0.5, 1e-3, 1e-2 - (1 - left) * 9e-3 / 0.5)),
        (lambda left: 1e-3 * left**2, lambda left: 1e-3 * left**2),
        (lambda left: np.float64(5e-4), lambda left: np.full_like(left, 5e-4)),
    ],
    ids=["number", "ConstantSchedule", "LinearSchedule", "lambda", "numpy"],
)
def test_learning_rate_schedules(schedule: Any, expected: Callable[[np.ndarray], np.ndarray]) -> None:
    rates = Rates()
    model = agent(learning_rate=schedule, warmup_fraction=0.0).learn(20, rates)
    left = 1 - np.arange(11, 20) / 20  # after steps 11 to 19; the update of step 20 is seen by no step
    np.testing.assert_allclose(rates.rates, expected(left), rtol=1e-6)
    # saved with the agent, and followed when it goes on
    loaded, again = reload(model, env=vec_env()), Rates()
    for left_over in (1.0, 0.3, 0.0):
        assert loaded.lr_schedule(left_over) == pytest.approx(float(expected(np.array(left_over))))
    loaded.learn(20, again, reset_num_timesteps=False)
    # the first transition of the new buffer cannot be learned from yet
    np.testing.assert_allclose(again.rates[2:], expected(1 - np.arange(22, 40) / 40), rtol=1e-6)


@pytest.mark.parametrize(
    "optimizer, kwargs",
    [
        (th.optim.Adam, None),
        (th.optim.Adam, dict(eps=1e-5)),
        (th.optim.AdamW, dict(weight_decay=0.1)),
        (th.optim.RMSprop, dict(momentum=0.5)),
        (th.optim.SGD, None),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_optimizers(optimizer: type[th.optim.Optimizer], kwargs: dict[str, Any] | None) -> None:
    model = agent(policy_kwargs=dict(optimizer_class=optimizer, optimizer_kwargs=kwargs))
    before = weights(model)
    model.learn(14)
    assert type(model.policy.optimizer) is optimizer and not th.equal(weights(model), before)
    # None: the paper's weight decay with Adam
    expected = dict(weight_decay=2e-5) if optimizer is th.optim.Adam and kwargs is None else kwargs or {}
    loaded = reload(model, env=vec_env())
    for one in (model, loaded):
        group = one.policy.optimizer.param_groups[0]
        assert {key: group[key] for key in expected} == expected
    assert str(loaded.policy.optimizer.state_dict()) == str(model.policy.optimizer.state_dict())
    loaded.learn(3, reset_num_timesteps=False)


def test_the_default_extractor_is_sb3s() -> None:
    network = agent(env=vec_env(observations=IMAGE, actions=DISCRETE), policy_kwargs=dict(state_dim=4)).policy.network
    assert isinstance(network, Ezv2Network) and isinstance(network.features_extractor, FlattenExtractor)
