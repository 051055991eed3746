"""EfficientZero V2 as a Stable-Baselines3 algorithm."""

from __future__ import annotations

import copy
import io
import pathlib
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TrainFreq
from stable_baselines3.common.utils import update_learning_rate

from sb3_ezv2.ahead import next_batch, preparing_next
from sb3_ezv2.base_policy import PREFIX_WINDOW, Ezv2Policy
from sb3_ezv2.exploration import RandomActions, check_exploration, exploration_eps
from sb3_ezv2.losses import compute_losses
from sb3_ezv2.parts import check_buffer, make_reanalyzer, make_replay_buffer, search_settings
from sb3_ezv2.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, policy_for
from sb3_ezv2.reanalyze import Reanalyzer
from sb3_ezv2.replay_buffer import SequenceReplayBuffer
from sb3_ezv2.resumable import LeftUpdates, OpenRollout, ResumableAlgorithm
from sb3_ezv2.schedules import (
    LONGEST_TARGET_UPDATE_INTERVAL,
    averaging_weight,
    learning_rate_factor,
    plan_run,
    planned_updates,
)
from sb3_ezv2.validation import (
    check_finite,
    check_normalizer,
    check_options,
    check_policy,
    check_settings,
    check_spaces,
    check_train_freq,
)


class EZV2(ResumableAlgorithm):
    """
    EfficientZero V2: planning by Gumbel search in a learned model, for discrete and continuous actions.
    Paper: https://arxiv.org/abs/2403.00564

    The defaults are those of the paper's Table 3 for state inputs, except for the discount, the value targets and their
    networks, the target network's refreshes, the supports, the replay's size, start and priorities, the search cache, the
    averaged weights of :meth:`predict` and, for Discrete actions, ``c_scale``, ``search_value`` and ``exploration_eps``: see
    the documentation. MultiDiscrete and MultiBinary actions have the defaults of Discrete ones where there are at most
    ``n_sampled_actions`` of them, so that a search looks at all, and otherwise those of Box.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate, it can be a function of the current progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer, in observations
    :param learning_starts: how many steps of random actions to collect before learning starts
    :param exploration_eps: share of random actions afterwards, while learning. None: 0.1 for Discrete actions, 0 for Box, of
        which some candidates are drawn from a flattened policy; the paper has 0
    :param exploration_repeat: longest time, in steps, for which such an action is repeated: n steps with a probability
        proportional to 1 / n² (Dabney et al. 2021, https://arxiv.org/abs/2006.01782). ``exploration_eps`` is then the
        probability at each step that one begins where none is repeated. 1: each is drawn anew
    :param batch_size: sequences in a batch
    :param gamma: the discount factor of one step of the environment; the paper has 0.997 per frame, of which an action that is
        repeated k times takes k
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit
        like ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many updates to do after each rollout (see ``train_freq``)
        Set to ``-1`` means to do as many updates as steps done in the environment during the rollout.
    :param tau: Polyak rate of the network whose values end the n-step windows; 1.0: the target network serves, as in the paper
    :param unroll_steps: steps that the model is unrolled in training
    :param td_steps: length of a fresh transition's value window
    :param td_steps_min: length of an old transition's value window; the paper has 5 and 5
    :param td_steps_age: the window shrinks by one step for every ``td_steps_age`` transitions collected since
        (EfficientZero Eq. 12). None: 0.5% of the planned steps, at least 20 (shares of a run are shares of at most 200,000
        steps and updates and, of steps, of what the replay buffer holds)
    :param n_simulations: simulations of a search
    :param n_sampled_actions: Box, MultiDiscrete and MultiBinary: candidate actions at the root. Discrete: actions that enter
        sequential halving
    :param n_inner_actions: not Discrete: candidate actions at the other nodes
    :param policy_action_fraction: not Discrete: share of the root's candidates from the policy, the rest from its flattened
        version
    :param flat_std_scale: Box: standard deviation of the flattened policy, as a multiple of the policy's. MultiDiscrete and
        MultiBinary: its square divides the logits, which does the same
    :param c_visit: of sigma, Eq. 19
    :param c_scale: of sigma, Eq. 19; the paper has 0.1. None: 0.3 where the policy's logits are the priors of the root's
        actions (Discrete), 0.1 where candidates are drawn from it (Box)
    :param search_value: the value that a search finds: ``"mean"`` of its simulations (Eq. 10), or ``"improved"``: the mean of
        q under the improved policy. None: ``"improved"`` for Discrete actions, ``"mean"`` for Box
    :param value_target: ``"mixed"`` (Eq. 16), or its parts alone: ``"td"`` (n-step) or ``"search"`` (search-based values)
    :param mixed_value_start: updates before search-based values are used (T1 of Eq. 16); None: 4% of the planned ones, at
        least 300
    :param fresh_transitions: newest transitions that keep n-step values (T2 of Eq. 16); None: 10% of the planned
        steps, at least 500
    :param average_fraction: :meth:`predict` searches with an average of the weights after each update, whose mean age is this
        share of the updates so far, at most 0.5; 0: with the newest weights alone, as in the paper
    :param acting_update_interval: updates between two refreshes of the network that collects data
    :param target_update_interval: updates between two refreshes of the network that reanalyzes; None: 0.2% of the planned
        ones, 48 to 400
    :param reanalyze_cache: search each stored state once per refresh of the target network instead of each time it is drawn
    :param cache_refresh_fraction: share of the states found in that cache that are searched again at each update; 0: each is
        searched once per refresh
    :param reanalyze_ahead: sample the batch of the next update, and search it, when an update begins, so with the priorities
        from before that update
    :param reanalyze_thread: search that batch in a thread (on CUDA with its own stream) while the update runs, which does
        not change the results. None: only on CUDA; False: never
    :param priority_alpha: exponent of the priorities (0: uniform); the paper has 1
    :param priority_beta: exponent of the importance weights
    :param reward_coef: weight of the reward loss (lambda_1 of Eq. 3)
    :param policy_coef: weight of the policy loss (lambda_2)
    :param vf_coef: weight of the value loss (lambda_3)
    :param consistency_coef: weight of the consistency loss (lambda_4)
    :param observation_coef: states, not images: weight of the squared error of a linear layer that predicts the next
        observations, normalised, from the imagined states; the paper has no such loss
    :param ent_coef: weight of the policy's entropy
    :param max_grad_norm: the maximum value for the gradient clipping
    :param final_gradient_steps: extra updates after the last step of ``learn()``
    :param warmup_fraction: share of the planned updates in which the learning rate rises from 0
    :param lr_decay_updates: the learning rate is multiplied by ``lr_decay_factor`` after every so many updates; the
        paper has 100,000 for images. None: no decay
    :param lr_decay_factor: see ``lr_decay_updates``
    :param policy_target: ``"candidates"`` (Eq. 8), ``"best_action"`` (Eq. 9), or ``"auto"``: the latter for Box actions with
        more than one dimension, and for MultiDiscrete and MultiBinary ones of which not all are candidates
    :param replay_buffer_class: a subclass of ``SequenceReplayBuffer``, or None for that itself
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param policy_kwargs: additional arguments to be passed to the policy on creation, see
        :class:`sb3_ezv2.base_policy.Ezv2Policy`
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: a space or setting that is not supported, a NaN while learning
    :raises TypeError: an option that does not apply
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: Ezv2Policy

    def __init__(
        self,
        policy: str | type[Ezv2Policy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 100_000,
        learning_starts: int = 500,
        batch_size: int = 256,
        gamma: float = 0.997,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        tau: float = 0.05,
        unroll_steps: int = 5,
        td_steps: int = 20,
        td_steps_min: int = 5,
        td_steps_age: int | None = None,
        n_simulations: int = 32,
        n_sampled_actions: int = 16,
        n_inner_actions: int = 2,
        policy_action_fraction: float = 0.25,
        flat_std_scale: float = 3.0,
        c_visit: float = 50.0,
        c_scale: float | None = None,
        value_target: str = "mixed",
        mixed_value_start: int | None = None,
        fresh_transitions: int | None = None,
        acting_update_interval: int = 100,
        target_update_interval: int | None = None,
        reanalyze_cache: bool = True,
        cache_refresh_fraction: float = 0.0,
        reanalyze_ahead: bool = False,
        reanalyze_thread: bool | None = None,
        priority_alpha: float = 0.5,
        priority_beta: float = 1.0,
        reward_coef: float = 1.0,
        policy_coef: float = 1.0,
        vf_coef: float = 0.25,
        consistency_coef: float = 2.0,
        ent_coef: float = 5e-3,
        max_grad_norm: float = 5.0,
        final_gradient_steps: int = 0,
        warmup_fraction: float = 0.01,
        lr_decay_updates: int | None = None,
        lr_decay_factor: float = 0.1,
        policy_target: str = "auto",
        exploration_eps: float | None = None,
        exploration_repeat: int = 1,
        search_value: str | None = None,
        average_fraction: float = 0.05,
        observation_coef: float = 0.0,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        **unsupported: Any,
    ):
        check_options(unsupported)
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            support_multi_env=True,
        )
        self.unroll_steps = unroll_steps
        self.td_steps = td_steps
        self.td_steps_min = td_steps_min
        self.td_steps_age = td_steps_age
        self.n_simulations = n_simulations
        self.n_sampled_actions = n_sampled_actions
        self.n_inner_actions = n_inner_actions
        self.policy_action_fraction = policy_action_fraction
        self.flat_std_scale = flat_std_scale
        self.c_visit = c_visit
        self.c_scale = c_scale
        self.value_target = value_target
        self.mixed_value_start = mixed_value_start
        self.fresh_transitions = fresh_transitions
        self.acting_update_interval = acting_update_interval
        self.target_update_interval = target_update_interval
        self.reanalyze_cache = reanalyze_cache
        self.cache_refresh_fraction = cache_refresh_fraction
        self.reanalyze_ahead = reanalyze_ahead
        self.reanalyze_thread = reanalyze_thread
        self.priority_alpha = priority_alpha
        self.priority_beta = priority_beta
        self.reward_coef = reward_coef
        self.policy_coef = policy_coef
        self.vf_coef = vf_coef
        self.consistency_coef = consistency_coef
        self.ent_coef = ent_coef
        self.max_grad_norm = max_grad_norm
        self.final_gradient_steps = final_gradient_steps
        self.warmup_fraction = warmup_fraction
        self.lr_decay_updates = lr_decay_updates
        self.lr_decay_factor = lr_decay_factor
        self.policy_target = policy_target
        self.exploration_eps = exploration_eps
        self.exploration_repeat = exploration_repeat
        self.search_value = search_value
        self.average_fraction = average_fraction
        self.observation_coef = observation_coef

        self._warmup_updates = 0
        self._predicts_observations: bool | None = None  # None: of a new agent
        # Updates after which the acting and the target network were last refreshed. None: loaded from a file without them
        self._acting_refreshed_at: int | None = None
        self._target_refreshed_at: int | None = None
        self._target_update_interval = LONGEST_TARGET_UPDATE_INTERVAL
        self._generators: dict[str, np.random.Generator] | None = None
        self._random_actions: RandomActions | None = None
        self._reanalyzer: Reanalyzer | None = None
        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------ set-up

    def _setup_model(self) -> None:
        check_options({k: v for k, v in self.policy_kwargs.items() if k.startswith("use_sde")})
        if self.use_sde or self.action_noise is not None:
            check_options({"use_sde": True} if self.use_sde else {"action_noise": self.action_noise})
        if self.replay_buffer_class is None:
            self.replay_buffer_class = SequenceReplayBuffer
        self.policy_class = policy_for(self.policy_class, self.observation_space)
        check_policy(self.policy_class, Ezv2Policy, self.policy_kwargs)
        check_spaces(self.observation_space, self.action_space)
        check_normalizer(self._vec_normalize_env, self.observation_space)
        check_settings(self.__dict__)
        policy_kwargs = dict(self.policy_kwargs)
        if self._predicts_observations is None:
            self._predicts_observations = self.observation_coef > 0
        if self._predicts_observations:
            if not issubclass(self.policy_class, MlpPolicy):
                raise ValueError("observation_coef is for observations without images: use observation_coef=0.")
            policy_kwargs["predicts_observations"] = True
        if self._generators is None:  # a loaded agent may be there to predict alone, in any number of environments
            self._check_learning()
        self._setup_lr_schedule()
        restored, sampled_space = self._generators, copy.deepcopy(self.action_space)
        self.set_random_seed(self.seed)
        if restored is not None:
            # of a loaded agent: its random streams go on where they were
            self._generators, self.action_space = restored, sampled_space
        elif self._generators is None:
            self._seed_generators(int(np.random.randint(2**31)))
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            search_settings=search_settings(self),
            **policy_kwargs,
        )
        self.policy = self.policy.to(self.device)
        self._check_networks()

    def _check_learning(self) -> None:
        """:raises ValueError, TypeError: settings of learning that cannot be, in as many environments as there are"""
        check_buffer(self)
        check_exploration(self)
        self._convert_train_freq()
        assert isinstance(self.train_freq, TrainFreq)
        check_train_freq(self.train_freq, self.n_envs)

    def _check_networks(self) -> None:
        """:raises ValueError: settings that the networks were not made for"""
        if self.observation_coef > 0 and not self._predicts_observations:
            raise ValueError(
                "this agent was made with observation_coef=0 and has nothing to predict observations with: give "
                "observation_coef when it is made."
            )
        if self.policy.value_prefix and self.unroll_steps < PREFIX_WINDOW:
            raise ValueError(
                f"value_prefix sums rewards over {PREFIX_WINDOW} steps, of which unroll_steps={self.unroll_steps} would leave "
                f"some untrained: give at least unroll_steps={PREFIX_WINDOW}."
            )

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Set the seed of the pseudo-random generators
        (python, numpy, pytorch, gym, action_space, and EZV2's own)

        :param seed:
        """
        super().set_random_seed(seed)
        if seed is not None:
            self._seed_generators(seed)
            if self.replay_buffer is not None:
                self.replay_buffer.rng = np.random.default_rng(self._replay_seed())

    def _seed_generators(self, seed: int) -> None:
        # Streams of their own, as numpy generators: they are saved with the agent, are the same on every device, and
        # neither predict() nor a callback draws from them
        names = ("acting", "reanalyze", "losses", "replay", "augmentation")
        streams = np.random.SeedSequence(seed).spawn(len(names))
        self._generators = {name: np.random.default_rng(stream) for name, stream in zip(names, streams)}

    def _replay_seed(self) -> int:
        assert self._generators is not None
        return int(self._generators["replay"].integers(2**63))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_reanalyzer"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        n_simulations: int | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """As in SB3, by search; with ``n_simulations`` of this call, see :meth:`sb3_ezv2.base_policy.Ezv2Policy.predict`."""
        return self.policy.predict(observation, state, episode_start, deterministic, n_simulations)

    def set_parameters(
        self,
        load_path_or_dict: str | pathlib.Path | io.BufferedIOBase | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """As in SB3, with what :meth:`get_parameters` returns, or a file that :meth:`load` takes."""
        super().set_parameters(load_path_or_dict, exact_match, device)  # type: ignore[arg-type]  # SB3 names two of these
        if self._reanalyzer is not None:
            self._reanalyzer.target_refreshed()  # what it remembers are searches with other weights

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        check_normalizer(self._vec_normalize_env, self.observation_space)
        # Attributes may have been changed since they were checked
        check_settings(self.__dict__)
        self._check_learning()
        self._check_networks()
        self._setup_lr_schedule()
        self.policy.set_search_settings(search_settings(self))
        env_is_reset = reset_num_timesteps or self._last_obs is None
        planned_steps = total_timesteps + (0 if reset_num_timesteps else self.num_timesteps)
        if self.replay_buffer is None:
            self.replay_buffer = make_replay_buffer(self, self._replay_seed())
        elif self.replay_buffer.n_envs != self.n_envs:
            raise ValueError(
                f"the replay buffer holds {self.replay_buffer.n_envs} environments but there are {self.n_envs} now: "
                "use as many, or set model.replay_buffer = None to begin with an empty one."
            )
        elif env_is_reset:
            self.replay_buffer.truncate_open_episodes()
        self.replay_buffer.set_sampling(
            self.gamma, self.unroll_steps, self.td_steps, self.td_steps_min, self.priority_alpha, self.priority_beta
        )
        known = self.replay_buffer.cache
        self._reanalyzer = make_reanalyzer(self, self.replay_buffer)
        if known is not None and self._reanalyzer.cache is not known:
            self._rollout.search = None  # made with other settings, like all that the cache knew
        self._find_refreshes()
        self._plan(planned_steps)
        if env_is_reset:
            self._rollout = OpenRollout()
        if env_is_reset or self._random_actions is None:
            self._random_actions = RandomActions(self.n_envs)
        if reset_num_timesteps:
            self._stats, self._updates_left = {}, 0
        if self._updates_left > 0:
            callback = LeftUpdates.after(callback)
        total_timesteps, callback = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        check_finite("first observation", self._last_obs, self.num_timesteps)
        return total_timesteps, callback

    def _find_refreshes(self) -> None:
        if self._acting_refreshed_at is None:
            self._acting_refreshed_at = self._n_updates // self.acting_update_interval * self.acting_update_interval
        if self._target_refreshed_at is None:
            self._target_refreshed_at = self._n_updates // self._target_update_interval * self._target_update_interval

    def _plan(self, planned_steps: int) -> None:
        """Set what depends on the length of the whole run. :param planned_steps: environment steps, past ones included"""
        assert self.replay_buffer is not None and self._reanalyzer is not None and isinstance(self.train_freq, TrainFreq)
        updates = self.final_gradient_steps + planned_updates(
            planned_steps, self.learning_starts, self.train_freq, self.gradient_steps, self.n_envs
        )
        plan = plan_run(
            planned_steps,
            updates,
            self.replay_buffer.buffer_size * self.n_envs,
            self.td_steps_age,
            self.mixed_value_start,
            self.fresh_transitions,
            self.target_update_interval,
            self.warmup_fraction,
        )
        self.replay_buffer.td_steps_age = plan.td_steps_age
        self._reanalyzer.mixed_value_start = plan.mixed_value_start
        self._reanalyzer.fresh_transitions = plan.fresh_transitions
        self._target_update_interval = plan.target_update_interval
        if self._n_updates == 0:
            self._warmup_updates = plan.warmup_updates

    # ------------------------------------------------------------------ collecting

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        self._interrupt.check()
        actions, buffer_actions = self._choose_action(learning_starts, n_envs)
        self._begin_step(buffer_actions)
        return actions, buffer_actions

    def _choose_action(self, learning_starts: int, n_envs: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Uniform actions before ``learning_starts`` and, as ``exploration_eps`` says, afterwards; otherwise a search with the
        acting network.

        :return: actions for the environment, and as they are stored: counted from 0, or flat and scaled to [-1, 1]
        """
        if self.num_timesteps < learning_starts:
            self._last_search = None
            actions = np.array([self.action_space.sample() for _ in range(n_envs)])
            return actions, self.policy.from_env_actions(actions)
        assert self._last_obs is not None and self._generators is not None
        obs, _ = self.policy.obs_to_tensor(self._last_obs)
        self._last_search = self.policy.act(obs, self._generators["acting"])
        self._count(
            {
                "search/acting_value": self._last_search.value.mean(),
                "search/acting_depth": self._last_search.depth.mean(),
            }
        )
        best = self._last_search.best()
        actions = self.policy.to_env_actions(best).cpu().numpy()
        if isinstance(self.action_space, spaces.Box):
            actions = self.policy.unscale_action(actions.reshape(n_envs, *self.action_space.shape))
            actions = actions.astype(self.action_space.dtype)
        actions, stored = actions.copy(), best.cpu().numpy().copy()  # the search keeps its own
        if (eps := exploration_eps(self)) > 0:
            assert self._random_actions is not None
            rng, longest = self._generators["acting"], self.exploration_repeat
            for env, action in self._random_actions.choose(eps, longest, self.action_space, rng).items():
                actions[env] = action
                stored[env] = self.policy.from_env_actions(actions[env : env + 1])[0]
        return actions, stored

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        assert isinstance(replay_buffer, SequenceReplayBuffer)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        if self._random_actions is not None:  # an agent that was saved amid a step may have none
            self._random_actions.end_episodes(dones)
        if self._last_search is not None and self._acting_is_as_new_as_target():
            assert self._reanalyzer is not None
            self._reanalyzer.store(replay_buffer.last_slots, self._last_search)

    def _acting_is_as_new_as_target(self) -> bool:
        assert self._acting_refreshed_at is not None and self._target_refreshed_at is not None
        return self._acting_refreshed_at >= self._target_refreshed_at

    # ------------------------------------------------------------------ learning

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Sample, reanalyze, update: ``gradient_steps`` times, and ``final_gradient_steps`` more after the last step.

        :param gradient_steps: number of updates
        :param batch_size: sequences in a batch
        :raises ValueError: a loss or the gradient is NaN or infinite; the weights are then those before the update
        """
        assert self.replay_buffer is not None
        if self.num_timesteps >= self._total_timesteps:
            gradient_steps += self.final_gradient_steps
        if self._n_updates == 0 and self.policy.reward_scale == "auto" and self.policy.network.is_untrained():
            # The unit of the supports, see there
            scale = self.replay_buffer.reward_scale(self._vec_normalize_env)
            for network in self.policy.networks():
                network.set_reward_scale(scale if scale > 0 else 1.0)
            assert self._reanalyzer is not None
            self._reanalyzer.sign()
        self._set_fresh_priorities()
        if self.replay_buffer.num_sampleable == 0:
            return  # the very first transition, whose next observation is still to come
        self._updates_left = gradient_steps
        self.make_updates(batch_size)

    def make_updates(self, batch_size: int | None = None) -> None:
        """The updates of the last rollout that are still to be made. :param batch_size: None: the algorithm's"""
        assert self.replay_buffer is not None
        if self._updates_left == 0 or self.replay_buffer.num_sampleable == 0:
            return
        self.policy.set_training_mode(True)
        for update in range(self._updates_left):
            if update > 0:
                self._interrupt.check()
            self._update(self.batch_size if batch_size is None else batch_size)
        self.policy.set_training_mode(False)

    def _set_fresh_priorities(self) -> None:
        """Fresh transitions enter with their value error under the present model (App. A)."""
        assert self.replay_buffer is not None and self._reanalyzer is not None
        fresh = self.replay_buffer.take_fresh()
        self.policy.set_training_mode(False)
        for start in range(0, len(fresh), 1024):
            slots = fresh[start : start + 1024]
            self._update_priorities(slots, self._reanalyzer.value_errors(slots, self.policy.network, self._vec_normalize_env))

    def _update_priorities(self, slots: np.ndarray, errors: np.ndarray, stamps: np.ndarray | None = None) -> None:
        assert self.replay_buffer is not None
        try:
            self.replay_buffer.update_priorities(slots, errors, stamps)
        except ValueError as error:
            raise ValueError(f"update {self._n_updates + 1} at step {self.num_timesteps}: {error}") from None

    def _update(self, batch_size: int) -> None:
        assert self._reanalyzer is not None and self._generators is not None
        reanalyzer, env, rng = self._reanalyzer, self._vec_normalize_env, self._generators["reanalyze"]
        batch, stamps, searches = next_batch(reanalyzer, batch_size, env)
        targets, stats = reanalyzer.targets(batch, self._n_updates, rng, searches)
        refreshes = (self._n_updates + 1) % self._target_update_interval == 0
        ahead = self.reanalyze_ahead and not refreshes
        with preparing_next(reanalyzer, batch_size, env, rng, self.reanalyze_thread) if ahead else nullcontext():
            policy, network = self.policy, self.policy.network
            learning_rate = self.lr_schedule(self._current_progress_remaining) * learning_rate_factor(
                self._n_updates, self._warmup_updates, self.lr_decay_updates, self.lr_decay_factor
            )
            update_learning_rate(policy.optimizer, learning_rate)
            network.update_statistics(batch.observations, batch.observed)
            augmented = policy.augment(batch.observations, self._generators["augmentation"])
            batch = batch._replace(observations=augmented, bootstrap_observations=None)  # large, and of no more use
            policy.optimizer.zero_grad(set_to_none=True)
            losses = compute_losses(
                network,
                batch,
                targets,
                self._generators["losses"],
                reward_coef=self.reward_coef,
                policy_coef=self.policy_coef,
                vf_coef=self.vf_coef,
                consistency_coef=self.consistency_coef,
                observation_coef=self.observation_coef,
                ent_coef=self.ent_coef,
                bfloat16=policy.trains_in_bfloat16,
                outputs=policy.outputs,
            )
            losses.total.backward()
            grad_norm = th.nn.utils.clip_grad_norm_(network.parameters(), self.max_grad_norm)
            value_errors, fault = losses.read(grad_norm)
            if fault is not None:
                policy.restore_statistics()
                raise ValueError(
                    f"update {self._n_updates + 1} at step {self.num_timesteps}: the {fault} is NaN or infinite. The weights "
                    "are those before this update; a lower learning_rate or max_grad_norm, or rewards of a smaller range, may "
                    "help."
                )
            policy.optimizer.step()
            self._update_priorities(batch.slots[:, 0], value_errors, stamps)

            self._n_updates += 1
            self._updates_left -= 1
            policy.follow(policy.averaged_network, averaging_weight(self._n_updates, self.average_fraction))
            if self.tau < 1.0:
                policy.follow(policy.bootstrap_network, self.tau)
            if self._n_updates % self.acting_update_interval == 0:
                policy.acting_network.load_state_dict(network.state_dict())
                self._acting_refreshed_at = self._n_updates
            if refreshes:
                policy.target_network.load_state_dict(network.state_dict())
                if self.tau == 1.0:
                    # Not in use, but ``tau`` may be changed
                    policy.bootstrap_network.load_state_dict(network.state_dict())
                self._target_refreshed_at = self._n_updates
                reanalyzer.target_refreshed()
            self._count(
                {
                    "train/loss": losses.total.detach(),
                    "train/reward_loss": losses.reward,
                    "train/policy_loss": losses.policy,
                    "train/value_loss": losses.value,
                    "train/consistency_loss": losses.consistency,
                    **({"train/observation_loss": losses.observation} if self.observation_coef > 0 else {}),
                    "train/policy_entropy": losses.entropy.detach(),
                    "train/value_error": losses.value_error.mean(),
                    "train/grad_norm": grad_norm,
                    "train/learning_rate": th.tensor(learning_rate),
                    **stats,
                }
            )

    # ------------------------------------------------------------------ logging

    def _count(self, stats: dict[str, th.Tensor]) -> None:
        for name, value in stats.items():
            total, count = self._stats.get(name, (0.0, 0))
            self._stats[name] = (total + value, count + 1)

    def dump_logs(self) -> None:
        """
        Write log data: means over the log interval of the losses, targets and searches.
        """
        if self._n_updates > 0:
            self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, (total, count) in self._stats.items():
            self.logger.record(name, float(total) / count)
        self._stats = {}
        super().dump_logs()
