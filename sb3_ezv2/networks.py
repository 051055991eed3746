"""
The model for vector observations: representation, dynamics, reward, value, policy and projection (EfficientZero V2 App. G).

All modules are pre-LN residual towers. Shapes: B rows, F features of an observation, D = ``state_dim``, A action
dimensions (number of actions where they are discrete).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ezv2.distributions import CategoricalSupport, SupportSpec


class RunningNorm(nn.Module):
    """
    The running mean block of App. G: normalises by statistics of the observations of all training batches.

    Batch statistics are never used: an observation means the same in training and in search.
    The statistics are a plain mean over the first batches and follow slowly after that.

    :param features: F
    :param slowest_rate: least weight of a new batch
    """

    mean: th.Tensor
    var: th.Tensor
    batches: th.Tensor

    def __init__(self, features: int, slowest_rate: float = 1e-3):
        super().__init__()
        self.slowest_rate = slowest_rate
        self.register_buffer("mean", th.zeros(features))
        self.register_buffer("var", th.ones(features))
        self.register_buffer("batches", th.zeros(()))

    @th.no_grad()
    def update(self, x: th.Tensor) -> None:
        """:param x: [B, F]"""
        self.batches += 1
        rate = th.clamp(1 / self.batches, min=self.slowest_rate)
        delta = x.mean(0) - self.mean
        self.mean += rate * delta
        # variance of the mixture of the old distribution and the new batch
        self.var += rate * (x.var(0, correction=0) - self.var + (1 - rate) * delta * delta)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """:param x: [B, F] :return: [B, F], clipped to +-10 so that a rare feature cannot drown the others"""
        return ((x - self.mean) * th.rsqrt(self.var + 1e-5)).clamp(-10, 10)


class ResidualBlock(nn.Module):
    """x + W2 relu(W1 LN(x)). :param dim: width of x :param hidden: width between"""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x + self.branch(x)


class Head(nn.Module):
    """
    Residual block, LayerNorm, then an MLP with batch norm whose last layer starts at zero.

    :param state_dim: D
    :param net_arch: hidden widths of the MLP
    :param out: number of outputs
    """

    def __init__(self, state_dim: int, net_arch: Sequence[int], out: int):
        super().__init__()
        self.trunk = nn.Sequential(ResidualBlock(state_dim, net_arch[0]), nn.LayerNorm(state_dim))
        layers: list[nn.Module] = []
        for width_in, width_out in zip([state_dim, *net_arch], net_arch):
            layers += [nn.Linear(width_in, width_out), nn.BatchNorm1d(width_out), nn.ReLU()]
        last = nn.Linear(net_arch[-1], out)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(*layers, last)

    def forward(self, state: th.Tensor) -> th.Tensor:
        return self.mlp(self.trunk(state))


class Dynamics(nn.Module):
    """
    The next state from a state and an action: action embedding, one block over both, a tower, and the state's own
    residual link through all of it.

    :param action_dim: width of the encoded action
    :param state_dim: D
    :param hidden: hidden width of the blocks
    :param n_blocks: blocks of the tower
    :param embedding_dim: width of the action embedding
    """

    def __init__(self, action_dim: int, state_dim: int, hidden: int, n_blocks: int, embedding_dim: int):
        super().__init__()
        self.embedding = nn.Sequential(nn.Linear(action_dim, embedding_dim), nn.LayerNorm(embedding_dim), nn.ReLU())
        joint = state_dim + embedding_dim
        self.joint = nn.Sequential(nn.LayerNorm(joint), nn.Linear(joint, hidden), nn.ReLU(), nn.Linear(hidden, state_dim))
        self.tower = nn.Sequential(*[ResidualBlock(state_dim, hidden) for _ in range(n_blocks)])

    def forward(self, state: th.Tensor, action: th.Tensor) -> th.Tensor:
        return self.tower(state + self.joint(th.cat([state, self.embedding(action)], dim=-1)))


class Ezv2Network(nn.Module):
    """
    One model: H (:meth:`represent`), G (:meth:`dynamics_step`), R, V, P and the SimSiam projection.

    :param observation_space: of the environment
    :param action_space: ``Discrete``, or ``Box`` whose actions arrive flat and scaled to [-1, 1]
    :param features_extractor: from preprocessed observations to features [B, F]
    :param net_arch: hidden widths of the heads' MLPs; the first is the hidden width of all residual blocks, too
    :param state_dim: D, width of the latent state
    :param n_blocks: residual blocks of the representation and of the dynamics
    :param action_embedding_dim: width of the action embedding
    :param projection_dim: hidden width of the projection and of its predictor
    :param value_support: what the value head can express
    :param reward_support: what the reward head can express
    :param normalize_images: as in SB3's policies
    """

    one_hot: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        features_extractor: BaseFeaturesExtractor,
        net_arch: Sequence[int],
        state_dim: int,
        n_blocks: int,
        action_embedding_dim: int,
        projection_dim: int,
        value_support: SupportSpec,
        reward_support: SupportSpec,
        normalize_images: bool = True,
    ):
        super().__init__()
        self.observation_space = observation_space
        self.normalize_images = normalize_images
        self.state_dim = state_dim
        self.discrete = isinstance(action_space, spaces.Discrete)
        if isinstance(action_space, spaces.Discrete):
            self.action_dim = int(action_space.n)
            policy_outputs = self.action_dim
            self.register_buffer("one_hot", th.eye(self.action_dim), persistent=False)
        else:
            assert isinstance(action_space, spaces.Box)
            self.action_dim = int(th.tensor(action_space.shape).prod())
            policy_outputs = 2 * self.action_dim
        hidden = net_arch[0]
        self.features_extractor = features_extractor
        self.normalizer = RunningNorm(features_extractor.features_dim)
        self.representation = nn.Sequential(
            nn.Linear(features_extractor.features_dim, state_dim),
            nn.LayerNorm(state_dim),
            nn.Tanh(),
            *[ResidualBlock(state_dim, hidden) for _ in range(n_blocks)],
        )
        self.dynamics = Dynamics(self.action_dim, state_dim, hidden, n_blocks, action_embedding_dim)
        self.value_support = CategoricalSupport(value_support)
        self.reward_support = CategoricalSupport(reward_support)
        self.value_head = Head(state_dim, net_arch, self.value_support.size)
        self.reward_head = Head(state_dim, net_arch, self.reward_support.size)
        self.policy_head = Head(state_dim, net_arch, policy_outputs)
        self.projection = nn.Sequential(
            nn.Linear(state_dim, projection_dim),
            nn.BatchNorm1d(projection_dim),
            nn.ReLU(),
            nn.Linear(projection_dim, projection_dim),
            nn.BatchNorm1d(projection_dim),
            nn.ReLU(),
            nn.Linear(projection_dim, state_dim),
        )
        self.projection_predictor = nn.Sequential(
            nn.Linear(state_dim, projection_dim),
            nn.BatchNorm1d(projection_dim),
            nn.ReLU(),
            nn.Linear(projection_dim, state_dim),
        )

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """:param obs: [B, ...] as the environment gives them :return: [B, F] before normalisation"""
        return self.features_extractor(preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images))

    def represent(self, obs: PyTorchObs) -> th.Tensor:
        """H. :param obs: [B, ...] as the environment gives them :return: [B, D]"""
        return self.representation(self.normalizer(self.features(obs)))

    def dynamics_step(self, state: th.Tensor, action: th.Tensor) -> th.Tensor:
        """
        G.

        :param state: [B, D]
        :param action: int64 [B] or float [B, A]
        :return: next state [B, D]
        """
        if self.discrete:
            action = self.one_hot[action]
        return self.dynamics(state, action)

    def project(self, state: th.Tensor) -> th.Tensor:
        """P1 of Eq. 4. :param state: [B, D] :return: [B, D]"""
        return self.projection(state)

    def initial_inference(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param obs: [B, ...]
        :return: state [B, D], value [B] in the units of the rewards, output of the policy head [B, n] or [B, 2A]
        """
        state = self.represent(obs)
        return state, self.value_support.decode(self.value_head(state)), self.policy_head(state)

    def recurrent_inference(self, state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        :param state: [B, D]
        :param action: int64 [B] or float [B, A]
        :return: next state [B, D], reward [B], value of the next state [B], output of its policy head
        """
        state = self.dynamics_step(state, action)
        reward = self.reward_support.decode(self.reward_head(state))
        value = self.value_support.decode(self.value_head(state))
        return state, reward, value, self.policy_head(state)

    def values(self, obs: PyTorchObs) -> th.Tensor:
        """:param obs: [B, ...] :return: [B] values in the units of the rewards"""
        return self.value_support.decode(self.value_head(self.represent(obs)))

    def float_tensors(self) -> list[th.Tensor]:
        """:return: parameters and running statistics, in a fixed order"""
        return [x for x in [*self.parameters(), *self.buffers()] if x.is_floating_point()]

    def set_reward_scale(self, scale: float) -> None:
        """What one unit of the supports is worth, in the units of the rewards. :param scale: above 0"""
        self.value_support.scale.fill_(scale)
        self.reward_support.scale.fill_(scale)
