"""EZV2 from images as an SB3 user meets it: CnnPolicy and MultiInputPolicy, saving, loading, predicting, bad input."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from common import BOX, TINY, FaultyEnv, SpacesEnv, weights
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from sb3_ezv2 import EZV2, CnnPolicy, MlpPolicy
from sb3_ezv2.image_networks import ImageNetwork
from sb3_ezv2.validation import check_memory, free_memory

CHANNELS_LAST = spaces.Box(0, 255, (18, 16, 3), np.uint8)
GREY = spaces.Box(0, 255, (16, 16, 1), np.uint8)
MIXED = spaces.Dict(camera=CHANNELS_LAST, second=GREY, speed=spaces.Box(-1, 1, (2,), np.float32))
ACTION_SPACES = [spaces.Discrete(3), spaces.Box(-2.0, 2.0, (1,), np.float32), spaces.Box(-2.0, 2.0, (2, 2), np.float32)]
SIZES: dict[str, Any] = dict(
    channels=4, n_downsamples=2, head_channels=2, action_embedding_dim=2, projection_dim=4, net_arch=[8], lstm_dim=4
)
SETTINGS = {**TINY, "policy_kwargs": SIZES, "batch_size": 8, "learning_starts": 20, "seed": 0}


def make(space: spaces.Space = GREY, actions: spaces.Space = ACTION_SPACES[0], n_stack: int = 1, **settings: Any) -> EZV2:
    actions = copy.deepcopy(actions)  # each agent seeds its own
    env: Any = DummyVecEnv([partial(SpacesEnv, space, actions, length) for length in (7, 11)])
    env.seed(0)
    if n_stack > 1:
        env = VecFrameStack(env, n_stack)
    kwargs = {**SETTINGS, **settings}
    kwargs["policy_kwargs"] = {**SIZES, **settings.get("policy_kwargs", {})}
    return EZV2("MultiInputPolicy" if isinstance(space, spaces.Dict) else "CnnPolicy", env, gradient_steps=-1, **kwargs)


@pytest.mark.parametrize("value_prefix", [False, True])
@pytest.mark.parametrize("space", [GREY, MIXED], ids=["image", "dict"])
@pytest.mark.parametrize("actions", ACTION_SPACES, ids=str)
def test_learning_runs(space: spaces.Space, actions: spaces.Space, value_prefix: bool) -> None:
    model = make(space, actions, n_stack=3, policy_kwargs=dict(value_prefix=value_prefix))
    before = weights(model)
    model.learn(44)
    assert model._n_updates == 24 and not th.equal(before, weights(model))
    assert isinstance(model.policy.network, ImageNetwork)
    env = model.get_env()
    assert env is not None
    evaluate_policy(model, env, n_eval_episodes=2, warn=False)


def test_the_defaults_are_the_papers_networks() -> None:
    """V1 App. A.1 on 96x96: 64 planes of 6x6, projection of 512 and 1024, heads of 32."""
    model = EZV2("CnnPolicy", SpacesEnv(spaces.Box(0, 255, (96, 96, 12), np.uint8), spaces.Discrete(3)), device="cpu")
    network = model.policy.network
    assert isinstance(network, ImageNetwork) and network.state_shape == (64, 6, 6)
    assert network.project(th.zeros(2, 64, 6, 6)).shape == (2, 1024)
    assert [m.out_features for m in network.value_head.mlp if isinstance(m, th.nn.Linear)] == [32, 301]
    assert isinstance(model.policy, CnnPolicy) and (model.policy.random_shift, model.policy.random_intensity) == (4, 0.05)


def test_the_papers_optimizer_and_its_schedule() -> None:
    kwargs = dict(optimizer_class=th.optim.SGD, optimizer_kwargs=dict(momentum=0.9, weight_decay=1e-4))
    rates: list[float] = []
    model = make(learning_rate=0.2, warmup_fraction=0.25, lr_decay_updates=10, final_gradient_steps=4, policy_kwargs=kwargs)
    step = model.policy.optimizer.step
    model.policy.optimizer.step = lambda: (rates.append(model.policy.optimizer.param_groups[0]["lr"]), step())  # type: ignore
    model.learn(44)
    warmup = np.minimum(1, np.arange(1, 29) / 7)  # 24 + 4 updates are planned
    np.testing.assert_allclose(rates, 0.2 * warmup * np.repeat([1, 0.1, 0.01], 10)[:28])
    group = model.policy.optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)


@pytest.mark.parametrize("actions", ACTION_SPACES, ids=str)
@pytest.mark.parametrize("value_prefix", [False, True], ids=["rewards", "prefix"])
def test_the_drivers_search_is_that_of_the_plain_loop(
    actions: spaces.Space, value_prefix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States of images are not laid out as the driver's rows are: it must reach the model all the same."""
    model = make(actions=actions, policy_kwargs=dict(value_prefix=value_prefix)).learn(60)
    obs, _ = model.policy.obs_to_tensor(np.random.default_rng(0).integers(0, 255, (5, *GREY.shape)).astype(np.uint8))
    search = model.policy.search
    driven = search.run(obs, np.random.default_rng(1))
    monkeypatch.setattr(search, "_simulate_on_cpu", search._simulate)
    plain = search.run(obs, np.random.default_rng(1))
    assert driven.value.std() > 0
    for name, ours, expected in zip(driven._fields, driven, plain):
        if expected is not None:
            th.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_same_seed_same_run() -> None:
    runs = [weights(make(MIXED, seed=seed).learn(40)) for seed in (3, 3, 4)]
    assert th.equal(runs[0], runs[1]) and not th.equal(runs[0], runs[2])


