"""The policy: the networks of EfficientZero V2, their copies, the optimizer, and actions by search."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from sb3_ezv2.distributions import SupportSpec
from sb3_ezv2.networks import Ezv2Network
from sb3_ezv2.search import GumbelSearch, SearchResult, SearchSettings

DEFAULT_SUPPORT = SupportSpec(22025.0, 101, "symexp")
"""symlog +-10 in bins of 0.2, in units of the reward scale."""


class Ezv2Policy(BasePolicy):
    """
    Policy of EZV2: acts by a search with the model that it holds.

    It owns four copies of the model: ``network`` is trained and serves :meth:`predict`; ``acting_network`` collects data;
    ``target_network`` reanalyzes; ``bootstrap_network`` follows ``network`` slowly and ends the n-step windows.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param search_settings: of all searches, given by the algorithm
    :param net_arch: hidden widths of the heads; the first is the hidden width of all residual blocks, too
        (EfficientZero V2 App. G: [256])
    :param state_dim: width of the latent state (App. G: 128)
    :param n_blocks: residual blocks of the representation and of the dynamics (App. G: 3)
    :param action_embedding_dim: width of the action embedding (App. G: 64)
    :param projection_dim: hidden width of the consistency loss's projection and of its predictor
    :param value_support: (limit, bins, transform) of the value head, see :class:`sb3_ezv2.distributions.SupportSpec`
    :param reward_support: the same of the reward head
    :param reward_scale: what the supports' units are worth. ``"auto"``: the root mean square of the rewards collected
        before the first update, so that rewards of any scale are learned alike. The paper's supports are in raw units: 1.0
    :param search_dtype: ``"bfloat16"``: the matrix products of large searches are in bfloat16, where the processor has it;
        its effect on learning is not known
    :param features_extractor_class: Features extractor to use
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer;
        by default weight decay 2e-5 (Table 3) and, for the speed, ``fused``
    :raises ValueError: a setting out of its range
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        search_settings: SearchSettings | None = None,
        net_arch: list[int] | None = None,
        state_dim: int = 128,
        n_blocks: int = 3,
        action_embedding_dim: int = 64,
        projection_dim: int = 512,
        value_support: SupportSpec = DEFAULT_SUPPORT,
        reward_support: SupportSpec = DEFAULT_SUPPORT,
        reward_scale: float | str = "auto",
        search_dtype: str = "float32",
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            # fused: the update of many small tensors in one call
            optimizer_kwargs=dict(weight_decay=2e-5, fused=True) if optimizer_kwargs is None else optimizer_kwargs,
            squash_output=isinstance(action_space, spaces.Box),
        )
        self.search_settings = SearchSettings() if search_settings is None else search_settings
        self.net_arch = [256] if net_arch is None else net_arch
        self.state_dim = state_dim
        self.n_blocks = n_blocks
        self.action_embedding_dim = action_embedding_dim
        self.projection_dim = projection_dim
        self.value_support = value_support
        self.reward_support = reward_support
        self.reward_scale = reward_scale
        self.search_dtype = search_dtype
        self._check_settings()
        self.network = Ezv2Network(
            observation_space,
            action_space,
            self.make_features_extractor(),
            net_arch=self.net_arch,
            state_dim=state_dim,
            n_blocks=n_blocks,
            action_embedding_dim=action_embedding_dim,
            projection_dim=projection_dim,
            value_support=value_support,
            reward_support=reward_support,
            normalize_images=normalize_images,
        )
        if isinstance(reward_scale, (int, float)):
            self.network.set_reward_scale(reward_scale)
        self.acting_network = _frozen_copy(self.network)
        self.target_network = _frozen_copy(self.network)
        self.bootstrap_network = _frozen_copy(self.network)
        self.search = GumbelSearch(self.network, self.search_settings, bfloat16=search_dtype == "bfloat16")
        self.acting_search = GumbelSearch(self.acting_network, self.search_settings, bfloat16=search_dtype == "bfloat16")
        self.target_search = GumbelSearch(self.target_network, self.search_settings, bfloat16=search_dtype == "bfloat16")
        self.optimizer = self.optimizer_class(
            self.network.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def _check_settings(self) -> None:
        widths = self.net_arch
        if not isinstance(widths, (list, tuple)) or not widths or not all(isinstance(w, int) and w > 0 for w in widths):
            raise ValueError(f"net_arch must be a list of hidden widths such as [256], not {widths!r}")
        for name in ("state_dim", "n_blocks", "action_embedding_dim", "projection_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        scale = self.reward_scale
        if scale != "auto" and not (isinstance(scale, (int, float)) and 0 < scale < float("inf")):
            raise ValueError(f'reward_scale must be "auto" or a positive number, not {scale!r}')
        if self.search_dtype not in ("float32", "bfloat16"):
            raise ValueError(f'search_dtype must be "float32" or "bfloat16", not {self.search_dtype!r}')

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            lr_schedule=self._dummy_schedule,  # dummy lr schedule, not needed for loading policy alone
            search_settings=self.search_settings,
            net_arch=self.net_arch,
            state_dim=self.state_dim,
            n_blocks=self.n_blocks,
            action_embedding_dim=self.action_embedding_dim,
            projection_dim=self.projection_dim,
            value_support=self.value_support,
            reward_support=self.reward_support,
            reward_scale=self.reward_scale,
            search_dtype=self.search_dtype,
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
        )
        return data

    def set_training_mode(self, mode: bool) -> None:
        """Only the trained network has a training mode: its copies are always evaluated. :param mode: training or not"""
        self.training = mode
        if self.network.training != mode:
            self.network.train(mode)

    def networks(self) -> list[Ezv2Network]:
        """:return: the trained network and its copies"""
        return [self.network, self.acting_network, self.target_network, self.bootstrap_network]

    def forward(self, obs: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        return self._predict(obs, deterministic=deterministic)

    def act(self, obs: PyTorchObs, rng: np.random.Generator) -> SearchResult:
        """
        Search with the acting network, to collect data.

        :param obs: [B, ...] on the policy's device
        :param rng: of the search's noise
        :return: see :class:`sb3_ezv2.search.SearchResult`
        """
        return self.acting_search.run(obs, rng)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Search with the trained network.

        :param observation: [B, ...]
        :param deterministic: no noise: the result depends on the observation and the weights alone. Otherwise a search with
            noise as in training, from a stream that is seeded by torch's, which training itself does not use
        :return: int64 [B], or [B, A] in [-1, 1]
        :raises ValueError: an observation has NaN or infinite entries
        """
        tensors = observation.values() if isinstance(observation, dict) else [observation]
        if not all(th.isfinite(x).all() for x in tensors if x.is_floating_point()):
            raise ValueError("the observation has NaN or infinite entries: EZV2 cannot search from it")
        rng = None if deterministic else np.random.default_rng(int(th.randint(2**62, (1,))))
        return self.to_env_actions(self.search.run(observation, rng).best())

    def to_env_actions(self, actions: th.Tensor) -> th.Tensor:
        """:return: discrete actions with the space's own start; continuous ones are still in [-1, 1]"""
        if isinstance(self.action_space, spaces.Discrete):
            return actions + int(self.action_space.start)
        return actions


def _frozen_copy(network: Ezv2Network) -> Ezv2Network:
    return copy.deepcopy(network).requires_grad_(False).eval()


MlpPolicy = Ezv2Policy
