"""Dictionaries of observations without an image: the networks for vectors, over SB3's ``CombinedExtractor``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from common import BOX, TINY, SpacesEnv
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_ezv2 import EZV2, MlpPolicy, MultiInputPolicy
from sb3_ezv2.export import export_policy_head
from sb3_ezv2.introspection import play, search_tree
from sb3_ezv2.networks import Ezv2Network

SPACE = spaces.Dict(
    position=BOX,
    matrix=spaces.Box(-10.0, 10.0, (2, 2), np.float64),
    code=spaces.Discrete(3),
    flags=spaces.MultiBinary(2),
    dials=spaces.MultiDiscrete([2, 3]),
)
WIDTH = 3 + 4 + 3 + 2 + 5


def make_env(actions: spaces.Space, normalize: bool = False) -> Any:
    env: Any = DummyVecEnv([lambda: SpacesEnv(SPACE, actions, 7), lambda: SpacesEnv(SPACE, actions, 11)])
    env.seed(3)
    return VecNormalize(env, norm_obs_keys=["position", "matrix"]) if normalize else env


def make(env: Any, policy: Any = "MultiInputPolicy", **settings: Any) -> EZV2:
    return EZV2(policy, env, gradient_steps=-1, seed=0, **{**TINY, **settings})


def observations(count: int = 5) -> dict[str, np.ndarray]:
    SPACE.seed(5)
    drawn = [SPACE.sample() for _ in range(count)]
    return {key: np.stack([x[key] for x in drawn]) for key in SPACE.spaces}


@pytest.mark.parametrize(
    "actions", [spaces.Discrete(3, start=2), spaces.Box(-2.0, 3.0, (2,), np.float32), spaces.MultiDiscrete([3, 4])], ids=str
)
def test_learning_runs(actions: spaces.Space) -> None:
    model = make(make_env(actions))
    assert type(model.policy) is MlpPolicy and model.policy.features_extractor_class is CombinedExtractor
    before = [x.clone() for x in model.policy.network.parameters()]
    model.learn(54)
    assert model._n_updates == 14 and not all(map(th.equal, before, model.policy.network.parameters()))
    network = model.policy.network
    assert isinstance(network, Ezv2Network)
    assert network.normalizer.mean.shape == (WIDTH,) and (network.normalizer.var > 0).all()
    obs = observations()
    for n_simulations in (None, 0):
        together, _ = model.predict(obs, deterministic=True, n_simulations=n_simulations)
        one, _ = model.predict({key: x[2] for key, x in obs.items()}, deterministic=True, n_simulations=n_simulations)
        np.testing.assert_allclose(one, together[2], rtol=1e-4, atol=1e-5)
    env = model.get_env()
    assert env is not None
    evaluate_policy(model, env, n_eval_episodes=2, warn=False)


def test_features_are_all_members_joined() -> None:
    model = make(make_env(spaces.Discrete(2)))
    obs = observations(6)
    one_hots = [np.eye(n)[x] for n, x in ((3, obs["code"]), (2, obs["dials"][:, 0]), (3, obs["dials"][:, 1]))]
    parts = dict(
        position=obs["position"],
        matrix=obs["matrix"].reshape(6, 4),
        code=one_hots[0],
        flags=obs["flags"],
        dials=np.concatenate(one_hots[1:], axis=1),
    )
    expected = np.concatenate([parts[key] for key in SPACE.spaces], axis=1)
    found = model.policy.network.features(model.policy.obs_to_tensor(obs)[0])  # type: ignore[operator]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-6)


def test_save_load_goes_on_identically(tmp_path: Path) -> None:
    def env() -> Any:
        return make_env(spaces.Box(-2.0, 2.0, (1,), np.float32), normalize=True)

    model = make(env(), MultiInputPolicy).learn(50)
    normalized = model.get_vec_normalize_env()
    assert normalized is not None
    model.save(tmp_path / "agent")
    model.save_replay_buffer(tmp_path / "replay")
    normalized.save(str(tmp_path / "statistics"))
    venv = VecNormalize.load(str(tmp_path / "statistics"), env().venv)
    loaded = EZV2.load(tmp_path / "agent", env=venv, device="cpu")
    loaded.load_replay_buffer(tmp_path / "replay")
    assert type(loaded.policy) is MlpPolicy
    obs = observations()
    expected, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)
    np.testing.assert_array_equal(copy.deepcopy(model.policy).predict(obs, deterministic=True)[0], expected)
    model.policy.save(str(tmp_path / "policy"))
    alone = MlpPolicy.load(str(tmp_path / "policy"), device="cpu")
    np.testing.assert_array_equal(alone.predict(obs, deterministic=True)[0], expected)
    # both from a reset of equally seeded environments
    again = env()
    again.obs_rms, again.ret_rms = copy.deepcopy(normalized.obs_rms), copy.deepcopy(normalized.ret_rms)
    model.set_env(again)
    for agent in (model, loaded):
        agent.get_env().seed(1)  # type: ignore[union-attr]
        agent.learn(20, reset_num_timesteps=False)
    assert model._n_updates > 20
    pairs = zip(model.policy.state_dict().values(), loaded.policy.state_dict().values())
    assert all(th.equal(x, y) for x, y in pairs)


def test_replay_holds_and_normalises_every_member() -> None:
    model = make(make_env(spaces.Discrete(2), normalize=True)).learn(50)
    buffer, normalized = model.replay_buffer, model.get_vec_normalize_env()
    assert buffer is not None and normalized is not None
    raw, scaled = buffer.sequences(np.arange(4)), buffer.sequences(np.arange(4), env=normalized)  # type: ignore[attr-defined]
    for key, x in raw.observations.items():
        assert x.shape[2:] == get_obs_shape(SPACE[key])
        same = th.equal(x, scaled.observations[key])
        assert same == (key not in ("position", "matrix"))
        if not same:
            rms = normalized.obs_rms[key]  # type: ignore[index]
            expected = np.clip((x.numpy() - rms.mean) / np.sqrt(rms.var + normalized.epsilon), -10, 10)
            np.testing.assert_allclose(scaled.observations[key].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_exported_head_and_the_tree(tmp_path: Path) -> None:
    actions = spaces.MultiDiscrete([4, 3], start=[1, 0])
    model = make(make_env(actions))
    generator = th.Generator().manual_seed(1)
    with th.no_grad():
        for parameter in model.policy.averaged_network.parameters():
            parameter.add_(0.3 * th.randn(parameter.shape, generator=generator))
    obs = observations(8)
    expected, _ = model.predict(obs, deterministic=True, n_simulations=0)
    assert len(np.unique(expected, axis=0)) > 1
    export_policy_head(model.policy, tmp_path / "head.pt2")
    head = th.export.load(tmp_path / "head.pt2").module()
    np.testing.assert_array_equal(head({key: th.as_tensor(x) for key, x in obs.items()}).numpy(), expected)

    one = {key: x[3] for key, x in obs.items()}
    tree = search_tree(model, one)
    assert tree.candidates is not None
    np.testing.assert_array_equal(tree.candidates[tree.action], model.predict(one, deterministic=True)[0])
    episode = play(model, SpacesEnv(SPACE, actions, 5))
    assert len(episode.rewards) == 5 and episode.observations["matrix"].shape == (6, 2, 2)


def test_what_is_refused() -> None:
    env = SpacesEnv(spaces.Dict(a=BOX), spaces.Discrete(2))
    with pytest.raises(ValueError, match="use `MultiInputPolicy` when working with dict observation space, not MlpPolicy"):
        make(env, "MlpPolicy")
    with pytest.raises(ValueError, match="FlattenExtractor is not for Dict observations"):
        make(env, policy_kwargs=dict(features_extractor_class=FlattenExtractor))
    for name in ("a.b", "keys", "training"):
        with pytest.raises(ValueError, match=f"cannot take an observation of the name '{name}'"):
            make(SpacesEnv(spaces.Dict({name: BOX}), spaces.Discrete(2)))
    with pytest.raises(ValueError, match="Discrete observations must start at 0, not at 4"):
        make(SpacesEnv(spaces.Dict(a=BOX, b=spaces.Discrete(2, start=4)), spaces.Discrete(2)))
    with pytest.raises(ValueError, match="the batch of observations is empty"):
        make(env).predict({"a": np.zeros((0, 3), np.float32)})
