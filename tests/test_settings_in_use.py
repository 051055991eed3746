"""Settings that are changed on loading or between two calls of learn() are the ones in use, or are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from common import BOX, SpacesEnv, make, weights
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from sb3_ezv2 import EZV2
from sb3_ezv2.replay_buffer import SequenceReplayBuffer

CHANGES: dict[str, Any] = dict(
    gamma=0.5, unroll_steps=3, td_steps=9, td_steps_min=2, priority_alpha=1.0, priority_beta=0.5, n_simulations=8,
    value_target="search", tau=1.0, cache_refresh_fraction=0.5, learning_rate=1e-5, train_freq=4,
)  # fmt: skip


def check_in_use(model: EZV2) -> None:
    buffer, reanalyzer, policy = model.replay_buffer, model._reanalyzer, model.policy
    assert buffer is not None and reanalyzer is not None
    assert (buffer.gamma, buffer.unroll_steps, buffer.td_steps, buffer.td_steps_min) == (0.5, 3, 9, 2)
    assert (buffer.alpha, buffer.beta) == (1.0, 0.5)
    assert buffer.sample(4).actions.shape[1] == 3
    for search in (policy.search, policy.acting_search, policy.target_search):
        assert (search.settings.gamma, search.settings.n_simulations) == (0.5, 8)
    assert reanalyzer.search is policy.target_search and reanalyzer.bootstrap is policy.target_network
    assert (reanalyzer.value_target, reanalyzer.refresh_fraction) == ("search", 0.5)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5) and model._n_updates == 20 + 5


def test_attributes_changed_between_two_calls() -> None:
    model = make().learn(60)
    for name, value in CHANGES.items():
        setattr(model, name, value)
    check_in_use(model.learn(20, reset_num_timesteps=False))


def test_arguments_of_loading_a_checkpoint(tmp_path: Path) -> None:
    make().learn(60).save_checkpoint(tmp_path / "agent")
    model = EZV2.load_checkpoint(tmp_path / "agent", env="CartPole-v1", device="cpu", **CHANGES)
    check_in_use(model.learn(20, reset_num_timesteps=False))


def test_the_step_that_was_open_may_have_been_searched_with_other_settings(tmp_path: Path) -> None:
    def save(*_: Any) -> bool:
        if model.num_timesteps == 60:
            model.save_checkpoint(tmp_path / "agent")
        return True

    model = make("Pendulum-v1")
    model.learn(61, callback=save)
    loaded = EZV2.load_checkpoint(tmp_path / "agent", env="Pendulum-v1", device="cpu", n_sampled_actions=8)
    assert loaded._rollout.search is not None
    loaded.learn(10, reset_num_timesteps=False)


def test_an_agent_of_one_environment_predicts_in_many(tmp_path: Path) -> None:
    make(buffer_size=100, train_freq=(1, "episode")).save(tmp_path / "agent")
    model = EZV2.load(tmp_path / "agent", env=make_vec_env("CartPole-v1", 16), device="cpu")
    env = model.get_env()
    assert env is not None
    obs = env.reset()
    assert isinstance(obs, np.ndarray) and len(model.predict(obs, deterministic=True)[0]) == 16
    with pytest.raises(ValueError, match="enlarge buffer_size"):
        model.learn(16)


def test_what_is_changed_is_checked() -> None:
    model = make().learn(60)
    for name, value, message in (("vf_coef", -1.0, "vf_coef must be"), ("td_steps", 10**6, "enlarge buffer_size")):
        before = getattr(model, name)
        setattr(model, name, value)
        with pytest.raises(ValueError, match=message):
            model.learn(10, reset_num_timesteps=False)
        setattr(model, name, before)
    model.learn(10, reset_num_timesteps=False)


def test_the_cache_goes_on_unless_its_searches_would_be_others() -> None:
    model = make().learn(60)
    assert model.replay_buffer is not None
    cache = model.replay_buffer.cache
    model.learn(10, reset_num_timesteps=False)
    assert model.replay_buffer.cache is cache
    model.n_simulations = 5
    model.learn(10, reset_num_timesteps=False)
    assert model.replay_buffer.cache not in (cache, None)
    model.reanalyze_cache = False
    model.learn(10, reset_num_timesteps=False)
    assert model._reanalyzer is not None and model._reanalyzer.cache is None and model.replay_buffer.cache is None


@pytest.mark.parametrize("before, after, expected", [(0.5, 1.0, 0.09), (0.5, 0.0, 1.0), (0.0, 0.5, 1.0)])
def test_priorities_follow_their_exponent(before: float, after: float, expected: float) -> None:
    buffer = SequenceReplayBuffer(100, BOX, spaces.Discrete(2), "cpu", alpha=before)
    buffer.weights[3] = 0.3 if before > 0 else 1.0
    buffer.set_sampling(0.9, 5, 20, 5, after, 1.0)
    assert buffer.weights[3] == pytest.approx(expected) and not buffer.weights[4:].any()


def test_a_loss_for_observations_can_be_switched_off_but_not_on(tmp_path: Path) -> None:
    make("Pendulum-v1", observation_coef=1.0).learn(50).save(tmp_path / "with")
    model = EZV2.load(tmp_path / "with", env="Pendulum-v1", observation_coef=0.0, device="cpu").learn(60)
    assert "train/observation_loss" not in model.logger.name_to_value
    make("Pendulum-v1").save(tmp_path / "without")
    with pytest.raises(ValueError, match="this agent was made with observation_coef=0"):
        EZV2.load(tmp_path / "without", env="Pendulum-v1", observation_coef=1.0, device="cpu")


class Rewards(SpacesEnv):
    """Rewards of one size. :param size: of them"""

    def __init__(self, size: float):
        super().__init__(BOX, spaces.Discrete(2))
        self.size = size

    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        return obs, self.size, *rest


def test_a_trained_network_keeps_its_unit() -> None:
    """Its outputs would be other ones in the unit of the new environment's rewards."""
    trained = make(Rewards(1.0)).learn(200)
    other = make(Rewards(0.1), learning_rate=0.0)
    other.set_parameters(trained.get_parameters())
    obs = th.zeros(1, 3)
    other.policy.set_training_mode(False)
    value = other.policy.network.values(obs)
    other.learn(60)
    assert other._n_updates > 0 and other.policy.network.reward_support.scale == 1.0
    np.testing.assert_allclose(other.policy.network.values(obs).detach(), value.detach(), rtol=0.2)  # statistics follow
    fresh = make(Rewards(0.1))
    fresh.set_parameters(make(Rewards(1.0)).get_parameters())
    assert fresh.learn(60).policy.network.reward_support.scale == pytest.approx(0.1)


