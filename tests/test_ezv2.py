"""What EZV2 does in a run: actions, updates, schedules, episodes, determinism. How it fits into SB3: ``test_sb3_*.py``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from common import BOX, TINY, SpacesEnv, make, weights
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ezv2 import EZV2, MlpPolicy
from sb3_ezv2.networks import BaseNetwork
from sb3_ezv2.replay_buffer import MIN_PRIORITY
from sb3_ezv2.schedules import averaging_weight
from sb3_ezv2.search import SearchResult

ACTION_SPACES = [
    spaces.Discrete(3),
    spaces.Discrete(2, start=5),
    spaces.Discrete(1),
    spaces.Box(-1.0, 1.0, (1,), np.float32),
    spaces.Box(np.array([-3.0, 0.0]), np.array([-1.0, 100.0]), (2,), np.float64),
    spaces.Box(-2.0, 2.0, (2, 2), np.float32),
    spaces.Box(np.array([0.0, 1.0], np.float32), np.array([1.0, 1.0], np.float32)),
]


@pytest.mark.parametrize("action_space", ACTION_SPACES, ids=str)
def test_action_spaces(action_space: spaces.Space) -> None:
    assert action_space.shape is not None
    model = make(SpacesEnv(BOX, action_space)).learn(60)
    for deterministic in (True, False):
        observations = np.stack([BOX.sample() for _ in range(7)])
        actions, _ = model.predict(observations, deterministic=deterministic)
        assert actions.shape == (7, *action_space.shape)
        assert all(action_space.contains(action.astype(action_space.dtype)) for action in actions)
        action, _ = model.predict(observations[0], deterministic=deterministic)
        assert np.shape(action) == action_space.shape
    # What is stored is scaled: bounds never reach the model
    assert model.replay_buffer is not None
    stored = model.replay_buffer.actions[model.replay_buffer.stamps >= 0]
    if isinstance(action_space, spaces.Box):
        assert stored.shape[1:] == (int(np.prod(action_space.shape)),) and np.abs(stored).max() <= 1
    else:
        assert isinstance(action_space, spaces.Discrete)
        assert stored.min() >= 0 and stored.max() < action_space.n


def test_fewer_actions_short_episodes_small_buffer() -> None:
    """These simply work: n_sampled_actions above the actions, episodes shorter than the unroll, a buffer below a batch."""
    model = make(SpacesEnv(BOX, spaces.Discrete(2), length=1), n_sampled_actions=16).learn(60)
    assert model._n_updates == 20
    model = make(SpacesEnv(BOX, spaces.Discrete(2), length=3, truncates=True), buffer_size=30, batch_size=64).learn(120)
    assert model._n_updates == 80
    model = make(SpacesEnv(BOX, spaces.Discrete(2), length=100), learning_starts=0).learn(30)
    assert model._n_updates == 29  # the first step has no next observation yet


@pytest.mark.parametrize("n_envs, gradient_steps, updates", [(1, 1, 40), (3, 1, 14), (3, -1, 42), (2, 5, 100)])
def test_number_of_updates(n_envs: int, gradient_steps: int, updates: int) -> None:
    env = make_vec_env("CartPole-v1", n_envs=n_envs)
    model = make(env, gradient_steps=gradient_steps).learn(80)
    assert model._n_updates == updates


def test_train_freq_in_episodes_and_final_gradient_steps() -> None:
    env = SpacesEnv(BOX, spaces.Discrete(2), length=10)
    model = make(env, train_freq=(1, "episode"), gradient_steps=3, final_gradient_steps=7).learn(80)
    assert model._n_updates == 4 * 3 + 7


@pytest.mark.parametrize(
    "settings",
    [
        dict(value_target="td"),
        dict(value_target="search"),
        dict(mixed_value_start=5, fresh_transitions=10),
        dict(tau=1.0, td_steps=5),
        dict(reanalyze_cache=False),
        dict(policy_target="best_action"),
        dict(policy_target="candidates"),
        dict(td_steps=3, unroll_steps=6, td_steps_min=1, td_steps_age=5),
        dict(gamma=1.0, ent_coef=0.0, consistency_coef=0.0),
        dict(n_simulations=1, n_sampled_actions=1, n_inner_actions=1),
        dict(learning_rate=lambda progress: 1e-3 * progress),
        dict(
            policy_kwargs=dict(
                net_arch=[8, 12],
                state_dim=8,
                n_blocks=2,
                value_support=(299.0, 51, "h"),
                reward_support=[2.0, 51, "h"],
                reward_scale=1.0,
                optimizer_class=th.optim.SGD,
                optimizer_kwargs=dict(momentum=0.9),
            )
        ),
    ],
    ids=lambda settings: ",".join(settings),
)
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_settings_run(settings: dict[str, Any], env_id: str) -> None:
    model = make(env_id, **settings)
    before = weights(model)
    model.learn(60)
    assert model._n_updates == 20 and not th.equal(before, weights(model))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_same_seed_same_run(env_id: str) -> None:
    runs = [weights(make(env_id, seed=seed).learn(80)) for seed in (3, 3, 4)]
    assert th.equal(runs[0], runs[1])
    assert not th.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    "env_id, expected",
    [
        ("CartPole-v1", [121.99881, 200.52205, 153.53214, 158.70314, 142.52962, 8109.65105, 1780.20936]),
        ("Pendulum-v1", [120.67379, 199.44796, 154.10502, 157.07992, 146.9889, 8108.79509, 1779.22124]),
    ],
)
def test_a_short_run_gives_the_weights_it_always_gave(env_id: str, expected: list[float]) -> None:
    """
    Sums of the absolute weights of each part, recorded before images came in: networks, replay and losses of states are still
    made and drawn in the same order. Machines differ in their last digits, another order of random numbers in the third. Those
    of Pendulum were recorded anew when the noise of Box searches got a generator of its own; they moved by up to 4e-4.
    """
    policy_kwargs = {**TINY["policy_kwargs"], "value_support": (22025.0, 101, "symexp")}
    settings = dict(gamma=0.99, tau=0.01, value_target="td", td_steps_age=1, priority_alpha=1.0, exploration_eps=0.0)
    network = make(env_id, policy_kwargs=policy_kwargs, **settings).learn(60).policy.network
    parts = [list(part.parameters()) for part in network.children()]
    sums = [sum(float(x.double().abs().sum()) for x in part) for part in parts if part]
    np.testing.assert_allclose(sums, expected, rtol=2e-3)


class _Evaluate(BaseCallback):
    """predict(), evaluation and global random draws in the middle of training."""

    def _on_step(self) -> bool:
        if self.n_calls % 10 == 0:
            observations = np.stack([self.training_env.observation_space.sample() for _ in range(3)])
            self.model.predict(observations, deterministic=True)
            self.model.predict(observations, deterministic=False)
            evaluate_policy(self.model, make_vec_env("CartPole-v1", 2), n_eval_episodes=2, warn=False)
            np.random.rand(5), th.rand(5)
        return True


def test_evaluating_does_not_change_training() -> None:
    settings = dict(learning_starts=0)  # the uniform actions before come from the space's own generator
    assert th.equal(weights(make(**settings).learn(60)), weights(make(**settings).learn(60, callback=_Evaluate())))


def test_predict_is_deterministic_and_keeps_the_policy() -> None:
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        model = make(env_id).learn(60)
        observations = np.stack([model.observation_space.sample() for _ in range(9)])
        state = weights(model)
        first, _ = model.predict(observations, deterministic=True)
        for index in range(9):  # a function of the observation alone, whatever else is in the batch
            single, _ = model.predict(observations[index], deterministic=True)
            np.testing.assert_allclose(single, first[index], atol=1e-4)
        assert th.equal(state, weights(model))
        samples = [model.predict(observations, deterministic=False)[0] for _ in range(5)]
        assert any(not np.array_equal(samples[0], other) for other in samples[1:])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_save_load_goes_on_identically(tmp_path: Path, env_id: str) -> None:
    model = make(make_vec_env(env_id, 2, seed=1), gradient_steps=-1).learn(100)
    model.save(tmp_path / "agent")
    model.save_replay_buffer(tmp_path / "replay")
    loaded = EZV2.load(tmp_path / "agent", env=make_vec_env(env_id, 2, seed=1))
    loaded.load_replay_buffer(tmp_path / "replay")
    assert th.equal(weights(model), weights(loaded))
    observations = np.stack([model.observation_space.sample() for _ in range(5)])
    np.testing.assert_array_equal(
        model.predict(observations, deterministic=True)[0], loaded.predict(observations, deterministic=True)[0]
    )
    # Both from a reset of equally seeded environments
    model.set_env(make_vec_env(env_id, 2, seed=1))
    for agent in (model, loaded):
        agent.get_env().seed(1)  # type: ignore[union-attr]
        agent.learn(50, reset_num_timesteps=False)
    assert model.num_timesteps == loaded.num_timesteps == 150
    assert th.equal(weights(model), weights(loaded))
    assert model.policy.optimizer.state_dict()["state"].keys() == loaded.policy.optimizer.state_dict()["state"].keys()


def test_episodes_cut_by_a_reset_are_truncated() -> None:
    model = make(SpacesEnv(BOX, spaces.Discrete(2), length=1000)).learn(50)
    model.learn(50)
    assert model.replay_buffer is not None
    kinds = model.replay_buffer.kinds[model.replay_buffer.stamps >= 0]
    assert kinds.tolist().count(2) == 1 and kinds[49] == 2


def test_a_polyak_network_can_be_asked_for_later() -> None:
    """Where the target network serves as bootstrap, the other one is kept as new as it."""
    model = make("CartPole-v1", tau=1.0).learn(100)
    target, bootstrap = model.policy.target_network.float_tensors(), model.policy.bootstrap_network.float_tensors()
    assert all(th.equal(a, b) for a, b in zip(target, bootstrap))
    model.tau = 0.05
    model.learn(20, reset_num_timesteps=False)
    assert model._reanalyzer is not None and model._reanalyzer.bootstrap is model.policy.bootstrap_network
    assert not model.policy.bootstrap_network.is_untrained()


def test_warmup_and_schedule_of_the_learning_rate() -> None:
    rates: list[float] = []

    class Record(BaseCallback):
        def _on_step(self) -> bool:
            rates.append(self.model.policy.optimizer.param_groups[0]["lr"])
            return True

    make("CartPole-v1", learning_rate=0.01, warmup_fraction=0.5, learning_starts=20).learn(120, callback=Record())
    learning = rates[21:]  # the rate seen at a step is that of the update before
    np.testing.assert_allclose(learning[:50], 0.01 * np.arange(1, 51) / 50, rtol=1e-6)
    np.testing.assert_allclose(learning[50:], 0.01)


def test_what_follows_the_length_of_the_run() -> None:
    def plan(steps: int, **settings: Any) -> tuple[int, int, int, int, int]:
        model = make("CartPole-v1", **{"target_update_interval": None, **settings})
        model._setup_learn(steps)
        buffer, reanalyzer = model.replay_buffer, model._reanalyzer
        assert buffer is not None and reanalyzer is not None
        targets = reanalyzer.mixed_value_start, reanalyzer.fresh_transitions
        return buffer.td_steps_age, *targets, model._target_update_interval, model._warmup_updates

    assert plan(2_040) == (20, 300, 500, 48, 20)  # 40 steps without updates
    assert plan(2_040, gradient_steps=2) == (20, 300, 500, 48, 40)
    assert plan(90_040) == (450, 3_600, 9_004, 180, 900)
    # No more than the buffer holds, or of some transitions search-based values would never be used
    assert plan(90_040, buffer_size=10_000) == (50, 3_600, 1_000, 180, 900)
    assert plan(400_040)[3] == 400
    # A budget without limit, for a callback that stops the run
    assert plan(10**10) == (500, 8_000, 10_000, 400, 2_000)
    assert plan(10**10, buffer_size=10**6) == (1_000, 8_000, 20_000, 400, 2_000)
    settings = dict(td_steps_age=7, mixed_value_start=0, fresh_transitions=0, target_update_interval=700)
    assert plan(2_040, warmup_fraction=0.5, **settings) == (7, 0, 0, 700, 1_000)


@pytest.mark.parametrize(
    "settings", [dict(value_target="td", tau=0.01), dict(priority_alpha=0.0)], ids=["n-step values", "uniform"]
)
def test_rewards_of_any_scale_are_learned_alike(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run with rewards times a power of two makes the same decisions: supports, search and priorities scale."""

    class Scaled(gym.RewardWrapper):
        def __init__(self, env: gym.Env, factor: float):
            super().__init__(env)
            self.factor = factor

        def reward(self, reward: Any) -> float:
            return float(reward) * self.factor

    actions = []
    for factor in (1.0, 2.0**-10, -(2.0**20), 2.0**20):
        # The floor of the priorities is in the units of the rewards: the one thing that does not scale by itself
        monkeypatch.setattr("sb3_ezv2.replay_buffer.MIN_PRIORITY", MIN_PRIORITY * abs(factor))
        model = make(Scaled(gym.make("Pendulum-v1"), factor), **settings).learn(100)
        assert model.replay_buffer is not None
        actions.append(model.replay_buffer.actions[:90])
    np.testing.assert_allclose(actions[0], actions[1], atol=2e-3)
    np.testing.assert_allclose(actions[0], actions[3], atol=2e-3)
    assert not np.allclose(actions[0], actions[2], atol=2e-3)  # the other sign is another task


