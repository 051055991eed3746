"""The base of the policies: the model and its copies, the optimizer, and actions by search."""

from __future__ import annotations

import copy
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sb3_ezv2.distributions import SquashedGaussian, SupportSpec
from sb3_ezv2.inference import bfloat16_is_fast
from sb3_ezv2.multi_discrete import MultiCategorical, first_category
from sb3_ezv2.networks import BaseNetwork
from sb3_ezv2.observations import batch_size
from sb3_ezv2.search import GumbelSearch, SearchResult, SearchSettings
from sb3_ezv2.unroll import COMPILE_MODES, CompiledOutputs, ModelOutputs, model_outputs
from sb3_ezv2.validation import check_integer, check_observation

if TYPE_CHECKING:
    from typing_extensions import Self

PREFIX_WINDOW = 5
"""Steps after which the value prefix begins anew (EfficientZero Table 6)."""

_n_simulations: ContextVar[int | None] = ContextVar("n_simulations", default=None)
"""Of the :meth:`Ezv2Policy.predict` that is running in this thread; SB3's has no argument for it."""


class Ezv2Policy(BasePolicy):
    """
    Base of EZV2's policies, which act by a search with the model that they hold.

    A policy owns five copies of the model: ``network`` is trained; ``averaged_network``, an average of its weights over the
    latest updates, serves :meth:`predict`; ``acting_network`` collects data; ``target_network`` reanalyzes;
    ``bootstrap_network`` follows ``network`` slowly and ends the n-step windows.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param search_settings: of all searches, given by the algorithm
    :param sizes: settings of the networks that must be positive integers, by name
    :param net_arch: hidden widths of the heads
    :param value_support: (limit, bins, transform) of the value head, see :class:`sb3_ezv2.distributions.SupportSpec`
    :param reward_support: the same of the reward head
    :param reward_scale: reward per unit of the supports. ``"auto"``: the root mean square of the rewards collected
        before the first update, so that rewards of any scale are learned alike. The paper's supports are in raw units: 1.0
    :param value_prefix: predict sums of rewards in windows of :data:`PREFIX_WINDOW` steps by an LSTM (EfficientZero 4.2)
        instead of rewards
    :param lstm_dim: width of that LSTM
    :param search_dtype: ``"bfloat16"``: matrix products of large searches in bfloat16, where the processor has it;
        its effect on learning is not known
    :param train_dtype: ``"bfloat16"``: matrix products and convolutions of training in bfloat16 (autocast), where the
        processor has it; weights, losses and the optimizer stay float32
    :param train_compile: ``"default"`` or another mode of :func:`torch.compile`: training with a compiled model, which rounds
        otherwise. None: not compiled
    :param predicts_observations: a head predicts observations from imagined states
    :param features_extractor_class: Features extractor to use
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer;
        by default, for ``th.optim.Adam``, weight decay 2e-5 (Table 3) and, for the speed, ``fused``
    :raises ValueError: a setting out of its range
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        search_settings: SearchSettings | None,
        sizes: dict[str, int],
        net_arch: list[int],
        value_support: SupportSpec,
        reward_support: SupportSpec,
        reward_scale: float | str,
        value_prefix: bool,
        lstm_dim: int,
        search_dtype: str,
        train_dtype: str,
        train_compile: str | None = None,
        predicts_observations: bool = False,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ):
        if optimizer_kwargs is None and optimizer_class is th.optim.Adam:
            # fused: the update of many small tensors in one call
            optimizer_kwargs = dict(weight_decay=2e-5, fused=True)
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=isinstance(action_space, spaces.Box),
        )
        self.search_settings = SearchSettings() if search_settings is None else search_settings
        self.sizes = sizes
        self.net_arch = net_arch
        self.value_support = value_support
        self.reward_support = reward_support
        self.reward_scale = reward_scale
        self.value_prefix = value_prefix
        self.lstm_dim = lstm_dim
        self.search_dtype = search_dtype
        self.train_dtype = train_dtype
        self.train_compile = train_compile
        self.predicts_observations = predicts_observations
        self._check_settings()
        self.outputs: ModelOutputs = model_outputs if train_compile is None else CompiledOutputs(train_compile)
        self.network = self._make_network()
        if isinstance(reward_scale, (int, float)):
            self.network.set_reward_scale(reward_scale)
        self.averaged_network = _frozen_copy(self.network)
        self.acting_network = _frozen_copy(self.network)
        self.target_network = _frozen_copy(self.network)
        self.bootstrap_network = _frozen_copy(self.network)
        self._make_searches()
        self.optimizer = self.optimizer_class(
            self.network.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def _make_network(self) -> BaseNetwork:
        raise NotImplementedError

    def _make_searches(self) -> None:
        self.search = self._search_of(self.averaged_network, self.search_settings)
        self.acting_search = self._search_of(self.acting_network, self.search_settings)
        self.target_search = self._search_of(self.target_network, self.search_settings)
        # Of predict() with other numbers of simulations, each with a tree and storage of its own
        self._other_searches: dict[int, GumbelSearch] = {}

    def _search_of(self, network: BaseNetwork, settings: SearchSettings) -> GumbelSearch:
        return GumbelSearch(network, settings, bfloat16=self.search_dtype == "bfloat16")

    def set_search_settings(self, settings: SearchSettings) -> None:
        """:param settings: of all searches from now on"""
        if settings != self.search_settings:
            self.search_settings = settings
            self._make_searches()

    @property
    def prefix_window(self) -> int:
        """Steps of a window of the value prefix; 0: there is none."""
        return PREFIX_WINDOW if self.value_prefix else 0

    @property
    def trains_in_bfloat16(self) -> bool:
        """``train_dtype`` asks for bfloat16 and the processor computes in it."""
        return self.train_dtype == "bfloat16" and (self.device.type != "cpu" or bfloat16_is_fast())

    def _check_settings(self) -> None:
        widths = self.net_arch
        if not isinstance(widths, (list, tuple)) or not widths or not all(isinstance(w, int) and w > 0 for w in widths):
            raise ValueError(f"net_arch must be a list of hidden widths such as [256], not {widths!r}")
        for name, value in {**self.sizes, "lstm_dim": self.lstm_dim}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        scale = self.reward_scale
        if scale != "auto" and not (isinstance(scale, (int, float)) and 0 < scale < float("inf")):
            raise ValueError(f'reward_scale must be "auto" or a positive number, not {scale!r}')
        if not isinstance(self.value_prefix, bool):
            raise ValueError(f"value_prefix must be True or False, not {self.value_prefix!r}")
        for name, dtype in (("search_dtype", self.search_dtype), ("train_dtype", self.train_dtype)):
            if dtype not in ("float32", "bfloat16"):
                raise ValueError(f'{name} must be "float32" or "bfloat16", not {dtype!r}')
        if self.train_compile is not None and self.train_compile not in COMPILE_MODES:
            raise ValueError(f"train_compile must be None or one of {', '.join(COMPILE_MODES)}, not {self.train_compile!r}")

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            lr_schedule=self._dummy_schedule,  # dummy lr schedule, not needed for loading policy alone
            search_settings=self.search_settings,
            **self.sizes,
            net_arch=self.net_arch,
            value_support=self.value_support,
            reward_support=self.reward_support,
            reward_scale=self.reward_scale,
            value_prefix=self.value_prefix,
            lstm_dim=self.lstm_dim,
            search_dtype=self.search_dtype,
            train_dtype=self.train_dtype,
            train_compile=self.train_compile,
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
        )
        return data

    @classmethod
    def load(cls, path: str, device: th.device | str = "auto") -> Self:
        """
        A policy that :meth:`save` wrote, which predicts by search without an agent, an environment or a replay buffer.

        :param path: of the file
        :param device: where the networks shall live
        :raises TypeError: called on this base class
        """
        if cls is Ezv2Policy:
            raise TypeError("load a policy with the class that it has: MlpPolicy.load(path) or CnnPolicy.load(path).")
        return super().load(path, device)

    def augment(self, obs: Any, rng: np.random.Generator) -> Any:
        """
        :param obs: training observations, [B, U + 1, ...] or a dictionary of such tensors
        :param rng: of the augmentation
        :return: what the model is trained with: here the observations themselves
        """
        return obs

    def train(self, mode: bool = True) -> Self:
        """Only the trained network has a training mode: its copies are always evaluated. :param mode: training or not"""
        self.training = mode
        if self.network.training != mode:
            self.network.train(mode)
        return self

    def networks(self) -> list[BaseNetwork]:
        """:return: the trained network and its copies"""
        return [self.network, self.averaged_network, self.acting_network, self.target_network, self.bootstrap_network]

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        n_simulations: int | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Actions by search with the averaged network, or by its policy head alone. Several threads may call it, but not while
        the agent learns in another one.

        :param observation: one, or a batch of them
        :param state: not used, as in SB3's policies without a memory
        :param episode_start: not used
        :param deterministic: no noise: the result depends on the observation, the weights and ``n_simulations`` alone.
            Otherwise with noise as in training
        :param n_simulations: of this call's searches; None: as many as in training. With fewer than ``n_sampled_actions`` only
            so many candidates are looked at. 0: the policy head alone, its mode or a sample of it
        :return: the actions as the environment takes them, and ``state``
        :raises ValueError: ``n_simulations`` is no integer of at least 0, the observation is not of the space or not finite,
            or the batch is empty
        """
        if n_simulations is not None:
            check_integer("n_simulations", n_simulations, 0, " or None")
        token = _n_simulations.set(n_simulations)
        try:
            return super().predict(observation, state, episode_start, deterministic)
        finally:
            _n_simulations.reset(token)

    def search_with(self, n_simulations: int | None = None) -> GumbelSearch:
        """
        :param n_simulations: of each search, at least 1; None: as many as in training
        :return: a search with the averaged network; the same object for the same number
        :raises ValueError: ``n_simulations`` is not a positive integer
        """
        if n_simulations is None or n_simulations == self.search_settings.n_simulations:
            return self.search
        check_integer("n_simulations", n_simulations, 1, " or None")
        if n_simulations not in self._other_searches:
            settings = self.search_settings._replace(n_simulations=int(n_simulations))
            self._other_searches[n_simulations] = self._search_of(self.averaged_network, settings)
        return self._other_searches[n_simulations]

    @th.no_grad()
    def follow(self, follower: BaseNetwork, share: float) -> None:
        """A copy's weights and running statistics move towards the trained ones. :param share: 1: they become these"""
        get_ema_multi_avg_fn(1 - share)(follower.float_tensors(), self.network.float_tensors(), None)

    @th.no_grad()
    def restore_statistics(self) -> None:
        """Running statistics with NaN or infinite entries, of a batch that made no update, become the averaged ones."""
        for mine, averaged in zip(self.network.buffers(), self.averaged_network.buffers()):
            if not th.isfinite(mine).all():
                mine.copy_(averaged)

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

    def obs_to_tensor(self, observation: np.ndarray | dict[str, np.ndarray]) -> tuple[PyTorchObs, bool]:
        """As in SB3. :raises ValueError: the observation is not of the policy's space"""
        check_observation(observation, self.observation_space)
        return super().obs_to_tensor(observation)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Search with the averaged network; in a call of :meth:`predict` with as many simulations as that says.

        :param observation: [B, ...]
        :param deterministic: no noise: the result depends on the observation and the weights alone. Otherwise a search with
            noise as in training, from a stream that is seeded by torch's, which training itself does not use
        :return: int64 [B], int64 [B, D] of ``MultiDiscrete`` actions, or [B, A] in [-1, 1]
        :raises ValueError: there is no observation, or one has NaN or infinite entries
        """
        tensors = list(observation.values()) if isinstance(observation, dict) else [observation]
        if batch_size(observation) == 0:
            raise ValueError("the batch of observations is empty: predict needs at least one.")
        if not all(th.isfinite(x).all() for x in tensors if x.is_floating_point()):
            raise ValueError("the observation has NaN or infinite entries: EZV2 cannot search from it")
        rng = None if deterministic else np.random.default_rng(int(th.randint(2**62, (1,))))
        if _n_simulations.get() == 0:
            actions = self._head_actions(observation, rng)
        else:
            actions = self.search_with(_n_simulations.get()).run(observation, rng).best()
        return self.to_env_actions(actions)

    @th.no_grad()
    def _head_actions(self, obs: PyTorchObs, rng: np.random.Generator | None) -> th.Tensor:
        """
        The policy without a search.

        :param obs: [B, ...]
        :param rng: of a sample; None: the mode
        :return: int64 [B], int64 [B, D] of ``MultiDiscrete`` actions, or [B, A] in [-1, 1]
        :raises ValueError: the network gave NaN or infinite values
        """
        network = self.averaged_network
        head = network.policy_head(network.represent(obs))
        if not th.isfinite(head).all():
            raise ValueError("the policy head's outputs for the observations are NaN or infinite")
        if rng is None:
            return network.mode(head)
        if network.discrete:
            return (head + th.from_numpy(rng.gumbel(size=head.shape)).to(head)).argmax(-1)
        if network.category_sizes:
            uniform = rng.random((len(head), len(network.category_sizes)), dtype=np.float32)
            return MultiCategorical(head, network.category_sizes).sample(th.from_numpy(uniform).to(head.device))
        noise = rng.standard_normal((len(head), network.action_dim), dtype=np.float32)
        return SquashedGaussian(head).sample(th.from_numpy(noise).to(head.device))

    def to_env_actions(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: as a search gives them
        :return: discrete ones with the space's own start, of several dimensions with its type, too; continuous ones are still
            in [-1, 1]
        """
        if isinstance(self.action_space, spaces.Discrete):
            return actions + int(self.action_space.start)
        if isinstance(self.action_space, (spaces.MultiDiscrete, spaces.MultiBinary)):
            own_type = th.from_numpy(np.zeros(0, self.action_space.dtype)).dtype
            return (actions + th.as_tensor(first_category(self.action_space), device=actions.device)).to(own_type)
        return actions

    def from_env_actions(self, actions: np.ndarray) -> np.ndarray:
        """
        :param actions: [n_envs, ...] as the environment takes them
        :return: as they are stored: counted from 0, or [n_envs, A] in [-1, 1], where a dimension whose bounds are equal is 0
        """
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            return actions - space.start
        if isinstance(space, spaces.Box):
            span = space.high - space.low
            scaled = np.where(span > 0, 2.0 * (actions - space.low) / np.where(span > 0, span, 1.0) - 1.0, 0.0)
            return scaled.astype(np.float32).reshape(len(actions), -1)
        return actions - first_category(space)


def _frozen_copy(network: BaseNetwork) -> BaseNetwork:
    return copy.deepcopy(network).requires_grad_(False).eval()
