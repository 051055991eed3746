"""Saving, loading and setting, with every form of path and file that Stable-Baselines3 takes."""

from __future__ import annotations

import gc
import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from common import BOX, weights
from gymnasium import spaces
from sb3_agents import CONTINUOUS, OBSERVATIONS, POLICIES, agent, batch_of, monitored, vec_env
from stable_baselines3 import DQN
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import ConstantSchedule

from sb3_ezv2 import EZV2
from sb3_ezv2.replay_buffer import RUNNING, TRUNCATED, SequenceReplayBuffer


@pytest.fixture(scope="module")
def model() -> EZV2:
    """An agent that no test changes."""
    return agent().learn(20)


@pytest.fixture(scope="module")
def saved(model: EZV2) -> bytes:
    file = io.BytesIO()
    model.save(file)
    return file.getvalue()


def load(saved: bytes, **kwargs: Any) -> EZV2:
    return EZV2.load(io.BytesIO(saved), device="cpu", **kwargs)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(
    "name, written",
    [
        ("agent", "agent.zip"),
        ("agent.zip", "agent.zip"),
        ("agent.model", "agent.model"),
        ("agent_v0.1", "agent_v0.1"),
        (".agent", ".agent.zip"),
    ],
)
def test_paths(model: EZV2, tmp_path: Path, kind: Callable[[Path], Any], name: str, written: str) -> None:
    model.save(kind(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [written]
    for path in {name, written}:
        assert th.equal(weights(EZV2.load(kind(tmp_path / path), device="cpu")), weights(model))


def test_a_path_relative_to_the_working_directory(model: EZV2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model.save("agent")
    assert (tmp_path / "agent.zip").is_file()
    EZV2.load("agent", device="cpu")


def test_an_existing_file_is_replaced(model: EZV2, tmp_path: Path) -> None:
    (tmp_path / "agent.zip").write_bytes(b"something else" * 100_000)
    model.save(tmp_path / "agent")
    assert th.equal(weights(EZV2.load(tmp_path / "agent", device="cpu")), weights(model))


@pytest.mark.parametrize("mode", ["wb", "w+b", "xb"])
def test_open_files(model: EZV2, tmp_path: Path, mode: str) -> None:
    with open(tmp_path / "agent", mode) as file:
        assert isinstance(file, io.BufferedIOBase)
        model.save(file)
        assert not file.closed  # it is the caller's
    with open(tmp_path / "agent", "rb") as file:
        assert th.equal(weights(EZV2.load(file, device="cpu")), weights(model))
        assert not file.closed


def test_bytes_in_memory(model: EZV2) -> None:
    file = io.BytesIO()
    model.save(file)
    for _ in range(2):  # wherever the file's position is
        assert th.equal(weights(EZV2.load(file, device="cpu")), weights(model))


def test_files_that_cannot_be_used(model: EZV2, tmp_path: Path) -> None:
    path = tmp_path / "agent.zip"
    model.save(path)
    with open(path, "rb") as file, pytest.raises(ValueError, match="Expected a writable file"):
        model.save(file)
    with open(tmp_path / "other", "wb") as other, pytest.raises(ValueError, match="is no saved agent"):
        EZV2.load(other)
    with open(tmp_path / "other", "w") as text, pytest.raises(TypeError, match="invalid type"):
        model.save(text)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="closed"):
        model.save(other)
    for wrong in (None, 3, [str(path)]):
        with pytest.raises(TypeError, match="invalid type"):
            model.save(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="invalid type"):
            EZV2.load(wrong)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"nowhere\.zip"):
        EZV2.load(tmp_path / "nowhere")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(ValueError, match="zip"):
        EZV2.load(tmp_path / "text.zip")


def test_no_file_stays_open(model: EZV2, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        model.save(tmp_path / "agent")
        model.save_replay_buffer(tmp_path / "replay")
        loaded = EZV2.load(tmp_path / "agent", device="cpu")
        loaded.load_replay_buffer(tmp_path / "replay")
        loaded.set_parameters(str(tmp_path / "agent"))
        gc.collect()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_file_is_one_of_sb3(policy: str) -> None:
    model, file = agent(policy).learn(14), io.BytesIO()
    model.save(file)
    names = set(zipfile.ZipFile(file).namelist())
    assert names == {
        "data", "policy.pth", "policy.optimizer.pth", "pytorch_variables.pth", "_stable_baselines3_version", "system_info.txt",
    }  # fmt: skip
    data, params, variables = load_from_zip_file(file, device="cpu")
    assert data is not None and not variables
    assert data["policy_class"] is type(model.policy) and data["num_timesteps"] == 14 and data["gamma"] == model.gamma
    assert data["observation_space"] == model.observation_space and data["action_space"] == model.action_space
    assert params.keys() == {"policy", "policy.optimizer"}
    stored: Any = params["policy"]  # of which SB3 says that it is a tensor
    assert stored.keys() == model.policy.state_dict().keys()
    json.loads(zipfile.ZipFile(file).read("data"))

    loaded = EZV2.load(file, device="cpu")
    assert type(loaded.policy) is type(model.policy) and th.equal(weights(loaded), weights(model))
    observations = batch_of(OBSERVATIONS[policy], 4)
    for deterministic in (True, False):
        actions = []
        for one in (model, loaded):
            th.manual_seed(1)
            actions.append(one.predict(observations, deterministic=deterministic)[0])
        np.testing.assert_array_equal(actions[0], actions[1])
    state = loaded.policy.optimizer.state_dict()
    assert str(state) == str(model.policy.optimizer.state_dict()) and len(state["state"]) > 0
    loaded.set_env(vec_env(observations=OBSERVATIONS[policy]))
    loaded.learn(14, reset_num_timesteps=False)
    assert loaded.num_timesteps == 28 and loaded._n_updates > model._n_updates


def test_exclude_and_include(model: EZV2) -> None:
    def stored(**kwargs: Any) -> tuple[bytes, set[str]]:
        file = io.BytesIO()
        model.save(file, **kwargs)
        return file.getvalue(), set(json.loads(zipfile.ZipFile(file).read("data")))

    _, usual = stored()
    assert not usual & {"policy", "device", "env", "replay_buffer", "rollout_buffer", "_vec_normalize_env", "_logger"}
    without, names = stored(exclude=["gamma", "_last_obs"])
    assert names == usual - {"gamma", "_last_obs"}
    assert load(without).gamma == EZV2("MlpPolicy", monitored(), _init_setup_model=False).gamma
    assert stored(exclude=["gamma", "tau"], include=["tau"])[1] == usual - {"gamma"}
    # with its experience and its environment in one file, it goes on by itself
    everything, names = stored(include=["replay_buffer", "env"])
    assert names == usual | {"replay_buffer", "env"}
    loaded = load(everything)
    assert loaded.replay_buffer is not None and loaded.replay_buffer.size() == 20
    assert loaded.learn(15, reset_num_timesteps=False).num_timesteps == 35
    assert loaded.replay_buffer.total_transitions == 35
    # what torch saves is never in the data
    assert "policy" not in stored(include=["policy"])[1]


def test_custom_objects_and_keyword_arguments_replace_what_was_saved(model: EZV2, saved: bytes) -> None:
    objects = dict(learning_rate=0.125, lr_schedule=ConstantSchedule(0.5), seed=7)
    loaded = load(saved, custom_objects=objects)
    assert loaded.learning_rate == 0.125 and loaded.lr_schedule(1.0) == 0.125 and loaded.seed == 7
    assert load(saved, n_simulations=5, batch_size=3).policy.search.settings.n_simulations == 5
    with pytest.raises(ValueError, match="policy kwargs do not equal the stored"):
        load(saved, policy_kwargs=dict(net_arch=[3]))
    # an object of a class that is gone can be given by hand
    data = json.loads(zipfile.ZipFile(io.BytesIO(saved)).read("data"))
    data["lr_schedule"] = {":type:": "gone", ":serialized:": "AAAA"}
    broken = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved)) as source, zipfile.ZipFile(broken, "w") as target:
        for name in source.namelist():
            target.writestr(name, json.dumps(data) if name == "data" else source.read(name))
    loaded = EZV2.load(broken, device="cpu", custom_objects=objects)
    assert th.equal(weights(loaded), weights(model)) and loaded.lr_schedule(1.0) == 0.125


