"""
The model for images (EfficientZero App. A.1 with the action embedding of EfficientZero V2), alone or beside vectors.

All convolutions are 3x3 unless they say otherwise. Shapes: B rows, C = ``channels`` planes of a state, h x w its grid, A
action dimensions (number of actions where they are discrete; of MultiDiscrete ones the categories of all dimensions).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ezv2.augmentation import AugmentedImages
from sb3_ezv2.distributions import CategoricalSupport, SupportSpec
from sb3_ezv2.networks import BaseNetwork, Head, PrefixHead, RunningNorm, projection_mlp

PIECE = 256
"""Images that are encoded at once where batch norm has running statistics."""


def conv3x3(planes_in: int, planes_out: int, stride: int = 1) -> nn.Conv2d:
    """Without bias, since a norm follows. :param stride: 2 halves the resolution, rounded up"""
    conv = nn.Conv2d(planes_in, planes_out, 3, stride, padding=1, bias=False)
    # A quarter faster on a CPU with the planes of a pixel side by side, as tensor cores like them, too
    conv.weight = nn.Parameter(conv.weight.detach().contiguous(memory_format=th.channels_last))
    return conv


class ConvBlock(nn.Module):
    """
    A residual block: relu(skip(x) + BN(conv(relu(BN(conv(x)))))).

    :param planes_in: planes of x
    :param planes_out: planes of the result; where they differ from x's the skip is a convolution
    :param stride: of the first convolution and of the skip
    """

    def __init__(self, planes_in: int, planes_out: int, stride: int = 1):
        super().__init__()
        self.branch = nn.Sequential(
            conv3x3(planes_in, planes_out, stride),
            nn.BatchNorm2d(planes_out),
            nn.ReLU(),
            conv3x3(planes_out, planes_out),
            nn.BatchNorm2d(planes_out),
        )
        same = planes_in == planes_out and stride == 1
        self.skip = nn.Identity() if same else conv3x3(planes_in, planes_out, stride)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return th.relu(self.skip(x) + self.branch(x))


class ImageTower(nn.Sequential):
    """
    Layers that see pixels in [0, 1]. Here they are scaled, so that the scaled images, the largest tensor of an update, are
    forgotten after the first layer. Where rows do not depend on one another, so outside of training, :data:`PIECE` of them go
    through at a time.
    """

    def forward(self, images: th.Tensor | AugmentedImages) -> th.Tensor:
        """:param images: [B, planes, height, width], bytes or floats in [0, 255], or such images with factors"""
        if isinstance(images, AugmentedImages):
            # The convolutions want this order; it is cheaper to bring bytes into it than floats
            ordered = AugmentedImages(images.images.contiguous(memory_format=th.channels_last), images.factors)
            return super().forward(ordered.floats().div_(255.0))
        # An exported program takes batches of any size: it has no pieces
        if self.training or th.compiler.is_exporting() or len(images) <= PIECE:
            return super().forward(images.contiguous(memory_format=th.channels_last) / 255.0)
        return th.cat([self(piece) for piece in images.split(PIECE)])


def image_tower(planes_in: int, channels: int, n_blocks: int, n_downsamples: int) -> ImageTower:
    """
    From images to states. With four halvings this is V1 App. A.1: 96x96 becomes 48, 24, 12, 6. Fewer leave out the last
    average pools, and with a single one the second stage keeps the resolution.

    :param planes_in: planes of the image, all frames of a stack together
    :param channels: C; the first stage has half as many
    :param n_blocks: residual blocks per stage
    :param n_downsamples: halvings of the resolution, rounded up
    """
    half = channels // 2
    layers: list[nn.Module] = [conv3x3(planes_in, half, 2), nn.BatchNorm2d(half), nn.ReLU()]
    layers += [ConvBlock(half, half) for _ in range(n_blocks)]
    layers += [ConvBlock(half, channels, 2 if n_downsamples > 1 else 1)]
    layers += [ConvBlock(channels, channels) for _ in range(n_blocks)]
    for _ in range(n_downsamples - 2):
        pool = nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)
        layers += [pool, nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [ConvBlock(channels, channels) for _ in range(n_blocks)]
    return ImageTower(*layers)


def grid_size(size: int, n_downsamples: int) -> int:
    """:param size: height or width of an image :return: what :func:`image_tower` makes of it"""
    for _ in range(n_downsamples):
        size = (size + 1) // 2
    return size


class ConvDynamics(nn.Module):
    """
    The next state from a state and an action: the action's embedding joins the state as constant planes, one convolution
    with the state's own residual link, then a tower.

    A 1x1 convolution of an action's constant planes gives constant planes, so the embedding is computed once and spread.

    :param action_dim: A
    :param channels: C
    :param n_blocks: residual blocks of the tower
    :param embedding_dim: planes of the action's embedding
    """

    def __init__(self, action_dim: int, channels: int, n_blocks: int, embedding_dim: int):
        super().__init__()
        self.embedding = nn.Sequential(nn.Linear(action_dim, embedding_dim), nn.LayerNorm(embedding_dim), nn.ReLU())
        self.joint = nn.Sequential(conv3x3(channels + embedding_dim, channels), nn.BatchNorm2d(channels))
        self.tower = nn.Sequential(*[ConvBlock(channels, channels) for _ in range(n_blocks)])

    def forward(self, state: th.Tensor, action: th.Tensor) -> th.Tensor:
        planes = self.embedding(action)[:, :, None, None].expand(-1, -1, *state.shape[2:])
        return self.tower(th.relu(state + self.joint(th.cat([state, planes], dim=1))))


class ImageRepresentation(nn.Module):
    """
    From preprocessed observations (images in [0, 255]) to states [B, C, h, w].

    An image alone goes through :func:`image_tower`. Of a ``Dict`` each image has a tower of its own, whose result is pooled to
    the grid of the first image; all vectors together (normalised by running statistics) become C constant planes;
    a 1x1 convolution and residual blocks join them.

    :param observation_space: an image (channels first), or a ``Dict`` with at least one
    :param channels: C
    :param n_blocks: residual blocks per stage
    :param n_downsamples: halvings of the resolution
    """

    def __init__(self, observation_space: spaces.Space, channels: int, n_blocks: int, n_downsamples: int):
        super().__init__()
        self.alone = not isinstance(observation_space, spaces.Dict)
        members = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"image": observation_space}
        images = {key: space for key, space in members.items() if is_image_space(space)}
        self.vector_keys = [key for key in members if key not in images]
        shapes = [space.shape for space in images.values()]
        assert shapes and shapes[0] is not None
        self.grid = (grid_size(shapes[0][1], n_downsamples), grid_size(shapes[0][2], n_downsamples))
        # a ModuleDict has no keys with dots, an observation space may
        self.image_keys = list(images)
        self.towers = nn.ModuleList(image_tower(shape[0], channels, n_blocks, n_downsamples) for shape in shapes if shape)
        self.to_grid = nn.AdaptiveAvgPool2d(self.grid)
        if self.vector_keys:
            features = sum(get_flattened_obs_dim(members[key]) for key in self.vector_keys)
            self.normalizer = RunningNorm(features)
            self.vectors = nn.Sequential(nn.Linear(features, channels), nn.LayerNorm(channels), nn.ReLU())
        if not self.alone:
            planes = channels * (len(images) + bool(self.vector_keys))
            joint = [nn.Conv2d(planes, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            self.join = nn.Sequential(*joint, *[ConvBlock(channels, channels) for _ in range(n_blocks)])

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """:param obs: preprocessed :return: [B, F], all vectors"""
        assert isinstance(obs, dict)
        return th.cat([obs[key].flatten(1) for key in self.vector_keys], dim=1)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        if self.alone:
            return self.towers[0](obs)
        assert isinstance(obs, dict)
        parts = [self.to_grid(tower(obs[key])) for key, tower in zip(self.image_keys, self.towers)]
        if self.vector_keys:
            vectors = self.vectors(self.normalizer(self.features(obs)))
            parts.append(vectors[:, :, None, None].expand(-1, -1, *self.grid))
        return self.join(th.cat(parts, dim=1))


class ImageNetwork(BaseNetwork):
    """
    The model for images.

    :param observation_space: a uint8 image [planes, height, width], or a ``Dict`` with at least one
    :param action_space: as in :class:`sb3_ezv2.networks.BaseNetwork`
    :param net_arch: hidden widths of the heads' MLPs
    :param channels: C, planes of a state
    :param n_blocks: residual blocks of each stage of the representation, and of the dynamics
    :param n_downsamples: halvings of the resolution
    :param head_channels: planes that the heads make of a state's
    :param action_embedding_dim: planes of the action's embedding
    :param projection_dim: hidden width of the projection and of its predictor; their results are twice as wide
    :param value_support: what the value head can express
    :param reward_support: what the reward head can express
    :param prefix_window: steps of a window of the value prefix; 0: the reward head predicts rewards
    :param lstm_dim: width of the value prefix's LSTM
    """

    dynamics: ConvDynamics

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        net_arch: Sequence[int],
        channels: int,
        n_blocks: int,
        n_downsamples: int,
        head_channels: int,
        action_embedding_dim: int,
        projection_dim: int,
        value_support: SupportSpec,
        reward_support: SupportSpec,
        prefix_window: int = 0,
        lstm_dim: int = 512,
    ):
        super().__init__(observation_space, action_space)
        self.channels = channels
        self.representation = ImageRepresentation(observation_space, channels, n_blocks, n_downsamples)
        self.dynamics = ConvDynamics(self.action_dim, channels, n_blocks, action_embedding_dim)
        self.value_support = CategoricalSupport(value_support)
        self.reward_support = CategoricalSupport(reward_support)
        height, width = self.representation.grid
        features = head_channels * height * width

        def trunk(blocks: int) -> nn.Sequential:
            reduce = [
                nn.Conv2d(channels, head_channels, 1, bias=False),
                nn.BatchNorm2d(head_channels),
                nn.ReLU(),
                nn.Flatten(),
            ]
            return nn.Sequential(*[ConvBlock(channels, channels) for _ in range(blocks)], *reduce)

        self.value_head = Head(trunk(1), features, net_arch, self.value_support.size)
        if prefix_window > 0:
            self.reward_head = PrefixHead(trunk(0), features, lstm_dim, prefix_window, net_arch, self.reward_support.size)
        else:
            self.reward_head = Head(trunk(0), features, net_arch, self.reward_support.size)
        self.policy_head = Head(trunk(1), features, net_arch, self.policy_outputs)
        self.state_dim = channels * height * width
        self.projection = projection_mlp(self.state_dim, projection_dim, projection_dim, 2 * projection_dim)
        self.projection_predictor = projection_mlp(2 * projection_dim, projection_dim, 2 * projection_dim)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.channels, *self.representation.grid)

    def preprocess(self, obs: PyTorchObs) -> PyTorchObs:
        """:param obs: [B, ...] as the environment gives them :return: images as they are; floats, discrete ones one-hot"""
        if not isinstance(obs, dict):
            return obs
        vectors = {key: obs[key] for key in self.representation.vector_keys}
        return {**obs, **super().preprocess(vectors)}

    def represent(self, obs: PyTorchObs) -> th.Tensor:
        return self.representation(self.preprocess(obs))

    def update_statistics(self, obs: PyTorchObs, observed: th.Tensor) -> None:
        keys = self.representation.vector_keys
        if keys:
            assert isinstance(obs, dict)
            with th.no_grad():
                vectors = self.preprocess({key: obs[key][observed] for key in keys})
                self.representation.normalizer.update(self.representation.features(vectors))