def test_time_limit_bootstraps_and_termination_does_not() -> None:
    """A reward of 1 for ever, in episodes of 4 steps: V is 1 / (1 - gamma) if truncated, else about the steps left."""
    values = {}
    for truncates in (True, False):
        env = SpacesEnv(spaces.Box(0.0, 1.0, (1,), np.float32), spaces.Discrete(1), length=4, truncates=truncates)
        model = make(env, gamma=0.8, target_update_interval=50, learning_rate=1e-3, value_target="td").learn(500)
        with th.no_grad():
            values[truncates] = float(model.policy.network.eval().values(th.rand(50, 1)).mean())
    assert values[True] == pytest.approx(1 / (1 - 0.8), abs=0.7)
    # the observation does not tell the steps left: the mean of 1, 1.8, 2.44, 2.95
    assert values[False] == pytest.approx(2.05, abs=0.6)


def test_any_number_of_envs_stores_each_episode_apart() -> None:
    env = DummyVecEnv([partial(SpacesEnv, BOX, spaces.Discrete(2), length=n) for n in (3, 5, 7)])
    model = make(env).learn(105)
    buffer = model.replay_buffer
    assert buffer is not None and buffer.total_transitions == 105
    for index, length in enumerate((3, 5, 7)):
        ring = slice(index * buffer.ring, index * buffer.ring + int(buffer.written[index]))
        finals = np.flatnonzero(buffer.kinds[ring])
        np.testing.assert_array_equal(np.diff(finals), length + 1)