@pytest.mark.parametrize("space", [CHANNELS_LAST, MIXED], ids=["image", "dict"])
def test_predict_takes_images_with_channels_last_or_first(space: spaces.Space) -> None:
    model = make(space).learn(60)
    last = [space.sample() for _ in range(6)]
    if isinstance(space, spaces.Dict):
        batch: Any = {key: np.stack([obs[key] for obs in last]) for key in last[0]}
        first: Any = {key: np.moveaxis(x, -1, 1) if x.ndim == 4 else x for key, x in batch.items()}
    else:
        batch = np.stack(last)
        first = np.moveaxis(batch, -1, 1)
    actions, _ = model.predict(batch, deterministic=True)
    assert actions.shape == (6,)
    np.testing.assert_array_equal(model.predict(first, deterministic=True)[0], actions)
    for obs, action in zip(last, actions):
        assert model.predict(obs, deterministic=True)[0] == action


def test_grey_images_keep_their_channel_axis_and_frames_are_stored_once() -> None:
    for settings, frames, planes in (({}, 4, 1), (dict(replay_buffer_kwargs=dict(frame_stack=1)), 1, 4)):
        model = make(GREY, n_stack=4, **settings).learn(40)  # type: ignore[arg-type]
        assert model.observation_space.shape == (4, 16, 16)
        assert model.replay_buffer is not None and model.replay_buffer.frame_stack == frames
        assert model.replay_buffer.store.arrays[None].shape[1:] == (planes, 16, 16)


def test_stored_once_or_whole_the_run_is_the_same() -> None:
    runs = [weights(make(GREY, n_stack=4, replay_buffer_kwargs=dict(frame_stack=n)).learn(50)) for n in (4, 1)]
    assert th.equal(*runs)


def test_memory_is_said_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    make(GREY, verbose=1, buffer_size=1000).learn(1)
    assert "Replay buffer: 0.00 GB when full" in capsys.readouterr().out
    free = free_memory()
    assert free is None or free > 1e6
    check_memory(1000, 10)
    if free is not None:
        with pytest.raises(
            ValueError, match=r"takes .* GB when full, but .* GB of memory are free: lower buffer_size to at most"
        ):
            check_memory(100 * free, 1000)


