"""
The model for images: sizes of the paper, any size and number of channels, dictionaries, outputs before training, gradients.

Shapes: B rows, C planes, A action dimensions.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_ezv2 import image_networks
from sb3_ezv2.augmentation import AugmentedImages
from sb3_ezv2.distributions import CategoricalSupport, SupportSpec
from sb3_ezv2.image_networks import ConvBlock, ImageNetwork, image_tower
from sb3_ezv2.networks import PrefixHead, RunningNorm

ATARI = spaces.Box(0, 255, (12, 96, 96), np.uint8)
SMALL = spaces.Box(0, 255, (3, 20, 16), np.uint8)
MIXED = spaces.Dict(
    camera=SMALL,
    wrist=spaces.Box(0, 255, (1, 32, 32), np.uint8),
    speed=spaces.Box(-np.inf, np.inf, (2, 2), np.float32),
    gear=spaces.Discrete(3),
)
ACTION_SPACES = [spaces.Discrete(4), spaces.Box(-1.0, 1.0, (1,)), spaces.Box(-1.0, 1.0, (2, 3))]
H601 = SupportSpec(58705.58, 601, "h")


def make(space: spaces.Space = SMALL, action_space: spaces.Space = ACTION_SPACES[0], **settings: Any) -> ImageNetwork:
    """A small model with weights of its own."""
    defaults: dict[str, Any] = dict(
        net_arch=[16],
        channels=8,
        n_blocks=1,
        n_downsamples=2,
        head_channels=4,
        action_embedding_dim=4,
        projection_dim=12,
        value_support=SupportSpec(299.0, 51, "h"),
        reward_support=SupportSpec(2.0, 21, "h"),
    )
    th.manual_seed(0)
    return ImageNetwork(space, action_space, **{**defaults, **settings})


def paper_model(**settings: Any) -> ImageNetwork:
    """V1 App. A.1 for a game with 6 actions."""
    sizes = dict(net_arch=[32], channels=64, n_downsamples=4, head_channels=16, action_embedding_dim=16, projection_dim=512)
    supports = dict(value_support=H601, reward_support=H601, prefix_window=5, lstm_dim=512)
    return make(ATARI, spaces.Discrete(6), **{**sizes, **supports, **settings})


def sample(space: spaces.Space, count: int, seed: int = 0) -> Any:
    """Observations as tensors."""
    space.seed(seed)
    if isinstance(space, spaces.Dict):
        return {key: th.from_numpy(np.stack([member.sample() for _ in range(count)])) for key, member in space.spaces.items()}
    return th.from_numpy(np.stack([space.sample() for _ in range(count)]))


def actions_for(network: ImageNetwork, count: int) -> th.Tensor:
    return th.arange(count) % 4 if network.discrete else th.linspace(-1, 1, count)[:, None].expand(-1, network.action_dim)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --------------------------------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------------------------------


def test_the_papers_tower_stage_by_stage() -> None:
    """V1 App. A.1: planes and resolution after each layer that changes them."""
    found, x = [], th.zeros(2, 12, 96, 96)
    for layer in image_tower(12, 64, 1, 4):
        x = layer(x)
        if isinstance(layer, (nn.Conv2d, nn.AvgPool2d, ConvBlock)):
            found.append((type(layer).__name__, x.shape[1], x.shape[2]))
    block = "ConvBlock"
    assert found == [
        ("Conv2d", 32, 48), (block, 32, 48), (block, 64, 24), (block, 64, 24), ("AvgPool2d", 64, 12), (block, 64, 12),
        ("AvgPool2d", 64, 6), (block, 64, 6),
    ]  # fmt: skip


def test_the_papers_bins_are_the_integers_to_300() -> None:
    """In the transformed space; this is what a limit of 58705.58 means."""
    np.testing.assert_allclose(CategoricalSupport(H601).bins, np.arange(-300, 301), atol=1e-3)


def test_parts_of_the_papers_model() -> None:
    """Counted by hand: a convolution without bias has 9nm numbers (1x1: nm), a norm of n has 2n, a Linear nm + m."""
    network = paper_model()
    assert network.state_shape == (64, 6, 6) and network.state_dim == 2304

    def block(planes: int) -> int:
        return 2 * (9 * planes * planes + 2 * planes)

    def mlp(*widths: int) -> int:
        layers = list(itertools.pairwise(widths))
        return sum(n * m + m for n, m in layers) + sum(2 * m for _, m in layers[:-1])

    down = 9 * 32 * 64 + 2 * 64 + 9 * 64 * 64 + 2 * 64 + 9 * 32 * 64
    assert count(network.representation) == 9 * 12 * 32 + 64 + block(32) + down + 3 * block(64) + 2 * 2 * 64
    assert count(network.dynamics) == (6 * 16 + 16 + 32) + 9 * (64 + 16) * 64 + 2 * 64 + block(64)
    reduce, flat = 64 * 16 + 2 * 16, 16 * 36
    assert count(network.value_head) == block(64) + reduce + mlp(flat, 32, 601)
    assert count(network.policy_head) == block(64) + reduce + mlp(flat, 32, 6)
    lstm = 4 * 512 * (flat + 512) + 2 * 4 * 512
    assert isinstance(network.reward_head, PrefixHead) and network.reward_head.window == 5
    assert count(network.reward_head) == reduce + lstm + 2 * 512 + mlp(512, 32, 601)
    assert count(paper_model(prefix_window=0).reward_head) == reduce + mlp(flat, 32, 601)
    assert count(network.projection) == mlp(2304, 512, 512, 1024)
    assert count(network.projection_predictor) == mlp(1024, 512, 1024)


@pytest.mark.parametrize(
    "shape, downsamples, grid",
    [
        ((12, 96, 96), 4, (6, 6)),
        ((4, 84, 84), 4, (6, 6)),
        ((9, 64, 64), 4, (4, 4)),
        ((3, 210, 160), 4, (14, 10)),
        ((1, 48, 48), 3, (6, 6)),
        ((2, 17, 33), 4, (2, 3)),
        ((1, 11, 12), 2, (3, 3)),
        ((7, 9, 8), 1, (5, 4)),
    ],
    ids=str,
)
def test_any_size_and_number_of_channels(shape: tuple[int, int, int], downsamples: int, grid: tuple[int, int]) -> None:
    space = spaces.Box(0, 255, shape, np.uint8)
    network = make(space, n_downsamples=downsamples, n_blocks=2).eval()
    state, value, policy = network.initial_inference(sample(space, 3))
    assert state.shape == (3, 8, *grid) and network.state_shape == (8, *grid) and network.state_dim == 8 * grid[0] * grid[1]
    following, reward, value, policy = network.recurrent_inference(state, th.tensor([0, 1, 3]))
    assert following.shape == state.shape and reward.shape == value.shape == (3,) and policy.shape == (3, 4)
    assert network.project(state).shape == (3, 24)


# --------------------------------------------------------------------------------------------------------------------
# Outputs
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("space", [SMALL, MIXED], ids=["image", "dict"])
@pytest.mark.parametrize("action_space", ACTION_SPACES, ids=str)
def test_before_training_every_output_is_exactly_zero(action_space: spaces.Space, space: spaces.Space, training: bool) -> None:
    network = make(space, action_space).train(training)
    network.set_reward_scale(12.5)
    obs = sample(space, 9)
    state, value, policy = network.initial_inference(obs)
    assert (value == 0).all() and (policy == 0).all() and (network.values(obs) == 0).all()
    for _ in range(3):
        state, reward, value, policy = network.recurrent_inference(state, actions_for(network, 9))
        assert (reward == 0).all() and (value == 0).all() and (policy == 0).all()
    assert policy.shape == (9, network.action_dim if network.discrete else 2 * network.action_dim)


@pytest.mark.parametrize("action_space", ACTION_SPACES, ids=str)
def test_every_input_matters(action_space: spaces.Space) -> None:
    """Every image, vector and action changes the state, and every parameter has a gradient."""
    network = make(MIXED, action_space).train()
    obs = sample(MIXED, 6)
    network.update_statistics(obs, th.ones(6, dtype=th.bool))
    state = network.represent(obs)
    others = sample(MIXED, 6, seed=1)
    for key in obs:
        assert not th.allclose(network.represent({**obs, key: others[key]}), state), key
    actions = actions_for(network, 6)
    following = network.dynamics_step(state, actions)
    assert not th.allclose(network.dynamics_step(state, actions.flip(0)), following)
    for head in (network.value_head, network.reward_head, network.policy_head):
        nn.init.normal_(head.mlp[-1].weight)  # type: ignore[arg-type]
    predicted = network.projection_predictor(network.project(following))
    outputs = [head(following) for head in (network.value_head, network.reward_head, network.policy_head)]
    weights = [th.randn(x.shape) for x in (*outputs, predicted)]
    sum((w * x).sum() for w, x in zip(weights, (*outputs, predicted))).backward()  # type: ignore[union-attr]
    for name, parameter in network.named_parameters():
        # what a norm follows has no use for a bias
        assert parameter.grad is not None and (parameter.grad.abs().sum() > 0 or name.endswith("bias")), name


def test_embedding_of_the_action_is_a_convolution_of_constant_planes() -> None:
    """V2's 1x1 convolution over the action's planes, then a LayerNorm over the planes of each place, then ReLU."""
    network = make(action_space=ACTION_SPACES[2]).eval()
    embedding, state, action = network.dynamics.embedding, th.rand(5, 8, 5, 4), 2 * th.rand(5, 6) - 1
    linear, norm = embedding[0], embedding[1]
    assert isinstance(linear, nn.Linear)
    planes = action[:, :, None, None].expand(-1, -1, 5, 4)
    x = nn.functional.conv2d(planes, linear.weight[:, :, None, None], linear.bias)
    x = th.relu(norm(x.movedim(1, -1)).movedim(-1, 1))
    expected = network.dynamics.tower(th.relu(state + network.dynamics.joint(th.cat([state, x], 1))))
    th.testing.assert_close(network.dynamics_step(state, action), expected)


def test_many_images_go_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where batch norm has running statistics, and only there."""
    monkeypatch.setattr(image_networks, "PIECE", 3)
    tower, images = image_tower(2, 8, 1, 3), th.randint(256, (7, 2, 24, 20), dtype=th.uint8)
    rows: list[int] = []
    tower[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    tower(images)
    assert rows == [7]
    found = tower.eval()(images)
    assert rows == [7, 3, 3, 1]
    monkeypatch.setattr(image_networks, "PIECE", 7)
    th.testing.assert_close(found, tower(images))
    assert rows == [7, 3, 3, 1, 7]


def test_bytes_become_fractions_and_vectors_are_normalised() -> None:
    network = make(MIXED)
    obs = sample(MIXED, 5)
    seen: list[th.Tensor] = []
    first = next(iter(network.representation.towers[0].children()))
    first.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    network.represent(obs)
    network.represent({**obs, "camera": obs["camera"].float()})
    augmented: Any = {**obs, "camera": AugmentedImages(obs["camera"], th.ones(5, 1, 1, 1))}
    network.represent(augmented)
    for images in seen:
        assert images.dtype == th.float32 and th.equal(images, obs["camera"] / 255.0)
    assert len(seen) == 3
    factors = th.tensor([0.9, 1.0, 1.05, 1.1, 0.97])[:, None, None, None]
    augmented["camera"] = AugmentedImages(obs["camera"], factors)
    network.represent(augmented)
    assert th.equal(seen[3], obs["camera"] * factors / 255.0)
    prepared = network.preprocess(obs)
    features = network.representation.features(prepared)
    assert features.shape == (5, 4 + 3)
    normalizer = network.representation.normalizer
    assert isinstance(normalizer, RunningNorm) and normalizer.batches == 0
    network.update_statistics(obs, th.arange(5) < 3)
    th.testing.assert_close(normalizer.mean, features[:3].mean(0))
    # an image alone has no such statistics
    image = make()
    before = {name: x.clone() for name, x in image.state_dict().items()}
    image.update_statistics(sample(SMALL, 4), th.ones(4, dtype=th.bool))
    assert all(th.equal(x, before[name]) for name, x in image.state_dict().items())


@pytest.mark.parametrize("prefix_window", [0, 3])
def test_the_traced_step_is_the_step(prefix_window: int) -> None:
    network = make(prefix_window=prefix_window, lstm_dim=6).eval()
    for parameter in network.parameters():
        with th.no_grad():
            parameter.add_(0.2 * th.randn(parameter.shape))
    with th.no_grad():
        state, _, _ = network.initial_inference(sample(SMALL, 4))
        traced = th.jit.trace_module(network, {"recurrent_inference": (state, th.zeros(4, dtype=th.long))}, check_trace=False)
        for size in (4, 2):
            x = y = state[:size]
            for action in (0, 1, 2, 3):
                step = (th.full((size,), action),)
                found, expected = traced.recurrent_inference(x, *step), network.recurrent_inference(y, *step)
                for a, b in zip(found, expected):
                    th.testing.assert_close(a, b)
                x, y = found[0], expected[0]
