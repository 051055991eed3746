"""The policies of EfficientZero V2: for vectors, for images, and for dictionaries of both."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import Schedule

from sb3_ezv2.augmentation import augment
from sb3_ezv2.base_policy import Ezv2Policy
from sb3_ezv2.distributions import DEFAULT_REWARD_SUPPORT, DEFAULT_VALUE_SUPPORT, SupportSpec
from sb3_ezv2.image_networks import ImageNetwork
from sb3_ezv2.networks import BaseNetwork, Ezv2Network
from sb3_ezv2.search import SearchSettings
from sb3_ezv2.validation import check_images, check_vectors, has_images


class MlpPolicy(Ezv2Policy):
    """
    Policy of EZV2 for vectors, and as ``MultiInputPolicy`` for dictionaries of them: the networks of EfficientZero V2 App. G.

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
    :param reward_scale: reward per unit of the supports. ``"auto"``: the root mean square of the rewards collected
        before the first update, so that rewards of any scale are learned alike. The paper's supports are in raw units: 1.0
    :param value_prefix: predict sums of rewards in windows of 5 steps by an LSTM (EfficientZero 4.2) instead of rewards
    :param lstm_dim: width of that LSTM (EfficientZero App. A.1: 512)
    :param search_dtype: ``"bfloat16"``: matrix products of large searches in bfloat16, where the processor has it;
        its effect on learning is not known
    :param train_dtype: ``"bfloat16"``: matrix products and convolutions of training in bfloat16 (autocast), where the
        processor has it; weights, losses and the optimizer stay float32
    :param train_compile: ``"default"`` or another mode of :func:`torch.compile`: training with a compiled model, which rounds
        otherwise. None: not compiled
    :param predicts_observations: a head predicts observations from imagined states; given by the algorithm, see there
        ``observation_coef``
    :param features_extractor_class: Features extractor to use; None: ``FlattenExtractor``, or of ``Dict`` observations
        ``CombinedExtractor``, which flattens and joins them
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer;
        by default, for ``th.optim.Adam``, weight decay 2e-5 (Table 3) and, for the speed, ``fused``
    :raises ValueError: a setting out of its range, or a ``Dict`` with an image
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
        value_support: SupportSpec = DEFAULT_VALUE_SUPPORT,
        reward_support: SupportSpec = DEFAULT_REWARD_SUPPORT,
        reward_scale: float | str = "auto",
        value_prefix: bool = False,
        lstm_dim: int = 512,
        search_dtype: str = "float32",
        train_dtype: str = "float32",
        train_compile: str | None = None,
        predicts_observations: bool = False,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ):
        if features_extractor_class is None:
            features_extractor_class = CombinedExtractor if isinstance(observation_space, spaces.Dict) else FlattenExtractor
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            search_settings,
            sizes=dict(
                state_dim=state_dim,
                n_blocks=n_blocks,
                action_embedding_dim=action_embedding_dim,
                projection_dim=projection_dim,
            ),
            net_arch=[256] if net_arch is None else net_arch,
            value_support=value_support,
            reward_support=reward_support,
            reward_scale=reward_scale,
            value_prefix=value_prefix,
            lstm_dim=lstm_dim,
            search_dtype=search_dtype,
            train_dtype=train_dtype,
            train_compile=train_compile,
            predicts_observations=predicts_observations,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _check_settings(self) -> None:
        super()._check_settings()
        if isinstance(self.observation_space, spaces.Dict):
            if issubclass(self.features_extractor_class, FlattenExtractor):
                raise ValueError("FlattenExtractor is not for Dict observations: leave features_extractor_class out.")
            if self.features_extractor_class is CombinedExtractor:
                check_vectors(self.observation_space)

    def _make_network(self) -> BaseNetwork:
        extractor = self.make_features_extractor()
        if self.predicts_observations and any(True for _ in extractor.parameters()):
            raise ValueError(
                f"observation_coef is for features that stay what they are, but {type(extractor).__name__} learns: "
                "use observation_coef=0."
            )
        return Ezv2Network(
            self.observation_space,
            self.action_space,
            extractor,
            net_arch=self.net_arch,
            value_support=self.value_support,
            reward_support=self.reward_support,
            normalize_images=self.normalize_images,
            prefix_window=self.prefix_window,
            lstm_dim=self.lstm_dim,
            predicts_observations=self.predicts_observations,
            **self.sizes,
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            predicts_observations=self.predicts_observations,
        )
        return data