@pytest.mark.parametrize("space", [GREY, MIXED], ids=["image", "dict"])
def test_save_load_goes_on_identically(tmp_path: Path, space: spaces.Space) -> None:
    model = make(space, n_stack=2, policy_kwargs=dict(value_prefix=True, random_shift=1)).learn(40)
    model.save(tmp_path / "agent")
    model.save_replay_buffer(tmp_path / "replay")
    loaded = EZV2.load(tmp_path / "agent", env=make(space, n_stack=2).get_env())
    loaded.load_replay_buffer(tmp_path / "replay")
    assert th.equal(weights(model), weights(loaded))
    assert isinstance(loaded.policy, CnnPolicy) and loaded.policy.random_shift == 1 and loaded.policy.value_prefix
    model.set_env(make(space, n_stack=2).get_env())  # type: ignore[arg-type]
    model._reanalyzer = None  # the searches that it remembers are not saved
    for agent in (model, loaded):
        env = agent.get_env()
        assert env is not None
        env.seed(1)
        agent.learn(20, reset_num_timesteps=False)
    assert model._n_updates == loaded._n_updates > 20
    assert th.equal(weights(model), weights(loaded))


def test_policy_save_deepcopy_pickle(tmp_path: Path) -> None:
    model = make(CHANNELS_LAST, policy_kwargs=dict(value_prefix=True, random_shift=2)).learn(30)
    obs = CHANNELS_LAST.sample()
    action, _ = model.predict(obs, deterministic=True)
    model.policy.save(str(tmp_path / "policy"))
    loaded = CnnPolicy.load(str(tmp_path / "policy"))
    for policy in (loaded, copy.deepcopy(model.policy), pickle.loads(pickle.dumps(model.policy))):
        np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], action)
        assert policy.random_shift == 2  # type: ignore[attr-defined]


def test_another_frame_stack_than_the_loaded_agents(tmp_path: Path) -> None:
    make(GREY, n_stack=4).save(tmp_path / "agent")
    with pytest.raises(
        ValueError, match=r"Observation spaces do not match: .*\(4, 16, 16\).*\(1, 16, 16\).*VecFrameStack with as many"
    ):
        EZV2.load(tmp_path / "agent", env=SpacesEnv(GREY, ACTION_SPACES[0]))


def test_rewards_of_any_scale() -> None:
    """The supports of images take the rewards' scale, too."""

    class Scaled(gym.RewardWrapper):
        def reward(self, reward: Any) -> float:
            return 1000.0 * float(reward)

    env = Scaled(SpacesEnv(GREY, ACTION_SPACES[0]))
    model = EZV2("CnnPolicy", env, **SETTINGS).learn(30)
    assert 100 < model.policy.network.reward_support.scale.item() <= 1000
    model = EZV2("CnnPolicy", env, **{**SETTINGS, "policy_kwargs": {**SIZES, "reward_scale": 1.0}}).learn(30)
    assert model.policy.network.reward_support.scale.item() == 1


@pytest.mark.parametrize("name", ["camera", "speed"])
def test_faults_of_dictionaries_are_found(name: str) -> None:
    space = spaces.Dict(camera=GREY, speed=BOX)

    class Env(SpacesEnv):
        def step(self, action: Any) -> Any:
            obs, *rest = super().step(action)
            self.total = getattr(self, "total", 0) + 1
            if self.total > 4 and name == "speed":
                obs["speed"] = np.full_like(obs["speed"], np.nan)
            return obs, *rest

    model = EZV2("MultiInputPolicy", Env(space, ACTION_SPACES[0], length=100), **SETTINGS)
    if name == "speed":
        with pytest.raises(ValueError, match="the observation of environment 0 has NaN"):
            model.learn(10)
    else:  # bytes have no NaN
        model.learn(10)


UINT8 = np.uint8


