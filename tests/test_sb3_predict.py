"""``predict`` and ``evaluate_policy``: what they take, what they give, and what they leave as it is."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch as th
from common import BOX, SpacesEnv, weights
from gymnasium import spaces
from sb3_agents import CONTINUOUS, DICT, DISCRETE, IMAGE, OBSERVATIONS, POLICIES, agent, batch_of, monitored, vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from sb3_ezv2 import EZV2

AGENTS: dict[Any, EZV2] = {}


def trained(policy: str = "MlpPolicy", actions: spaces.Space = DISCRETE) -> EZV2:
    """One agent of each kind for the whole file; no test changes it."""
    key = policy, str(actions)
    if key not in AGENTS:
        AGENTS[key] = agent(policy, vec_env(observations=OBSERVATIONS[policy], actions=actions)).learn(14)
    return AGENTS[key]


@pytest.mark.parametrize("actions", [DISCRETE, spaces.Discrete(3, start=-2), CONTINUOUS], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_one_or_many(policy: str, actions: spaces.Space) -> None:
    model, space = trained(policy, actions), OBSERVATIONS[policy]
    assert actions.shape is not None
    for deterministic in (True, False):
        for n in (1, 3):
            action, state = model.predict(batch_of(space, n), deterministic=deterministic)
            assert state is None and isinstance(action, np.ndarray) and action.shape == (n, *actions.shape)
            assert all(actions.contains(np.asarray(x, actions.dtype)) for x in action)
        action, state = model.predict(space.sample(), deterministic=deterministic)
        assert state is None and action.shape == actions.shape and actions.contains(np.asarray(action, actions.dtype))


def test_lists_numbers_and_other_types() -> None:
    model = trained()
    obs = BOX.sample()
    expected, _ = model.predict(obs, deterministic=True)
    for same in (obs.tolist(), obs.astype(np.float64), th.as_tensor(obs), obs[None][0]):
        assert model.predict(same, deterministic=True)[0] == expected  # type: ignore[arg-type]
    assert model.predict([obs.tolist()] * 2, deterministic=True)[0].tolist() == [expected] * 2  # type: ignore[arg-type]
    assert model.predict(np.asfortranarray(batch_of(BOX, 4))[::2])[0].shape == (2,)
    counting = agent(env=vec_env(observations=spaces.Discrete(4)))
    for one in (2, np.int64(2), np.array(2)):
        assert counting.predict(one)[0].shape == ()  # type: ignore[arg-type]
    assert counting.predict(np.array([2, 0, 1]))[0].shape == (3,)


@pytest.mark.parametrize("policy", ["CnnPolicy", "MultiInputPolicy"])
def test_what_predict_is_given_stays_as_it_is(policy: str) -> None:
    obs = batch_of(OBSERVATIONS[policy], 2)
    arrays = obs if isinstance(obs, dict) else {"": obs}
    before = {key: x.copy() for key, x in arrays.items()}
    trained(policy).predict(obs)
    for key, x in arrays.items():
        assert isinstance(x, np.ndarray) and x.shape == before[key].shape
        np.testing.assert_array_equal(x, before[key])


def test_hidden_states_are_handed_through() -> None:
    model, obs = trained(), batch_of(BOX, 2)
    state = (np.zeros(3),)
    starts = np.ones(2, bool)
    action, after = model.predict(obs, state, starts, True)
    assert after is state
    np.testing.assert_array_equal(action, model.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize(
    "policy, wrong, message",
    [
        ("MlpPolicy", np.zeros(4), r"\(4,\).*please use \(3,\) or \(n_env, 3\)"),
        ("MlpPolicy", np.zeros((2, 4)), r"\(2, 4\).*please use \(3,\)"),
        ("MlpPolicy", np.zeros((2, 1, 3)), r"\(2, 1, 3\).*please use \(3,\)"),
        ("MlpPolicy", 0.5, r"shape \(\).*please use \(3,\)"),
        ("MlpPolicy", (np.zeros(3), {}), "mixing Gym API"),
        ("CnnPolicy", np.zeros((16, 18, 4), np.uint8), r"\(16, 18, 4\).*please use \(3, 16, 18\)"),
        ("CnnPolicy", np.zeros((16, 18), np.uint8), r"of shape \(16, 18\).*please use \(3, 16, 18\)"),
        ("MultiInputPolicy", {**DICT.sample(), "camera": np.zeros(3, np.uint8)}, r"camera of shape \(3,\).*use \(3, 16, 18\)"),
        ("CnnPolicy", np.zeros((2, 18, 16, 3), np.uint8), r"\(2, 18, 16, 3\).*please use \(3, 16, 18\)"),
        ("MultiInputPolicy", {**DICT.sample(), "speed": np.zeros(3)}, r"\(3,\).*please use \(2,\)"),
    ],
    ids=lambda value: value if isinstance(value, str) and "Policy" in value else "",
)
def test_shapes_that_do_not_fit(policy: str, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(policy).predict(wrong)


@pytest.mark.parametrize(
    "space, wrong",
    [
        (spaces.Discrete(4), np.zeros((2, 2), np.int64)),
        (spaces.MultiBinary(3), np.zeros(4, np.int8)),
        (spaces.MultiDiscrete([2, 3]), np.zeros((2, 3), np.int64)),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_discrete_observations(space: spaces.Space, wrong: np.ndarray) -> None:
    model = agent(env=vec_env(observations=space))
    with pytest.raises(ValueError, match=re.escape(f"Unexpected observation shape {wrong.shape}")):
        model.predict(wrong)


def test_dictionaries_that_do_not_fit() -> None:
    with pytest.raises(AssertionError, match="is a dict but the obs space is Box"):
        trained().predict({"a": BOX.sample()})
    keys = r"must be a dictionary with the keys \['camera', 'gear', 'speed'\], not"
    cases: list[tuple[Any, str]] = [
        ({**DICT.sample(), "brake": np.zeros(1)}, r"keys \['brake', 'camera', 'gear', 'speed'\]"),
        ({"camera": IMAGE.sample(), "gear": 1}, r"keys \['camera', 'gear'\]"),
        (BOX.sample(), "a ndarray"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=f"{keys} .*{message}"):
            trained("MultiInputPolicy").predict(wrong)


@pytest.mark.parametrize("policy", POLICIES)
def test_predicting_changes_no_weight_no_statistic_and_no_optimizer(policy: str) -> None:
    model = trained(policy)
    before, optimizer = weights(model), str(model.policy.optimizer.state_dict())
    counts = [x for name, x in model.policy.state_dict().items() if name.endswith("num_batches_tracked")]
    assert sum(int(x.sum()) for x in counts) > 0  # training has moved the statistics
    for mode in (True, False):
        model.policy.set_training_mode(mode)
        for deterministic in (True, False):
            model.predict(batch_of(OBSERVATIONS[policy], 5), deterministic=deterministic)
            # as all policies of SB3, it is left in evaluation mode
            assert not model.policy.training and not any(x.training for x in model.policy.networks())
    assert th.equal(weights(model), before) and str(model.policy.optimizer.state_dict()) == optimizer
    assert all(x.grad is None or not x.grad.requires_grad for x in model.policy.parameters())


@pytest.mark.parametrize("policy", POLICIES)
def test_training_and_evaluation_mode(policy: str) -> None:
    """With a learning rate of 0 only the running statistics of the trained network, and their average, move."""
    model = agent(policy, learning_rate=0.0, tau=1.0).learn(10)
    before = {name: x.clone() for name, x in model.policy.state_dict().items()}
    modes: list[list[bool]] = []
    step = model.policy.optimizer.step

    def spy() -> None:
        modes.append([network.training for network in model.policy.networks()])
        step()

    model.policy.optimizer.step = spy  # type: ignore[method-assign, assignment]
    model.learn(3, reset_num_timesteps=False)
    assert modes == 3 * [[True, False, False, False, False]] and not model.policy.training
    moved = {name for name, x in model.policy.state_dict().items() if not th.equal(x, before[name])}
    kinds = ("running_mean", "running_var", "num_batches_tracked", "normalizer.mean", "normalizer.var", "normalizer.batches")
    scales = {name for name in moved if name.endswith("support.scale")}
    assert len(moved) > len(scales)
    assert all(name.startswith(("network.", "averaged_network.")) and name.endswith(kinds) for name in moved - scales), moved


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_actions(policy: str) -> None:
    runs = []
    for seed in (1, 1, 2):
        env = vec_env(observations=OBSERVATIONS[policy], actions=CONTINUOUS, seed=seed)
        model = agent(policy, env, seed=seed).learn(16)
        assert model.replay_buffer is not None
        obs = OBSERVATIONS[policy]
        obs.seed(0)
        batch = batch_of(obs, 4)
        runs.append([model.replay_buffer.actions[:16], *(model.predict(batch, deterministic=x)[0] for x in (True, False))])
    for first, second, other in zip(*runs):
        np.testing.assert_array_equal(first, second)
        assert not np.array_equal(first, other)


# ---------------------------------------------------------------------- evaluate_policy


def test_evaluation_calls_back_and_gives_every_episode() -> None:
    model, calls = trained(), []

    def callback(locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        calls.append((locals_["i"], locals_["done"]))

    rewards, lengths = evaluate_policy(
        model, vec_env(2, length=4), n_eval_episodes=5, return_episode_rewards=True, callback=callback
    )
    assert isinstance(rewards, list) and isinstance(lengths, list) and lengths == 5 * [4]
    assert len(calls) == 20 and sum(done for _, done in calls) == 5
    assert sum(i == 0 for i, _ in calls) == 8  # the episodes are divided evenly
    mean, std = evaluate_policy(model, vec_env(2, length=4), n_eval_episodes=5, deterministic=False)
    assert 0 <= mean <= 4 and std >= 0  # type: ignore[operator]
    with pytest.raises(AssertionError, match="Mean reward below threshold"):
        evaluate_policy(model, vec_env(length=4), n_eval_episodes=1, reward_threshold=5.0)


@pytest.mark.parametrize("wrapped", ["not", "Monitor", "VecMonitor"])
def test_evaluation_warns_without_a_monitor(wrapped: str, recwarn: pytest.WarningsRecorder) -> None:
    env: Any = SpacesEnv(BOX, DISCRETE, 4)
    if wrapped == "Monitor":
        env = monitored(length=4)
    elif wrapped == "VecMonitor":
        env = VecMonitor(DummyVecEnv([lambda: SpacesEnv(BOX, DISCRETE, 4)]))
    evaluate_policy(trained(), env, n_eval_episodes=2)
    warned = [str(x.message) for x in recwarn if "is not wrapped with a ``Monitor``" in str(x.message)]
    assert len(warned) == (wrapped == "not")
    evaluate_policy(trained(), SpacesEnv(BOX, DISCRETE, 4), n_eval_episodes=1, warn=False)
    assert len([x for x in recwarn if "Monitor" in str(x.message)]) == len(warned)


def test_a_policy_alone_can_be_evaluated() -> None:
    for model in (trained(), trained("CnnPolicy", CONTINUOUS)):
        env = model.get_env()
        assert env is not None
        results = [evaluate_policy(x, env, n_eval_episodes=2, return_episode_rewards=True)[1] for x in (model, model.policy)]
        assert results[0] == results[1] == [5, 5]


def test_images_with_channels_last_or_first_are_the_same() -> None:
    """Of a rectangle, so that no axis can be mistaken for another."""
    model, batch = trained("CnnPolicy", CONTINUOUS), batch_of(IMAGE, 3)
    last, first = (model.predict(x, deterministic=True)[0] for x in (batch, np.moveaxis(batch, -1, 1)))
    np.testing.assert_array_equal(last, first)
    np.testing.assert_allclose(model.predict(batch[0], deterministic=True)[0], last[0], atol=1e-4)


@pytest.mark.parametrize("actions", [DISCRETE, CONTINUOUS], ids=str)
def test_threads_that_predict_with_one_agent(actions: spaces.Space) -> None:
    model = trained(actions=actions)
    observations = [model.observation_space.sample() for _ in range(60)]
    simulations = [None, 2, 0]
    expected = [[model.predict(x, deterministic=True, n_simulations=n)[0] for n in simulations] for x in observations]

    def differences() -> int:
        found = [[model.predict(x, deterministic=True, n_simulations=n)[0] for n in simulations] for x in observations]
        return sum(not np.array_equal(a, b) for rows in zip(found, expected) for a, b in zip(*rows))

    with ThreadPoolExecutor(4) as pool:
        assert sum(job.result() for job in [pool.submit(differences) for _ in range(4)]) == 0


def test_the_copies_of_the_network_are_never_trained() -> None:
    policy = trained().policy
    for mode in (True, False):
        policy.train(mode)
        assert [network.training for network in policy.networks()] == [mode, False, False, False, False]
    assert not policy.eval().network.training