class CnnPolicy(Ezv2Policy):
    """
    Policy of EZV2 for images, and as ``MultiInputPolicy`` for dictionaries with at least one image: the networks of
    EfficientZero App. A.1 with the action embedding of EfficientZero V2, and random shifts and intensities in training.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param search_settings: of all searches, given by the algorithm
    :param net_arch: hidden widths of the heads (App. A.1: [32])
    :param channels: planes of the latent state, even; the representation begins with half as many (App. A.1: 64)
    :param n_blocks: residual blocks of each stage of the representation and of the dynamics (App. A.1: 1)
    :param n_downsamples: halvings of the resolution: with 4 (App. A.1) 96x96 and 84x84 become 6x6; small images need fewer
    :param head_channels: planes that the heads make of the state's (App. A.1: 16)
    :param action_embedding_dim: planes of the action embedding
    :param projection_dim: hidden width of the consistency loss's projection and of its predictor, whose results are twice as
        wide (App. A.1: 512 and 1024)
    :param value_support: (limit, bins, transform) of the value head, see :class:`sb3_ezv2.distributions.SupportSpec`
    :param reward_support: the same of the reward head
    :param reward_scale: reward per unit of the supports. ``"auto"``: the root mean square of the rewards collected
        before the first update, so that rewards of any scale are learned alike. The paper's supports are in raw units: 1.0
    :param value_prefix: predict sums of rewards in windows of 5 steps by an LSTM (EfficientZero 4.2) instead of rewards
    :param lstm_dim: width of that LSTM (App. A.1: 512)
    :param search_dtype: ``"bfloat16"``: matrix products of large searches in bfloat16, where the processor has it;
        its effect on learning is not known
    :param train_dtype: ``"bfloat16"``: matrix products and convolutions of training in bfloat16 (autocast), where the
        processor has it; weights, losses and the optimizer stay float32
    :param train_compile: ``"default"`` or another mode of :func:`torch.compile`: training with a compiled model, which rounds
        otherwise. None: not compiled
    :param random_shift: largest shift of a training image in pixels; 0: none
    :param random_intensity: standard deviation of the factor of a training image's intensity; 0: none
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer;
        by default, for ``th.optim.Adam``, weight decay 2e-5 and, for the speed, ``fused``
    :raises ValueError: a setting out of its range, observations that are no images or too small ones
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        search_settings: SearchSettings | None = None,
        net_arch: list[int] | None = None,
        channels: int = 64,
        n_blocks: int = 1,
        n_downsamples: int = 4,
        head_channels: int = 16,
        action_embedding_dim: int = 16,
        projection_dim: int = 512,
        value_support: SupportSpec = DEFAULT_VALUE_SUPPORT,
        reward_support: SupportSpec = DEFAULT_REWARD_SUPPORT,
        reward_scale: float | str = "auto",
        value_prefix: bool = False,
        lstm_dim: int = 512,
        search_dtype: str = "float32",
        train_dtype: str = "float32",
        train_compile: str | None = None,
        random_shift: int = 4,
        random_intensity: float = 0.05,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ):
        self.random_shift = random_shift
        self.random_intensity = random_intensity
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            search_settings,
            sizes=dict(
                channels=channels,
                n_blocks=n_blocks,
                n_downsamples=n_downsamples,
                head_channels=head_channels,
                action_embedding_dim=action_embedding_dim,
                projection_dim=projection_dim,
            ),
            net_arch=[32] if net_arch is None else net_arch,
            value_support=value_support,
            reward_support=reward_support,
            reward_scale=reward_scale,
            value_prefix=value_prefix,
            lstm_dim=lstm_dim,
            search_dtype=search_dtype,
            train_dtype=train_dtype,
            train_compile=train_compile,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _check_settings(self) -> None:
        super()._check_settings()
        if self.sizes["channels"] % 2 != 0:
            raise ValueError(f"channels must be even, not {self.sizes['channels']}")
        if isinstance(self.random_shift, bool) or not isinstance(self.random_shift, int) or self.random_shift < 0:
            raise ValueError(f"random_shift must be a number of pixels, 0 or more, not {self.random_shift!r}")
        if not isinstance(self.random_intensity, (int, float)) or not 0 <= self.random_intensity < 0.5:
            raise ValueError(f"random_intensity must be at least 0 and below 0.5, not {self.random_intensity!r}")
        check_images(self.observation_space, self.sizes["n_downsamples"])

    def _make_network(self) -> BaseNetwork:
        return ImageNetwork(
            self.observation_space,
            self.action_space,
            net_arch=self.net_arch,
            value_support=self.value_support,
            reward_support=self.reward_support,
            prefix_window=self.prefix_window,
            lstm_dim=self.lstm_dim,
            **self.sizes,
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(random_shift=self.random_shift, random_intensity=self.random_intensity)
        del data["normalize_images"]  # they always are
        return data

    def augment(self, obs: Any, rng: np.random.Generator) -> Any:
        return augment(obs, self.observation_space, self.random_shift, self.random_intensity, rng)


MultiInputPolicy = CnnPolicy
"""Where no observation of a ``Dict`` is an image, :class:`~sb3_ezv2.EZV2` takes :class:`MlpPolicy` instead."""


def policy_for(policy: type[BasePolicy], observation_space: spaces.Space) -> type[BasePolicy]:
    """
    :param policy: that was asked for
    :param observation_space: of the environment
    :return: the policy to take: of ``MultiInputPolicy`` the one with the networks for the dictionary's members
    """
    if policy is MultiInputPolicy and isinstance(observation_space, spaces.Dict) and not has_images(observation_space):
        return MlpPolicy
    return policy
