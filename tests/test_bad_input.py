"""Bad input gets one clear sentence at the earliest possible moment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from common import BOX, TINY, FaultyEnv, SpacesEnv
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise

from sb3_ezv2 import EZV2


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(n_simulations=0), "n_simulations must be an integer of at least 1"),
        (dict(n_simulations=2.5), "n_simulations must be an integer"),
        (dict(n_sampled_actions=0), "n_sampled_actions"),
        (dict(n_inner_actions=0), "n_inner_actions"),
        (dict(batch_size=0), "batch_size must be an integer of at least 1"),
        (dict(batch_size=1, unroll_steps=1), "cannot both be 1"),
        (dict(buffer_size=0), "buffer_size"),
        (dict(unroll_steps=0), "unroll_steps"),
        (dict(td_steps=0), "td_steps"),
        (dict(td_steps=3), r"td_steps_min \(5\) must not be above td_steps \(3\)"),
        (dict(td_steps_age=0), "td_steps_age must be an integer of at least 1 or None"),
        (dict(gamma=1.1), "gamma must be a finite number at least 0 and at most 1"),
        (dict(gamma=float("nan")), "gamma"),
        (dict(tau=0.0), "tau must be a finite number above 0"),
        (dict(learning_rate=-1.0), "learning_rate must be a finite number at least 0"),
        (dict(learning_starts=-1), "learning_starts"),
        (dict(gradient_steps=-2), "gradient_steps"),
        (dict(final_gradient_steps=-1), "final_gradient_steps"),
        (dict(policy_action_fraction=1.5), "policy_action_fraction"),
        (dict(flat_std_scale=0), "flat_std_scale"),
        (dict(c_visit=-1), "c_visit"),
        (dict(c_scale=float("inf")), "c_scale"),
        (dict(exploration_eps=1.5), "exploration_eps must be a finite number at least 0 and at most 1, not 1.5"),
        (dict(exploration_eps=False), "exploration_eps"),
        (dict(exploration_repeat=0), "exploration_repeat must be an integer of at least 1"),
        (
            dict(exploration_eps=0.0, exploration_repeat=50),
            "exploration_repeat=50 repeats random actions, but exploration_eps is 0",
        ),
        (dict(average_fraction=0.6), "average_fraction must be a finite number at least 0 and at most 0.5, not 0.6"),
        (dict(average_fraction=None), "average_fraction"),
        (dict(search_value="max"), "search_value must be one of 'mean', 'improved', not 'max'"),
        (dict(priority_alpha=-0.1), "priority_alpha"),
        (dict(observation_coef=-1), "observation_coef must be a finite number at least 0"),
        (dict(vf_coef="much"), "vf_coef must be a finite number"),
        (dict(max_grad_norm=0), "max_grad_norm"),
        (dict(warmup_fraction=2), "warmup_fraction"),
        (dict(acting_update_interval=0), "acting_update_interval"),
        (dict(target_update_interval=0), "target_update_interval"),
        (dict(mixed_value_start=-1), "mixed_value_start"),
        (dict(value_target="gae"), "value_target must be one of 'mixed', 'td', 'search', not 'gae'"),
        (dict(policy_target="visits"), "policy_target must be one of"),
        (dict(reanalyze_cache="yes"), "reanalyze_cache must be True or False"),
        (dict(reanalyze_ahead=1), "reanalyze_ahead must be True or False, not 1"),
        (dict(reanalyze_ahead=True, reanalyze_thread="cuda"), "reanalyze_thread must be True, False or None, not 'cuda'"),
        (dict(reanalyze_thread=True), "reanalyze_thread is for the batches that reanalyze_ahead makes"),
        (dict(policy_kwargs=dict(net_arch=[])), "net_arch must be a list of hidden widths"),
        (dict(policy_kwargs=dict(state_dim=0)), "state_dim must be a positive integer"),
        (dict(policy_kwargs=dict(reward_scale=0)), "reward_scale must be"),
        (dict(policy_kwargs=dict(search_dtype="half")), "search_dtype must be"),
        (dict(policy_kwargs=dict(value_support=(299.0, 50, "h"))), "odd number of bins"),
        (dict(policy_kwargs=dict(value_support=(-1.0, 51, "h"))), "limit must be a positive number"),
        (dict(policy_kwargs=dict(value_support=(1e39, 51, "symexp"))), "limit must be a positive number"),
        (dict(policy_kwargs=dict(value_support=(1.0, 51, "log"))), "transform must be"),
        (dict(policy_kwargs=dict(value_support=299)), "a support is"),
        (dict(replay_buffer_class=HerReplayBuffer), "HerReplayBuffer does not apply"),
        (dict(train_freq=(1, "hours")), "unit of the `train_freq`"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EZV2("MlpPolicy", "CartPole-v1", **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(action_noise=NormalActionNoise(np.zeros(1), np.ones(1))), "action_noise does not apply"),
        (dict(use_sde=True), r"gSDE \(use_sde\) does not apply"),
        (dict(policy_kwargs=dict(use_sde=True)), r"gSDE \(use_sde\) does not apply"),
        (dict(optimize_memory_usage=True), "optimize_memory_usage does not apply"),
        (dict(n_steps=3), "td_steps"),
        (dict(policy_kwargs=dict(predicts_observations=True)), "takes no argument 'predicts_observations'"),
        (dict(n_simulation=3), "EZV2 has no argument 'n_simulation'"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_options_that_do_not_apply(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        EZV2("MlpPolicy", "Pendulum-v1", **settings)


@pytest.mark.parametrize(
    "observation_space, action_space, message",
    [
        (BOX, spaces.Text(3), "supports Box, Discrete, MultiDiscrete and MultiBinary action spaces"),
        (BOX, spaces.Box(0, 5, (2,), np.int64), "floating dtype"),
        (spaces.Tuple([BOX, BOX]), spaces.Discrete(2), "FlattenObservation"),
        (spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])), spaces.Discrete(2), "one dimension"),
        (spaces.Discrete(3, start=-1), spaces.Discrete(2), "^Discrete observations must start at 0, not at -1"),
        (spaces.MultiDiscrete([3, 2], start=[0, 4]), spaces.Discrete(2), r"^MultiDiscrete .* must start at 0, not at \[0 4\]"),
    ],
    ids=str,
)
def test_unsupported_spaces(observation_space: spaces.Space, action_space: spaces.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EZV2("MlpPolicy", SpacesEnv(observation_space, action_space))


def test_dict_observations() -> None:
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        EZV2("MlpPolicy", SpacesEnv(spaces.Dict(a=BOX), spaces.Discrete(2)))


def test_unbounded_actions() -> None:
    with pytest.raises((ValueError, AssertionError), match="finite"):
        EZV2("MlpPolicy", SpacesEnv(BOX, spaces.Box(-np.inf, np.inf, (1,), np.float32)))


def test_settings_changed_on_loading_are_checked(tmp_path: Any) -> None:
    EZV2("MlpPolicy", "CartPole-v1", **TINY).save(tmp_path / "agent")
    with pytest.raises(ValueError, match="gamma"):
        EZV2.load(tmp_path / "agent", gamma=2.0)


def test_buffer_below_one_window() -> None:
    with pytest.raises(ValueError, match="enlarge buffer_size"):
        EZV2("MlpPolicy", "CartPole-v1", **{**TINY, "buffer_size": 10})


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(gamma=0.5), "'gamma' is set by EZV2's own argument 'gamma'"),
        (dict(alpha=1.0), "'alpha' is set by EZV2's own argument 'priority_alpha'"),
        (dict(bad=1), "SequenceReplayBuffer takes no argument 'bad': it has frame_stack"),
    ],
)
def test_arguments_of_the_replay_buffer(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        EZV2("MlpPolicy", "CartPole-v1", replay_buffer_kwargs=kwargs, **TINY)


@pytest.mark.parametrize("frame_stack", [None, "2", 0, -1])
def test_numbers_of_frames(frame_stack: Any) -> None:
    with pytest.raises(ValueError, match="frame_stack in replay_buffer_kwargs must be an integer of at least 1"):
        EZV2("MlpPolicy", "CartPole-v1", replay_buffer_kwargs=dict(frame_stack=frame_stack), **TINY)


def test_frames_that_are_none() -> None:
    with pytest.raises(ValueError, match="frame_stack=2 is for images"):
        EZV2("MlpPolicy", "CartPole-v1", replay_buffer_kwargs=dict(frame_stack=2), **TINY)


@pytest.mark.parametrize("train_freq", [0, -1, (0, "episode")])
def test_no_steps_between_updates(train_freq: Any) -> None:
    with pytest.raises(ValueError, match="train_freq must be an integer of at least 1"):
        EZV2("MlpPolicy", "CartPole-v1", **{**TINY, "train_freq": train_freq})


def test_episodes_of_several_environments() -> None:
    with pytest.raises(ValueError, match="train_freq in episodes is for one environment, and there are 2"):
        EZV2("MlpPolicy", make_vec_env("CartPole-v1", 2), **{**TINY, "train_freq": (1, "episode")})


def test_observations_without_dimensions() -> None:
    with pytest.raises(ValueError, match="Box observations must have at least one dimension"):
        EZV2("MlpPolicy", SpacesEnv(spaces.Box(-1.0, 1.0, (), np.float32), spaces.Discrete(2)), **TINY)


@pytest.mark.parametrize("fault", ["observation", "final observation", "reward"])
@pytest.mark.parametrize("at", [3, 53])
def test_faulty_environment(fault: str, at: int) -> None:
    model = EZV2("MlpPolicy", FaultyEnv(fault, at), **TINY)
    with pytest.raises(ValueError, match=rf"step \d+: the {fault} of environment 0 has NaN or infinite values"):
        model.learn(80)
    assert model.num_timesteps >= at
    assert all(th.isfinite(x).all() for x in model.policy.state_dict().values())


def test_faulty_first_observation() -> None:
    class Env(SpacesEnv):
        def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
            return np.full(3, np.nan, np.float32), {}

    with pytest.raises(ValueError, match="first observation of environment 0 has NaN"):
        EZV2("MlpPolicy", Env(BOX, spaces.Discrete(2)), **TINY).learn(10)


@pytest.mark.parametrize("head, term", [("value_head", "value"), ("reward_head", "reward"), ("policy_head", "policy")])
def test_nan_loss_names_step_and_term_and_keeps_the_weights(head: str, term: str) -> None:
    model = EZV2("MlpPolicy", "CartPole-v1", seed=0, **TINY).learn(50)
    optimizer = [x.clone() for x in model.policy.network.dynamics.parameters()]
    with th.no_grad():
        getattr(model.policy.network, head).mlp[-1].bias.fill_(float("nan"))
    updates = model._n_updates
    with pytest.raises(ValueError, match=rf"update {updates + 1} at step 50: the {term} loss is NaN"):
        model.train(gradient_steps=1, batch_size=16)
    assert all(th.equal(a, b) for a, b in zip(optimizer, model.policy.network.dynamics.parameters()))


@pytest.mark.parametrize("space", [BOX, spaces.Discrete(3)], ids=str)
@pytest.mark.parametrize("n_simulations", [None, 0])
def test_predict_from_nothing(space: spaces.Space, n_simulations: int | None) -> None:
    model = EZV2("MlpPolicy", SpacesEnv(space, spaces.Discrete(2)), **TINY)
    with pytest.raises(ValueError, match="the batch of observations is empty"):
        model.predict(np.zeros((0, *(space.shape or ())), space.dtype), deterministic=True, n_simulations=n_simulations)


def test_predict_from_nan() -> None:
    model = EZV2("MlpPolicy", gym.make("CartPole-v1"), **TINY)
    with pytest.raises(ValueError, match="observation has NaN"):
        model.predict(np.array([0.0, np.nan, 0.0, 0.0]))