def test_system_info_is_printed(saved: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    load(saved)
    assert capsys.readouterr().out == ""
    load(saved, print_system_info=True)
    printed = capsys.readouterr().out
    assert "== CURRENT SYSTEM INFO ==" in printed and "== SAVED MODEL SYSTEM INFO ==" in printed
    assert printed.count("Stable-Baselines3:") == 2


@pytest.mark.parametrize("device", ["cpu", "auto", th.device("cpu")], ids=str)
def test_device_of_loading(saved: bytes, device: Any) -> None:
    loaded = EZV2.load(io.BytesIO(saved), device=device)
    expected = "cuda" if device == "auto" and th.cuda.is_available() else "cpu"
    assert loaded.device.type == loaded.policy.device.type == expected
    loaded.predict(BOX.sample())


# ---------------------------------------------------------------------- parameters


def test_parameters_exact(model: EZV2, saved: bytes, tmp_path: Path) -> None:
    parameters = model.get_parameters()
    assert parameters.keys() == {"policy", "policy.optimizer"}
    model.save(tmp_path / "agent")
    for source in (parameters, str(tmp_path / "agent"), tmp_path / "agent.zip", io.BytesIO(saved)):
        other = agent(seed=5)
        assert not th.equal(weights(other), weights(model))
        other.set_parameters(source, device="cpu")
        assert th.equal(weights(other), weights(model))
        assert len(other.policy.optimizer.state_dict()["state"]) == len(parameters["policy.optimizer"]["state"]) > 0


def test_parameters_partial(model: EZV2) -> None:
    parameters = model.get_parameters()
    other = agent(seed=5)
    before = {name: x.clone() for name, x in other.policy.state_dict().items()}
    name = "network.value_head.mlp.0.weight"
    other.set_parameters({"policy": {name: parameters["policy"][name]}}, exact_match=False)
    after = other.policy.state_dict()
    assert [key for key, x in after.items() if not th.equal(x, before[key])] == [name]
    assert th.equal(after[name], parameters["policy"][name])
    # part of the objects; an object inside of one
    other.set_parameters({"policy": parameters["policy"]}, exact_match=False)
    assert th.equal(weights(other), weights(model)) and not other.policy.optimizer.state_dict()["state"]
    zeros = {key: th.zeros_like(x) for key, x in model.policy.acting_network.state_dict().items()}
    other.set_parameters({"policy.acting_network": zeros}, exact_match=False)
    assert all(not x.any() for x in other.policy.acting_network.state_dict().values())
    assert th.equal(other.policy.network.state_dict()["value_head.mlp.0.weight"], parameters["policy"][name])


def test_parameters_that_do_not_fit(model: EZV2) -> None:
    parameters, other = model.get_parameters(), agent(seed=5)
    with pytest.raises(ValueError, match="do not match agents' parameters"):
        other.set_parameters({"policy": parameters["policy"]})
    with pytest.raises(ValueError, match="Key actor is an invalid object name"):
        other.set_parameters({**parameters, "actor": parameters["policy"]})
    some = dict(list(parameters["policy"].items())[1:])
    with pytest.raises(RuntimeError, match="Missing key"):
        other.set_parameters({**parameters, "policy": some})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.set_parameters({**parameters, "policy": {**parameters["policy"], "critic": th.zeros(1)}})
    other.set_parameters({**parameters, "policy": {**parameters["policy"], "critic": th.zeros(1)}}, exact_match=False)
    for exact_match in (True, False):
        with pytest.raises(RuntimeError, match="size mismatch"):
            agent(policy_kwargs=dict(net_arch=[5])).set_parameters(parameters, exact_match=exact_match)


def test_new_parameters_make_remembered_searches_stale(saved: bytes) -> None:
    model = load(saved, env=vec_env()).learn(20)
    assert model._reanalyzer is not None and model._reanalyzer.cache is not None
    version = model._reanalyzer.cache.version
    model.set_parameters(model.get_parameters())
    assert model._reanalyzer.cache.version == version + 1


# ---------------------------------------------------------------------- replay buffer


@pytest.mark.parametrize("kind", [str, Path, open, io.BytesIO])
def test_replay_buffer_files(model: EZV2, saved: bytes, tmp_path: Path, kind: Any) -> None:
    loaded, path = load(saved, env=vec_env()), tmp_path / "replay"
    if kind is open:
        with open(path, "wb") as file:
            model.save_replay_buffer(file)
        with open(path, "rb") as file:
            loaded.load_replay_buffer(file)
    elif kind is io.BytesIO:
        memory = io.BytesIO()
        model.save_replay_buffer(memory)
        memory.seek(0)
        loaded.load_replay_buffer(memory)
    else:
        model.save_replay_buffer(kind(path))
        assert [file.name for file in tmp_path.iterdir()] == ["replay.pkl"]
        loaded.load_replay_buffer(kind(path))
        loaded.load_replay_buffer(kind(tmp_path / "replay.pkl"))
    ours, theirs = loaded.replay_buffer, model.replay_buffer
    assert isinstance(ours, SequenceReplayBuffer) and theirs is not None and ours is not theirs
    for name in ("actions", "rewards", "stamps", "episodes", "transitions"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    loaded.learn(15, reset_num_timesteps=False)
    assert ours is loaded.replay_buffer and ours.total_transitions == 35


@pytest.mark.parametrize("truncate", [True, False])
def test_the_open_episode_of_a_loaded_buffer(tmp_path: Path, truncate: bool) -> None:
    model = agent(env=vec_env(2, length=9), gradient_steps=-1).learn(24)
    model.save_replay_buffer(tmp_path / "replay")
    assert model.replay_buffer is not None
    newest = np.arange(2) * model.replay_buffer.ring + model.replay_buffer.written - 1
    assert (model.replay_buffer.kinds[newest] == RUNNING).all()
    model.load_replay_buffer(tmp_path / "replay", truncate_last_traj=truncate)
    assert (model.replay_buffer.kinds[newest] == (TRUNCATED if truncate else RUNNING)).all()
    # no reset: the environments are three steps into an episode of nine
    model.learn(2, reset_num_timesteps=False)
    same_episode = model.replay_buffer.episodes[newest + 1] == model.replay_buffer.episodes[newest]
    assert (same_episode == (not truncate)).all()


def test_replay_buffers_that_do_not_fit(saved: bytes, tmp_path: Path) -> None:
    model = load(saved, env=vec_env()).learn(15)
    before = model.replay_buffer
    DQN("MlpPolicy", monitored(), buffer_size=50).save_replay_buffer(tmp_path / "foreign")
    agent(env=vec_env(observations=spaces.Discrete(4))).learn(3).save_replay_buffer(tmp_path / "observations")
    agent(env=vec_env(actions=CONTINUOUS)).learn(3).save_replay_buffer(tmp_path / "actions")
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"no": "buffer"}))
    for name, message in (
        ("foreign", "the file holds a ReplayBuffer, but EZV2 replays sequences"),
        ("observations", r"the observation space of the replay buffer, Discrete\(4\), is not the agent's, Box"),
        ("actions", "the action space of the replay buffer, Box.* is not the agent's, Discrete"),
        ("other", "the file holds a dict"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_replay_buffer(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        model.load_replay_buffer(tmp_path / "nowhere")
    assert model.replay_buffer is before
    agent(env=vec_env(2)).learn(4).save_replay_buffer(tmp_path / "two")
    model.load_replay_buffer(tmp_path / "two")
    with pytest.raises(ValueError, match="replay buffer holds 2 environments but there are 1 now"):
        model.learn(5, reset_num_timesteps=False)
    model.replay_buffer = before
    model.learn(5, reset_num_timesteps=False)


def test_an_agent_without_experience_has_no_buffer_to_save(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="replay buffer is not defined"):
        agent().save_replay_buffer(tmp_path / "replay")


# ---------------------------------------------------------------------- environments and counters


def test_without_environment_it_predicts_and_learns_once_it_has_one(model: EZV2, saved: bytes) -> None:
    loaded = load(saved)
    assert loaded.env is None and loaded.get_env() is None and loaded.get_vec_normalize_env() is None
    assert loaded.replay_buffer is None  # nothing is allocated to predict
    observations = batch_of(BOX, 3)
    np.testing.assert_array_equal(
        loaded.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )
    with pytest.raises(AssertionError, match="set the environment before"):
        loaded.learn(10)
    loaded.set_env(monitored())
    loaded.learn(15, reset_num_timesteps=False)
    assert loaded.num_timesteps == 35


def test_other_environments(saved: bytes) -> None:
    model = load(saved, env=vec_env())
    with pytest.raises(AssertionError, match=r"number of environments.*\(2 != 1\).*EZV2\.load"):
        model.set_env(vec_env(2))
    for env, message in (
        (vec_env(observations=spaces.Discrete(3)), "Observation spaces do not match"),
        (vec_env(actions=spaces.Discrete(4)), "Action spaces do not match"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_env(env)
        with pytest.raises(ValueError, match=message):
            load(saved, env=env)
    # by loading, any number goes
    other = load(saved, env=vec_env(3), gradient_steps=-1)
    assert other.n_envs == 3
    other.learn(30)
    assert other.num_timesteps == 30 and other.replay_buffer is not None and other.replay_buffer.n_envs == 3


@pytest.mark.parametrize("force_reset", [True, False])
def test_a_new_environment_is_reset_unless_told_otherwise(force_reset: bool) -> None:
    env, resets = monitored(length=50), []
    model = agent(env=env).learn(12)
    inner, reset = env.env, env.reset
    env.reset = lambda **kwargs: (resets.append(1), reset(**kwargs))[1]  # type: ignore[method-assign, func-returns-value]
    model.set_env(env, force_reset=force_reset)
    model.learn(5, reset_num_timesteps=False)
    assert len(resets) == force_reset
    assert inner.steps == (5 if force_reset else 17)  # type: ignore[attr-defined]
    assert model.replay_buffer is not None
    assert np.count_nonzero(model.replay_buffer.kinds == TRUNCATED) == force_reset


@pytest.mark.parametrize("force_reset", [True, False])
def test_loading_forgets_where_it_was_unless_told_otherwise(saved: bytes, model: EZV2, force_reset: bool) -> None:
    loaded = load(saved, env=vec_env(), force_reset=force_reset)
    if force_reset:
        assert loaded._last_obs is None
    else:
        np.testing.assert_array_equal(loaded._last_obs, model._last_obs)  # type: ignore[arg-type]


def test_counters_start_again_or_go_on() -> None:
    model = agent(env=vec_env(length=4)).learn(20)
    assert (model.num_timesteps, model._episode_num, model._total_timesteps) == (20, 5, 20)
    updates = model._n_updates
    assert updates == 10
    model.learn(8, reset_num_timesteps=False)
    assert (model.num_timesteps, model._episode_num, model._total_timesteps) == (28, 7, 28)
    assert model.ep_info_buffer is not None and len(model.ep_info_buffer) == 7
    assert model._n_updates == updates + 8
    model.learn(12)
    assert (model.num_timesteps, model._episode_num, model._total_timesteps) == (12, 3, 12)
    assert len(model.ep_info_buffer) == 3
    assert model._n_updates == updates + 8 + 2  # random actions first, again


def test_seeding_again_repeats_a_run() -> None:
    """As in SB3, ``set_random_seed`` reaches everything that is drawn, that of the replay buffer's samples too."""
    model = agent().learn(20)
    # as bytes: an optimizer goes on in the very tensors of the state that it is given
    start, buffer = pickle.dumps(model.get_parameters()), pickle.dumps(model.replay_buffer)
    runs = []
    for seed in (3, 3, 4):
        model.set_parameters(pickle.loads(start))
        model.replay_buffer, model._n_updates = pickle.loads(buffer), 10
        model.set_random_seed(seed)
        runs.append(weights(model.learn(14)))
    assert th.equal(runs[0], runs[1]) and not th.equal(runs[0], runs[2])