@pytest.mark.parametrize(
    ("action_space", "expected"),
    [
        (spaces.Discrete(3), 0.3),
        (spaces.Box(-1, 1, (2,)), 0.1),
        (spaces.MultiDiscrete([2, 2]), 0.3),  # four actions: all of them are candidates, with the policy's priors
        (spaces.MultiDiscrete([3, 2]), 0.1),
    ],
)
def test_searches_of_all_actions_have_settings_of_their_own(action_space: spaces.Space, expected: float) -> None:
    model = make(SpacesEnv(BOX, action_space))
    assert model.c_scale is None and model.search_value is None and model.exploration_eps is None
    for search in (model.policy.search, model.policy.target_search):
        assert search.settings.c_scale == expected
        assert search.settings.improved_value == (expected == 0.3)
    assert make(SpacesEnv(BOX, action_space), c_scale=0.7).policy.search.settings.c_scale == 0.7
    for value in ("mean", "improved"):
        search = make(SpacesEnv(BOX, action_space), search_value=value).policy.search
        assert search.settings.improved_value == (value == "improved")


class _TakenActions(gym.Wrapper):
    """Remembers the actions that were taken."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.actions: list[np.ndarray] = []

    def step(self, action: Any) -> Any:
        self.actions.append(np.array(action))
        return super().step(action)


@pytest.mark.parametrize("action_space", [spaces.Discrete(3, start=5), spaces.Box(-1.0, 3.0, (2,), np.float32)], ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.5, 1.0, None])
def test_a_share_of_the_actions_is_random_while_learning(action_space: spaces.Space, eps: float | None) -> None:
    discrete = isinstance(action_space, spaces.Discrete)
    env = _TakenActions(SpacesEnv(BOX, action_space))
    model = make(env, learning_starts=50, exploration_eps=eps, gradient_steps=0)
    searched, act = [], model.policy.act

    def recording(*args: Any) -> SearchResult:
        result = act(*args)
        searched.append(result.best().numpy().copy())
        return result

    model.policy.act = recording  # type: ignore[method-assign,assignment]
    model.learn(450)
    buffer = model.replay_buffer
    assert buffer is not None and len(searched) == 400
    taken = np.stack(env.actions)
    taken = taken - 5 if discrete else (taken + 1) / 2 - 1
    # What is stored is what was done, whoever chose it
    stored = buffer.actions[np.flatnonzero(buffer.kinds[: int(buffer.written[0])] == 0)]
    np.testing.assert_allclose(stored.reshape(taken.shape), taken, atol=1e-6)
    differs = np.abs(taken[50:] - np.concatenate(searched)).reshape(400, -1).max(1) > 1e-5
    share = (0.1 if discrete else 0.0) if eps is None else eps
    expected = share * 2 / 3 if discrete else share  # one of three random actions is that of the search
    assert abs(differs.mean() - expected) <= 3.5 * np.sqrt(expected * (1 - expected) / 400)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_the_average_grows_with_the_run(fraction: float) -> None:
    """The mean age of what is averaged is the same share of the updates so far, whenever it is looked at."""
    average_of_steps = 0.0
    for update in range(1, 5001):
        weight = averaging_weight(update, fraction)
        assert 0 < weight <= 1
        average_of_steps += weight * (update - average_of_steps)
        if update in (1000, 5000):
            assert 1 - average_of_steps / update == pytest.approx(fraction, rel=0.06)
    assert averaging_weight(1, fraction) == 1  # nothing is left of the weights before training
    assert averaging_weight(7, 0) == 1
    assert averaging_weight(4, 0.5) == 0.25  # all count alike


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_predictions_are_those_of_the_averaged_weights(env_id: str, tmp_path: Path) -> None:
    model = make(env_id, average_fraction=0.3, learning_rate=1e-2)
    policy, seen = model.policy, []
    follow = policy.follow

    def recording(follower: BaseNetwork, share: float) -> None:
        follow(follower, share)
        if follower is policy.averaged_network:
            seen.append([x.detach().double().clone() for x in policy.network.float_tensors()])

    policy.follow = recording  # type: ignore[method-assign]
    model.learn(60)
    # by hand: a weighted mean of all weights after an update
    weights = np.ones(len(seen))
    for update in range(2, len(seen) + 1):
        share = 1 - (1 - 1 / update) ** (1 / 0.3 - 1)
        weights[: update - 1] *= 1 - share
        weights[update - 1] = share
    assert len(seen) == model._n_updates == 20 and weights.sum() == pytest.approx(1)
    for index, tensor in enumerate(policy.averaged_network.float_tensors()):
        expected = sum(w * tensors[index] for w, tensors in zip(weights, seen))
        th.testing.assert_close(tensor.double(), expected, rtol=1e-4, atol=1e-6)
    # prediction asks that network, with and without a search, in the agent, in a file, and in nothing else
    obs = np.stack([model.observation_space.sample() for _ in range(3)])
    before = [model.predict(obs, deterministic=True, n_simulations=n)[0] for n in (None, 0)]
    del policy.follow
    model.save(tmp_path / "agent")
    with th.no_grad():
        for parameter in policy.network.parameters():
            parameter.zero_()
    for agent in (model, EZV2.load(tmp_path / "agent")):
        after = [agent.predict(obs, deterministic=True, n_simulations=n)[0] for n in (None, 0)]
        np.testing.assert_array_equal(after, before)


def test_without_averaging_predictions_are_those_of_the_trained_weights() -> None:
    model = make("CartPole-v1", average_fraction=0.0).learn(60)
    for averaged, trained in zip(model.policy.averaged_network.float_tensors(), model.policy.network.float_tensors()):
        assert th.equal(averaged, trained)
    other = make("CartPole-v1", average_fraction=0.5).learn(60)
    # what is averaged changes nothing of the training
    for ours, theirs in zip(model.policy.network.float_tensors(), other.policy.network.float_tensors()):
        assert th.equal(ours, theirs)
    assert not all(map(th.equal, other.policy.averaged_network.parameters(), model.policy.network.parameters()))


def test_observations_are_predicted_on_request(tmp_path: Path) -> None:
    plain = make("Pendulum-v1").learn(60)
    assert plain.policy.network.observation_head is None and "train/observation_loss" not in plain.logger.name_to_value
    plain.observation_coef = 10.0
    with pytest.raises(ValueError, match="this agent was made with observation_coef=0"):
        plain.learn(60)
    model = make("Pendulum-v1", observation_coef=10.0, learning_rate=3e-3)
    told: list[float] = []
    count = model._count

    def recording(stats: dict[str, th.Tensor]) -> None:
        count(stats)
        if "train/observation_loss" in stats:
            told.append(float(stats["train/observation_loss"]))

    model._count = recording  # type: ignore[method-assign]
    model.learn(400)
    assert len(told) == model._n_updates == 360 and np.mean(told[-20:]) < 0.3 * np.mean(told[:5])
    del model._count
    model.save(tmp_path / "agent")
    model.policy.save(str(tmp_path / "policy"))
    obs = np.stack([model.observation_space.sample() for _ in range(3)])
    expected = model.predict(obs, deterministic=True)[0]
    loaded, policy = EZV2.load(tmp_path / "agent"), MlpPolicy.load(str(tmp_path / "policy"))
    assert loaded.observation_coef == 10 and loaded.policy.network.observation_head is not None
    assert policy.predicts_observations
    for agent in (loaded, policy):
        np.testing.assert_array_equal(agent.predict(obs, deterministic=True)[0], expected)
    loaded.set_env(make_vec_env("Pendulum-v1"))
    loaded.learn(60)


class _Learned(FlattenExtractor):
    """Features that change in training."""

    def __init__(self, observation_space: spaces.Space):
        super().__init__(observation_space)
        self.layer = th.nn.Linear(self.features_dim, self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layer(super().forward(observations))


def test_what_cannot_be_predicted() -> None:
    with pytest.raises(ValueError, match="observation_coef is for features that stay what they are, but _Learned learns"):
        make(
            "Pendulum-v1", observation_coef=1.0, policy_kwargs={**TINY["policy_kwargs"], "features_extractor_class": _Learned}
        )
    make("Pendulum-v1", policy_kwargs={**TINY["policy_kwargs"], "features_extractor_class": _Learned})