def test_acting_searches_are_remembered_only_if_their_network_is_new_enough() -> None:
    """Also after the interval of the refreshes has changed with the length of the run."""
    model = make(acting_update_interval=1000, target_update_interval=30).learn(80)
    assert model._n_updates == 40 and not model._acting_is_as_new_as_target()
    model.target_update_interval = 400
    model.learn(1, reset_num_timesteps=False)
    assert not model._acting_is_as_new_as_target()


def test_agents_of_a_version_that_did_not_count_refreshes(tmp_path: Path) -> None:
    model = make(acting_update_interval=1000, target_update_interval=30).learn(80)
    model.save_checkpoint(tmp_path / "agent")
    old = EZV2.load_checkpoint(tmp_path / "agent", env="CartPole-v1", device="cpu")
    old._acting_refreshed_at = old._target_refreshed_at = None
    runs = [weights(agent.learn(30, reset_num_timesteps=False)) for agent in (model, old)]
    assert not old._acting_is_as_new_as_target() and th.equal(*runs)


def test_a_copy_of_an_agent_learns_as_the_agent() -> None:
    model = make().learn(60)
    twin = copy.deepcopy(model)
    assert model._callback is None
    runs = [weights(agent.learn(30, reset_num_timesteps=False)) for agent in (model, twin)]
    assert th.equal(*runs)
