"""Acting with other numbers of simulations, and without agent or search: saved policies and the exported policy head."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from common import BOX, TINY, SpacesEnv
from gymnasium import spaces

from sb3_ezv2 import EZV2, CnnPolicy, Ezv2Policy, MlpPolicy
from sb3_ezv2.distributions import SquashedGaussian
from sb3_ezv2.export import PolicyHead, export_policy_head

TINY_IMAGES = dict(channels=4, n_downsamples=2, net_arch=[8], head_channels=2, projection_dim=8, action_embedding_dim=4)
IMAGE = spaces.Box(0, 255, (12, 12, 1), np.uint8)
ACTIONS = {
    "discrete": spaces.Discrete(4, start=-1),
    "box": spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([3.0, 0.5], np.float32)),
    # of 18 actions 4 are candidates, of the other's 4 all
    "multi": spaces.MultiDiscrete([3, 1, 6], start=[5, 0, -2], dtype=np.int32),
    "binary": spaces.MultiBinary(2),
}
KINDS = pytest.mark.parametrize("kind", list(ACTIONS))


def agent(action_space: spaces.Space, observation_space: spaces.Space = BOX, noise: float = 0.3, **settings: Any) -> EZV2:
    """An agent with weights and statistics as after some training."""
    images = observation_space is not BOX and isinstance(observation_space, (spaces.Box, spaces.Dict))
    policy = ("MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "CnnPolicy") if images else "MlpPolicy"
    # The value head's size decides which random weights the others get: with these, actions differ between observations
    sizes = {**(TINY_IMAGES if images else TINY["policy_kwargs"]), "value_support": (22025.0, 101, "symexp")}
    model = EZV2(policy, SpacesEnv(observation_space, action_space), seed=0, **{**TINY, "policy_kwargs": sizes, **settings})
    generator = th.Generator().manual_seed(1)
    with th.no_grad():
        for parameter in model.policy.averaged_network.parameters():
            parameter.add_(noise * th.randn(parameter.shape, generator=generator))
    return model


def observations(space: spaces.Space, count: int = 6) -> Any:
    space.seed(5)
    drawn = [space.sample() for _ in range(count)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([x[key] for x in drawn]) for key in space.spaces}
    return np.stack(drawn)


def head_outputs(model: EZV2, obs: np.ndarray) -> th.Tensor:
    network = model.policy.averaged_network
    with th.no_grad():
        return network.policy_head(network.represent(th.as_tensor(obs)))


# ---------------------------------------------------------------------- n_simulations of a call


@KINDS
@pytest.mark.parametrize("n_simulations", [1, 2, 9])
def test_a_call_can_have_another_number_of_simulations(kind: str, n_simulations: int) -> None:
    model, obs = agent(ACTIONS[kind]), observations(BOX)
    other = agent(ACTIONS[kind], n_simulations=n_simulations)
    before, _ = model.predict(obs, deterministic=True)
    found, _ = model.predict(obs, deterministic=True, n_simulations=n_simulations)
    np.testing.assert_array_equal(found, other.predict(obs, deterministic=True)[0])
    # as a policy, one observation at a time (in float32 to the last digits), and with noise from the same seed
    one = model.policy.predict(obs[2], deterministic=True, n_simulations=n_simulations)[0]
    np.testing.assert_allclose(one, found[2], rtol=1e-4, atol=1e-5)
    th.manual_seed(3)
    noisy, _ = model.predict(obs, n_simulations=n_simulations)
    th.manual_seed(3)
    np.testing.assert_array_equal(noisy, other.predict(obs)[0])
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], before)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True, n_simulations=TINY["n_simulations"])[0], before)


@KINDS
def test_other_searches_leave_the_policys_own_search_alone(kind: str) -> None:
    model, obs = agent(ACTIONS[kind]), observations(BOX)
    model.predict(obs, deterministic=True)
    own = model.policy.search
    nodes, actions = own.last_tree()
    settings = own.settings
    for n_simulations in (0, 7, 2, 7):
        model.predict(obs[:4], deterministic=True, n_simulations=n_simulations)
    assert model.policy.search is own and own.settings == settings
    after, actions_after = own.last_tree()
    for name, array in nodes.items():
        np.testing.assert_array_equal(after[name], array)
    np.testing.assert_equal(actions_after, actions)
    assert model.policy.search_with(7) is model.policy.search_with(7) is not model.policy.search_with(2)
    assert model.policy.search_with() is own and model.policy.search_with(TINY["n_simulations"]) is own


@KINDS
@pytest.mark.parametrize("n_simulations", [None, 0, 3])
def test_deterministic_actions_depend_on_observation_and_weights_alone(kind: str, n_simulations: int | None) -> None:
    model, obs = agent(ACTIONS[kind]), observations(BOX)
    state = th.get_rng_state()
    first, _ = model.predict(obs, deterministic=True, n_simulations=n_simulations)
    assert th.equal(th.get_rng_state(), state)
    th.manual_seed(99)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True, n_simulations=n_simulations)[0], first)
    # a copy, whose searches are made anew
    twin = copy.deepcopy(model.policy)
    np.testing.assert_array_equal(twin.predict(obs, deterministic=True, n_simulations=n_simulations)[0], first)
    # and they follow the weights
    with th.no_grad():
        for parameter in (
            *model.policy.averaged_network.policy_head.parameters(),
            *model.policy.averaged_network.value_head.parameters(),
        ):
            parameter.neg_()
    assert not np.array_equal(model.predict(obs, deterministic=True, n_simulations=n_simulations)[0], first)


@KINDS
def test_without_simulations_the_policy_head_acts(kind: str) -> None:
    model, obs = agent(ACTIONS[kind]), observations(BOX, 50)
    head = head_outputs(model, obs).numpy()
    found, _ = model.predict(obs, deterministic=True, n_simulations=0)
    if kind == "discrete":
        expected = head.argmax(1) - 1
        assert len(np.unique(expected)) > 1
        np.testing.assert_array_equal(found, expected)
    elif kind in ("multi", "binary"):
        # a dimension at a time, with the space's own start and type
        dimensions = [head[:, :3], head[:, 3:4], head[:, 4:]] if kind == "multi" else [head[:, :2], head[:, 2:]]
        expected = np.column_stack([logits.argmax(1) for logits in dimensions])
        assert len(np.unique(expected, axis=0)) > 1
        np.testing.assert_array_equal(found, expected + np.array([5, 0, -2]) if kind == "multi" else expected)
        assert found.dtype == ACTIONS[kind].dtype and all(ACTIONS[kind].contains(action) for action in found)
    else:
        space = ACTIONS["box"]
        assert isinstance(space, spaces.Box)
        scaled = np.tanh(5 * np.tanh(head[:, :2] / 5))
        np.testing.assert_allclose(found, space.low + (scaled + 1) / 2 * (space.high - space.low), rtol=1e-5, atol=1e-6)


def test_without_simulations_actions_are_samples_of_the_policy() -> None:
    count = 20_000
    model = agent(ACTIONS["discrete"])
    obs = observations(BOX, 1)
    head = head_outputs(model, obs)
    th.manual_seed(0)
    actions, _ = model.predict(np.repeat(obs, count, axis=0), n_simulations=0)
    frequencies = np.bincount(actions + 1, minlength=4) / count
    probabilities = th.softmax(head[0], -1).numpy()
    assert probabilities.min() > 0.005
    # five standard errors of a frequency
    assert (np.abs(frequencies - probabilities) < 5 * np.sqrt(probabilities / count)).all()

    model = agent(ACTIONS["multi"])
    first, _, last = head_outputs(model, obs)[0].split([3, 1, 6])
    actions, _ = model.predict(np.repeat(obs, count, axis=0), n_simulations=0)
    # independent of each other: the joint frequencies of the two dimensions that have a choice
    frequencies = np.bincount((actions[:, 0] - 5) * 6 + actions[:, 2] + 2, minlength=18) / count
    probabilities = th.outer(th.softmax(first, -1), th.softmax(last, -1)).flatten().numpy()
    assert probabilities.max() > 2 * probabilities.min() and (actions[:, 1] == 0).all()
    assert (np.abs(frequencies - probabilities) < 5 * np.sqrt(probabilities / count)).all()

    model = agent(ACTIONS["box"])
    head = head_outputs(model, obs)
    actions, _ = model.predict(np.repeat(obs, count, axis=0), n_simulations=0)
    space, gaussian = ACTIONS["box"], SquashedGaussian(head)
    assert isinstance(space, spaces.Box)
    assert (actions >= space.low).all() and (actions <= space.high).all()
    # the median and the quartiles pass unharmed through tanh and its limits
    scaled = 2 * (actions - space.low) / (space.high - space.low) - 1
    for quantile, z in ((0.25, -0.6745), (0.5, 0.0), (0.75, 0.6745)):
        expected = th.tanh(gaussian.mean + z * gaussian.std)[0].numpy()
        np.testing.assert_allclose(np.quantile(scaled, quantile, axis=0), expected, atol=0.04)


@pytest.mark.parametrize("wrong", [-1, 2.0, True, "4"])
def test_a_wrong_number_of_simulations_is_refused(wrong: Any) -> None:
    model, obs = agent(ACTIONS["box"]), observations(BOX)
    before, _ = model.predict(obs, deterministic=True)
    with pytest.raises(ValueError, match=r"n_simulations must be an integer of at least 0 or None, not"):
        model.predict(obs, n_simulations=wrong)
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.predict(np.full((1, 3), np.nan, np.float32), n_simulations=0)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], before)


def test_broken_weights_are_told_without_a_search_too() -> None:
    model, obs = agent(ACTIONS["discrete"]), observations(BOX)
    with th.no_grad():
        next(model.policy.averaged_network.policy_head.parameters()).fill_(np.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.predict(obs, n_simulations=0)


# ---------------------------------------------------------------------- a policy without its agent


@pytest.mark.parametrize("observation_space", [BOX, IMAGE], ids=["state", "image"])
def test_a_saved_policy_searches_as_the_agent_does(observation_space: spaces.Space, tmp_path: Path) -> None:
    model = agent(ACTIONS["box"], observation_space)
    for network in model.policy.networks():
        network.set_reward_scale(7.0)
    obs = observations(observation_space)
    model.policy.save(str(tmp_path / "policy"))
    policy = (MlpPolicy if observation_space is BOX else CnnPolicy).load(str(tmp_path / "policy"), device="cpu")
    for n_simulations in (None, 0, 9):
        expected, _ = model.predict(obs, deterministic=True, n_simulations=n_simulations)
        np.testing.assert_array_equal(policy.predict(obs, deterministic=True, n_simulations=n_simulations)[0], expected)
    with pytest.raises(TypeError, match=r"MlpPolicy\.load"):
        Ezv2Policy.load(str(tmp_path / "policy"))


CASES = {
    "box to discrete": (BOX, ACTIONS["discrete"]),
    "discrete to box": (spaces.Discrete(5), ACTIONS["box"]),
    "multi-discrete to a float64 matrix": (spaces.MultiDiscrete([3, 4]), spaces.Box(-2.0, 3.0, (2, 2), np.float64)),
    "discrete to multi-discrete": (spaces.Discrete(5), ACTIONS["multi"]),
    "box to multi-binary": (BOX, ACTIONS["binary"]),
    "image to box": (IMAGE, ACTIONS["box"]),
    "dict to box": (spaces.Dict(image=IMAGE, box=BOX, code=spaces.Discrete(3)), ACTIONS["box"]),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_exported_head_acts_as_the_policy_without_a_search(case: str, tmp_path: Path) -> None:
    observation_space, action_space = CASES[case]
    model = agent(action_space, observation_space)
    env = model.get_env()
    assert env is not None
    obs = observations(env.observation_space)  # images with channels first
    expected, _ = model.predict(obs, deterministic=True, n_simulations=0)
    assert len(np.unique(expected, axis=0)) > 1
    export_policy_head(model.policy, tmp_path / "head.pt2")
    export_policy_head(model.policy, str(tmp_path / "head.pt"), format="torchscript")
    heads = [PolicyHead(model.policy), th.export.load(tmp_path / "head.pt2").module(), th.jit.load(tmp_path / "head.pt")]
    # they are copies
    with th.no_grad():
        for parameter in model.policy.averaged_network.parameters():
            parameter.zero_()
    for head in heads:
        for rows in (slice(0, 6), slice(3, 4)):
            tensors: Any = (
                {key: th.as_tensor(x[rows]) for key, x in obs.items()} if isinstance(obs, dict) else th.as_tensor(obs[rows])
            )
            found = head(tensors).numpy()
            assert found.dtype == expected.dtype and found.shape == expected[rows].shape
            np.testing.assert_allclose(found, expected[rows], rtol=1e-6, atol=2e-6)


def test_an_export_says_what_is_wrong() -> None:
    model = agent(ACTIONS["box"])
    with pytest.raises(ValueError, match=r"format must be one of 'torch.export', 'torchscript', not 'pickle'"):
        export_policy_head(model.policy, io.BytesIO(), format="pickle")
    with pytest.raises(TypeError, match=r"model\.policy"):
        export_policy_head(model, "head.pt")  # type: ignore[arg-type]
    file = io.BytesIO()
    export_policy_head(model.policy, file, format="torchscript")
    file.seek(0)
    assert th.jit.load(file)(th.zeros(3, 3)).shape == (3, 2)
