"""Packing an agent for the Hugging Face hub, with everything but the network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from common import weights
from sb3_agents import agent
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ezv2 import EZV2

huggingface_sb3 = pytest.importorskip("huggingface_sb3")
hub = pytest.importorskip("huggingface_sb3.push_to_hub")
naming = pytest.importorskip("huggingface_sb3.naming_schemes")


class Repository:
    """Takes the place of the hub's client: what would be uploaded is copied into a folder."""

    folder: Path
    messages: list[str]

    def __init__(self, token: str | None = None):
        self.token = token

    def create_repo(self, repo_id: str, exist_ok: bool = False) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str | None) -> None:
        shutil.copytree(folder_path, self.folder / repo_id)
        self.messages.append(str(commit_message))

    def upload_file(self, path_or_fileobj: str, path_in_repo: str, repo_id: str, commit_message: str | None) -> None:
        (self.folder / repo_id).mkdir(parents=True)
        shutil.copy(path_or_fileobj, self.folder / repo_id / path_in_repo)
        self.messages.append(str(commit_message))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Repository.folder, Repository.messages = tmp_path / "hub", []
    monkeypatch.setattr(hub, "HfApi", Repository)
    return Repository.folder


def names(env_id: str) -> tuple[Any, Any]:
    """:return: names of an agent's file and repository"""
    name = naming.ModelName("ezv2", naming.EnvironmentName(env_id))
    return name, naming.ModelRepoId("somebody", name)


def test_names(tmp_path: Path) -> None:
    name, repo_id = names("dm_control/cartpole-swingup-v0")
    assert (name, name.filename, repo_id) == (
        "ezv2-dm_control-cartpole-swingup-v0",
        "ezv2-dm_control-cartpole-swingup-v0.zip",
        "somebody/ezv2-dm_control-cartpole-swingup-v0",
    )
    agent().save(tmp_path / name)
    assert (tmp_path / name.filename).is_file()


def test_one_file(tmp_path: Path, repository: Path) -> None:
    name, repo_id = names("CartPole-v1")
    model = agent().learn(14)
    model.save(tmp_path / name)
    huggingface_sb3.push_to_hub(repo_id, str(tmp_path / name.filename), commit_message="An agent")
    assert th.equal(weights(EZV2.load(repository / repo_id / name.filename, device="cpu")), weights(model))
    assert Repository.messages == ["An agent"]


@pytest.mark.parametrize("normalized", [False, True])
def test_a_whole_package(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, normalized: bool) -> None:
    """The agent, its settings, its evaluation, its card, its logs; the video alone is left out (it takes seconds)."""
    monkeypatch.setattr(hub, "_generate_replay", lambda *args: None)
    env: Any = make_vec_env("CartPole-v1", 1, seed=0)
    if normalized:
        env = VecNormalize(env)
    logs = tmp_path / "logs"
    model = agent(env=env, tensorboard_log=str(logs)).learn(40, log_interval=1)
    name, repo_id = names("CartPole-v1")
    hub.package_to_hub(
        model, name, "EZV2", "CartPole-v1", env, repo_id, commit_message="An agent", n_eval_episodes=2, logs=str(logs)
    )
    packed = repository / repo_id
    assert {name.filename, name, "config.json", "results.json", "README.md", "logs"} <= {x.name for x in packed.iterdir()}
    assert (packed / "vec_normalize.pkl").exists() == normalized and any((packed / "logs").rglob("events*"))

    config = json.loads((packed / "config.json").read_text())
    assert config["num_timesteps"] == 40 and config["gamma"] == model.gamma and config["n_simulations"] == model.n_simulations
    assert config["policy_class"]["__module__"] == "sb3_ezv2.policies" and "Stable-Baselines3" in config["system_info"]
    results = json.loads((packed / "results.json").read_text())
    assert results["n_eval_episodes"] == 2 and results["is_deterministic"] and np.isfinite(results["mean_reward"])
    card = hub.ModelCard.load(packed / "README.md")
    assert card.data.to_dict()["library_name"] == "stable-baselines3" and {"CartPole-v1", "reinforcement-learning"} <= set(
        card.data.tags
    )
    assert card.data.eval_results[0].metric_value == f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}"

    loaded = EZV2.load(packed / name.filename, device="cpu")
    assert th.equal(weights(loaded), weights(model))
    obs = gym.make("CartPole-v1").observation_space.sample()
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