@pytest.mark.parametrize(
    "space, message",
    [
        (
            spaces.Box(0.0, 1.0, (16, 16, 3), np.float32),
            r"must be of dtype uint8 .* float32 in \[0.0, 1.0\]: let the environment",
        ),
        (spaces.Box(0, 1, (16, 16, 3), UINT8), r"bounds 0 and 255, but the observation is uint8 in \[0, 1\]"),
        (spaces.Box(0, 255, (16, 16), UINT8), r"no channel axis: .*keep_dim=True"),
        (spaces.Box(0, 255, (4, 16, 16, 3), UINT8), r"of three dimensions, not the observation of shape"),
        (spaces.Box(0, 255, (20, 3, 22), UINT8), "looks like .* channels"),
        (spaces.Box(0, 255, (4, 40, 3), UINT8), "too small for 2 halvings, which need 5x5: .*n_downsamples=1"),
        (BOX, "of three dimensions"),
        (spaces.Discrete(4), "CnnPolicy is for images"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Treating image space")
def test_observations_that_are_no_images(space: spaces.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EZV2("CnnPolicy", SpacesEnv(space, ACTION_SPACES[0]), **SETTINGS)


@pytest.mark.parametrize(
    "members, message",
    [
        (dict(a=BOX, b=spaces.Box(0, 255, (20, 20), UINT8)), "the b of shape .* has no channel axis"),
        (dict(a=GREY, b=spaces.Box(0, 255, (20, 20), UINT8)), "the b of shape .* has no channel axis"),
        (dict(a=GREY, b=spaces.Box(0, 255, (4, 4, 1), UINT8)), "the b of 4x4 pixels is too small"),
    ],
    ids=str,
)
def test_dictionaries_that_do_not_work(members: dict[str, spaces.Space], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EZV2("MultiInputPolicy", SpacesEnv(spaces.Dict(members), ACTION_SPACES[0]), **SETTINGS)  # type: ignore[arg-type]


def test_images_are_not_predicted() -> None:
    with pytest.raises(ValueError, match="observation_coef is for observations without images"):
        EZV2("CnnPolicy", SpacesEnv(GREY, ACTION_SPACES[0]), observation_coef=1.0, **SETTINGS)


def test_policy_classes_of_the_other_kind() -> None:
    """Given as classes they pass SB3's own check of the names."""
    with pytest.raises(ValueError, match="take MultiInputPolicy"):
        EZV2(MlpPolicy, SpacesEnv(MIXED, ACTION_SPACES[0]), **TINY)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(channels=5), "channels must be even"),
        (dict(channels=0), "channels must be a positive integer"),
        (dict(n_downsamples=0), "n_downsamples must be a positive integer"),
        (dict(n_downsamples=4), "16x16 pixels is too small for 4 halvings, which need 17x17: .*n_downsamples=3"),
        (dict(head_channels=1.5), "head_channels must be a positive integer"),
    ],
    ids=str,
)
def test_settings_out_of_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(GREY, policy_kwargs=kwargs)


def test_the_suggested_number_of_halvings_works() -> None:
    for size in (3, 5, 9, 16, 17):
        space = spaces.Box(0, 255, (size, size, 1), UINT8)
        with pytest.raises(ValueError, match=r"n_downsamples=\d") as caught:
            make(space, policy_kwargs=dict(n_downsamples=7))
        suggested = int(str(caught.value).split("n_downsamples=")[1][0])
        make(space, policy_kwargs=dict(n_downsamples=suggested))
        if suggested > 1:
            with pytest.raises(ValueError, match="too small"):
                make(space, policy_kwargs=dict(n_downsamples=suggested + 1))


def test_faulty_environment_of_vectors_is_still_found() -> None:
    with pytest.raises(ValueError, match="final observation of environment 0"):
        EZV2("MlpPolicy", FaultyEnv("final observation", 3), **TINY).learn(10)
