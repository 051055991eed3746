"""
What every model has in common, and the model for vector observations: representation, dynamics, reward, value, policy and
projection (EfficientZero V2 App. G).

The modules for vectors are pre-LN residual towers. Shapes: B rows, F features of an observation, D = ``state_dim``, A action
dimensions (number of actions where they are discrete; of MultiDiscrete ones the categories of all dimensions), U unroll steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ezv2.distributions import CategoricalSupport, SquashedGaussian, SupportSpec
from sb3_ezv2.multi_discrete import MultiCategorical, category_sizes
from sb3_ezv2.observations import apply


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


def batch_norm_mlp(width: int, net_arch: Sequence[int], out: int) -> nn.Sequential:
    """
    A head's MLP with batch norm whose last layer starts at zero.

    :param width: of the input
    :param net_arch: hidden widths
    :param out: number of outputs
    """
    layers: list[nn.Module] = []
    for width_in, width_out in zip([width, *net_arch], net_arch):
        layers += [nn.Linear(width_in, width_out), nn.BatchNorm1d(width_out), nn.ReLU()]
    last = nn.Linear(net_arch[-1], out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def projection_mlp(*widths: int) -> nn.Sequential:
    """An MLP with batch norm between every two layers (SimSiam). :param widths: from the input to the output"""
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(width_in, width_out), nn.BatchNorm1d(width_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


class Head(nn.Module):
    """
    A trunk from states to vectors, then an MLP with batch norm whose last layer starts at zero.

    :param trunk: from states to [B, width]
    :param width: of what the trunk gives
    :param net_arch: hidden widths of the MLP
    :param out: number of outputs
    """

    def __init__(self, trunk: nn.Sequential, width: int, net_arch: Sequence[int], out: int):
        super().__init__()
        self.trunk = trunk
        self.mlp = batch_norm_mlp(width, net_arch, out)

    def forward(self, state: th.Tensor) -> th.Tensor:
        return self.mlp(self.trunk(state))


class PrefixHead(nn.Module):
    """
    The value prefix (EfficientZero 4.2, App. A.1): an LSTM over the states of a window predicts the undiscounted sum of the
    window's rewards so far. Where it cannot be predicted at which of two steps a reward falls, their sum can still be known.

    :param trunk: from states to [B, width]
    :param width: of what the trunk gives
    :param lstm_dim: width of the LSTM
    :param window: steps after which the LSTM and the sum begin anew
    :param net_arch: hidden widths of the MLP
    :param out: number of outputs
    """

    def __init__(self, trunk: nn.Module, width: int, lstm_dim: int, window: int, net_arch: Sequence[int], out: int):
        super().__init__()
        self.lstm_dim = lstm_dim
        self.window = window
        self.trunk = trunk
        self.lstm = nn.LSTMCell(width, lstm_dim)
        self.norm = nn.Sequential(nn.BatchNorm1d(lstm_dim), nn.ReLU())
        self.mlp = batch_norm_mlp(lstm_dim, net_arch, out)

    def forward(self, states: th.Tensor) -> th.Tensor:
        """:param states: [U, B, ...], those after each step from a window's start :return: logits [U, B, out]"""
        inputs = self.trunk(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        start = inputs.new_zeros(inputs.shape[1], self.lstm_dim)
        hidden, outputs = (start, start), []
        for step, x in enumerate(inputs):
            hidden = self.lstm(x, (start, start) if step % self.window == 0 else hidden)
            outputs.append(hidden[0])
        return self.mlp(self.norm(th.cat(outputs))).unflatten(0, states.shape[:2])

    def step(self, state: th.Tensor, h: th.Tensor, c: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        One step of a search.

        :param state: [B, ...]
        :param h: [B, lstm_dim], output of the LSTM one step before
        :param c: [B, lstm_dim], its memory
        :return: logits [B, out], the new ``h`` and ``c``
        """
        h, c = self.lstm(self.trunk(state), (h, c))
        return self.mlp(self.norm(h)), h, c

    def targets(self, rewards: th.Tensor) -> th.Tensor:
        """:param rewards: [B, U] from a window's start :return: [B, U], sums from the start of each step's window"""
        return th.cat([part.cumsum(1) for part in rewards.split(self.window, dim=1)], dim=1)


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


class BaseNetwork(nn.Module):
    """
    One model: H (:meth:`represent`), G (:meth:`dynamics_step`), R, V, P and the SimSiam projection. Subclasses build the
    modules and say how observations become states.

    :param observation_space: of the environment
    :param action_space: ``Discrete``, ``MultiDiscrete`` or ``MultiBinary``, whose actions arrive counted from 0, or ``Box``,
        whose actions arrive flat and scaled to [-1, 1]
    :param normalize_images: as in SB3's policies
    """

    state_dim: int
    """Numbers of one state."""
    category_sizes: tuple[int, ...]
    """Of the dimensions of ``MultiDiscrete`` actions; otherwise empty."""
    one_hot: th.Tensor
    first_categories: th.Tensor
    value_support: CategoricalSupport
    reward_support: CategoricalSupport
    value_head: Head
    reward_head: Head | PrefixHead
    policy_head: Head
    dynamics: nn.Module
    projection: nn.Sequential
    projection_predictor: nn.Sequential
    observation_head: nn.Linear | None
    """From imagined states to what :meth:`observation_targets` gives of the observations; usually none."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, normalize_images: bool = True):
        super().__init__()
        self.observation_space = observation_space
        self.normalize_images = normalize_images
        self.observation_head = None
        self.discrete = isinstance(action_space, spaces.Discrete)
        self.category_sizes = category_sizes(action_space)
        if isinstance(action_space, spaces.Discrete):
            self.action_dim = int(action_space.n)
            self.policy_outputs = self.action_dim
            self.register_buffer("one_hot", th.eye(self.action_dim), persistent=False)
        elif self.category_sizes:
            self.action_dim = self.policy_outputs = sum(self.category_sizes)
            self.register_buffer("one_hot", th.eye(self.action_dim), persistent=False)
            first = th.tensor([0, *self.category_sizes[:-1]]).cumsum(0)  # [D], row of one_hot
            self.register_buffer("first_categories", first, persistent=False)
        else:
            assert isinstance(action_space, spaces.Box)
            self.action_dim = int(th.tensor(action_space.shape).prod())
            self.policy_outputs = 2 * self.action_dim

    def represent(self, obs: PyTorchObs) -> th.Tensor:
        """H. :param obs: [B, ...] as the environment gives them :return: states [B, ...]"""
        raise NotImplementedError

    def update_statistics(self, obs: PyTorchObs, observed: th.Tensor) -> None:
        """
        Take a training batch into what observations are normalised by.

        :param obs: [B, U + 1, ...] as the environment gives them
        :param observed: bool [B, U + 1], those that count
        """
        raise NotImplementedError

    def preprocess(self, obs: PyTorchObs) -> Any:
        """:param obs: [B, ...] as the environment gives them :return: floats, images in [0, 1], discrete ones one-hot"""
        return preprocess_obs(obs, self.observation_space, normalize_images=self.normalize_images)

    def dynamics_step(self, state: th.Tensor, action: th.Tensor) -> th.Tensor:
        """
        G.

        :param state: [B, ...]
        :param action: int64 [B], int64 [B, D] of D dimensions or float [B, A]
        :return: next state [B, ...]
        """
        if self.discrete:
            action = self.one_hot[action]
        elif self.category_sizes:
            action = self.one_hot[action + self.first_categories].sum(-2)
        return self.dynamics(state, action)

    def mode(self, policy: th.Tensor) -> th.Tensor:
        """
        The action of the policy head without noise: the likeliest one (of each dimension), or the squashed mean.

        :param policy: [B, policy_outputs], output of the policy head
        :return: int64 [B], int64 [B, D] of D dimensions or float [B, A] in (-1, 1)
        """
        if self.discrete:
            return policy.argmax(-1)
        if self.category_sizes:
            return MultiCategorical(policy, self.category_sizes).mode()
        return SquashedGaussian(policy).sample(policy.new_zeros(()))

    def project(self, state: th.Tensor) -> th.Tensor:
        """P1 of Eq. 4. :param state: [B, ...] :return: [B, width]"""
        return self.projection(state.flatten(1))

    def reward_logits(self, states: th.Tensor) -> th.Tensor:
        """
        :param states: [U, B, ...] after each step of an unroll
        :return: [U, B, bins] of the rewards, or with a value prefix of their sums
        """
        if isinstance(self.reward_head, PrefixHead):
            return self.reward_head(states)
        return self.reward_head(states.flatten(0, 1)).unflatten(0, states.shape[:2])

    def reward_targets(self, rewards: th.Tensor) -> th.Tensor:
        """:param rewards: [B, U] of an unroll :return: [B, U], what :meth:`reward_logits` shall tell"""
        return self.reward_head.targets(rewards) if isinstance(self.reward_head, PrefixHead) else rewards

    def initial_inference(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param obs: [B, ...]
        :return: what a search keeps of a state, [B, ...]; value [B] in the units of the rewards; output of the policy head
            [B, A], or [B, 2A] of Box actions. With a value prefix a search keeps [state, h, c, sum, steps] in one row: flat,
            so that the search need not know it.
        """
        state = self.represent(obs)
        value, policy = self.value_support.decode(self.value_head(state)), self.policy_head(state)
        if isinstance(self.reward_head, PrefixHead):
            state = th.cat([state.flatten(1), state.new_zeros(len(state), 2 * self.reward_head.lstm_dim + 2)], dim=1)
        return state, value, policy

    def recurrent_inference(self, state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        :param state: [B, ...] as :meth:`initial_inference` gives it
        :param action: as in :meth:`dynamics_step`
        :return: next state [B, ...], reward [B], value of the next state [B], output of its policy head
        """
        if isinstance(self.reward_head, PrefixHead):
            return self._recurrent_prefix(self.reward_head, state, action)
        state = self.dynamics_step(state, action)
        reward = self.reward_support.decode(self.reward_head(state))
        value = self.value_support.decode(self.value_head(state))
        return state, reward, value, self.policy_head(state)

    def _recurrent_prefix(
        self, head: PrefixHead, packed: th.Tensor, action: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """The reward of a step is the difference of two sums; where the window has just begun, the sum itself."""
        width = packed.shape[1] - 2 * head.lstm_dim - 2
        state, h, c, before, steps = packed.split([width, head.lstm_dim, head.lstm_dim, 1, 1], dim=1)
        state = self.dynamics_step(state.unflatten(1, self.state_shape), action)
        logits, h, c = head.step(state, h, c)
        prefix = self.reward_support.decode(logits).unsqueeze(1)
        steps = steps + 1
        # After the window's last step everything begins anew
        goes_on = (steps < head.window).to(state.dtype)
        packed = th.cat([state.flatten(1), th.cat([h, c, prefix, steps], dim=1) * goes_on], dim=1)
        value = self.value_support.decode(self.value_head(state))
        return packed, (prefix - before).squeeze(1), value, self.policy_head(state)

    def observation_targets(self, obs: PyTorchObs) -> th.Tensor:
        """:param obs: [B, ...] :return: [B, F], what :attr:`observation_head` shall predict from the states that follow"""
        raise NotImplementedError

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of one state."""
        raise NotImplementedError

    def values(self, obs: PyTorchObs) -> th.Tensor:
        """:param obs: [B, ...] :return: [B] values in the units of the rewards"""
        return self.value_support.decode(self.value_head(self.represent(obs)))

    def float_tensors(self) -> list[th.Tensor]:
        """:return: parameters and running statistics, in a fixed order"""
        return [x for x in [*self.parameters(), *self.buffers()] if x.is_floating_point()]

    def is_untrained(self) -> bool:
        """:return: every value and reward is still 0, in whatever unit"""
        return not any(bool(x.any()) for head in (self.value_head, self.reward_head) for x in head.mlp[-1].parameters())

    def set_reward_scale(self, scale: float) -> None:
        """What one unit of the supports is worth, in the units of the rewards. :param scale: above 0"""
        self.value_support.scale.fill_(scale)
        self.reward_support.scale.fill_(scale)


class Ezv2Network(BaseNetwork):
    """
    The model for vectors.

    :param observation_space: of the environment
    :param action_space: as in :class:`BaseNetwork`
    :param features_extractor: from preprocessed observations to features [B, F]
    :param net_arch: hidden widths of the heads' MLPs; the first is the hidden width of all residual blocks, too
    :param state_dim: D, width of the latent state
    :param n_blocks: residual blocks of the representation and of the dynamics
    :param action_embedding_dim: width of the action embedding
    :param projection_dim: hidden width of the projection and of its predictor
    :param value_support: what the value head can express
    :param reward_support: what the reward head can express
    :param normalize_images: as in SB3's policies
    :param prefix_window: steps of a window of the value prefix; 0: the reward head predicts rewards
    :param lstm_dim: width of the value prefix's LSTM
    :param predicts_observations: there is an :attr:`observation_head`
    """

    dynamics: Dynamics

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
        prefix_window: int = 0,
        lstm_dim: int = 512,
        predicts_observations: bool = False,
    ):
        super().__init__(observation_space, action_space, normalize_images)
        self.state_dim = state_dim
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

        def trunk() -> nn.Sequential:
            return nn.Sequential(ResidualBlock(state_dim, hidden), nn.LayerNorm(state_dim))

        self.value_head = Head(trunk(), state_dim, net_arch, self.value_support.size)
        if prefix_window > 0:
            self.reward_head = PrefixHead(trunk(), state_dim, lstm_dim, prefix_window, net_arch, self.reward_support.size)
        else:
            self.reward_head = Head(trunk(), state_dim, net_arch, self.reward_support.size)
        self.policy_head = Head(trunk(), state_dim, net_arch, self.policy_outputs)
        self.projection = projection_mlp(state_dim, projection_dim, projection_dim, state_dim)
        self.projection_predictor = projection_mlp(state_dim, projection_dim, state_dim)
        if predicts_observations:
            self.observation_head = nn.Linear(state_dim, features_extractor.features_dim)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.state_dim,)

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """:param obs: [B, ...] as the environment gives them :return: [B, F] before normalisation"""
        return self.features_extractor(self.preprocess(obs))

    def represent(self, obs: PyTorchObs) -> th.Tensor:
        return self.representation(self.normalizer(self.features(obs)))

    def observation_targets(self, obs: PyTorchObs) -> th.Tensor:
        return self.normalizer(self.features(obs))

    def update_statistics(self, obs: PyTorchObs, observed: th.Tensor) -> None:
        with th.no_grad():
            self.normalizer.update(self.features(apply(lambda x: x[observed], obs)))
