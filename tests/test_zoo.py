"""RL Zoo in this process: registration, configurations, environments, the search space, studies."""

from __future__ import annotations

import functools
import gc
import importlib.util
import runpy
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from common import BOX, FaultyEnv, SpacesEnv
from gymnasium import spaces

pytest.importorskip("rl_zoo3", reason="needs the extra zoo")

import optuna
import rl_zoo3
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3 import PPO
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage
from zoo_tools import load_study, manager

from sb3_ezv2 import EZV2, zoo
from sb3_ezv2.search_space import NETWORKS, convert_ezv2_params, sample_ezv2_params, study_hyperparams

zoo.register()

CONFIGS = {path.name: yaml.safe_load(path.read_text()) for path in sorted(zoo.CONFIGS.glob("*.yml"))}
ENTRIES = [(config, name) for config, entries in CONFIGS.items() for name in entries]

EASY = {
    *("cartpole-balance", "cartpole-balance_sparse", "cartpole-swingup", "ball_in_cup-catch", "finger-spin"),
    *("pendulum-swingup", "reacher-easy", "reacher-hard", "walker-stand", "walker-walk"),
}
HARD = {
    *("acrobot-swingup", "cartpole-swingup_sparse", "cheetah-run", "finger-turn_easy", "finger-turn_hard"),
    *("hopper-hop", "hopper-stand", "quadruped-run", "quadruped-walk", "walker-run"),
}
"""The paper's Table 2."""

TINY = dict(
    batch_size=16,
    learning_starts=40,
    n_simulations=4,
    n_sampled_actions=4,
    policy_kwargs=dict(net_arch=[16], state_dim=16, n_blocks=1, projection_dim=16),
)


def register(name: str, entry_point: Callable[..., gym.Env]) -> str:
    if name not in gym.registry:
        gym.register(name, entry_point=entry_point)
    return name


def need(env_id: str, rendered: bool = False) -> None:
    """Skip the test if something is missing that the environment needs."""
    modules = {"Lunar": ["Box2D"], "Bipedal": ["Box2D"], "ALE/": ["ale_py", "cv2"], "dm_control/": ["dm_control"]}
    needed = [module for start, names in modules.items() if env_id.startswith(start) for module in names]
    if "NoFrameskip" in env_id:
        needed = ["ale_py", "cv2"]
    if env_id.endswith("-v5") and not needed:
        needed = ["mujoco"]
    for module in needed:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{env_id} needs {module}")
    if rendered and (error := rendering_error()):
        pytest.skip(f"nothing renders here: {error}")


@functools.cache
def rendering_error() -> str:
    """:return: why the control suite does not render; empty if it does"""
    zoo.import_env("dm_control/pendulum-swingup-v0")
    try:
        env = gym.make("dm_control/pendulum-swingup-v0", render_mode="rgb_array")
        env.reset()
        env.render()
        env.close()
    except Exception as error:
        return repr(error)
    return ""


# ---------------------------------------------------------------------- registration


def test_registered_once() -> None:
    before = ExperimentManager.objective
    zoo.register()
    assert ExperimentManager.objective is before
    assert rl_zoo3.ALGOS["ezv2"] is EZV2


def test_other_algorithms_are_left_alone(tmp_path: Path) -> None:
    experiment = manager(tmp_path, "CartPole-v1", hyperparams=dict(n_envs=1), env_kwargs=dict(sutton_barto_reward=True))
    other = ExperimentManager(experiment.args, "ppo", "CartPole-v1", str(tmp_path), verbose=0, eval_freq=-1)
    assert other.config.endswith("hyperparams/ppo.yml") and Path(other.config).is_file()
    setup = other.setup_experiment()
    assert setup is not None and isinstance(setup[0], PPO)


def test_configuration_of_the_user_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert manager(tmp_path, "CartPole-v1").config == str(zoo.CONFIGS / "ezv2.yml")
    assert manager(tmp_path, "CartPole-v1", config="ezv2_vision.yml").config == str(zoo.CONFIGS / "ezv2_vision.yml")
    own = tmp_path / "own.yml"
    own.write_text("CartPole-v1: {n_timesteps: 7, policy: MlpPolicy, gamma: 0.9}")
    experiment = manager(tmp_path, "CartPole-v1", config=str(own))
    setup = experiment.setup_experiment()
    assert setup is not None and setup[0].gamma == 0.9 and experiment.n_timesteps == 7
    # Also one of the same name as ours
    monkeypatch.chdir(tmp_path)
    own.rename(tmp_path / "ezv2_vision.yml")
    assert manager(tmp_path, "CartPole-v1", config="ezv2_vision.yml").config == "ezv2_vision.yml"


def test_missing_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gym, "registry", {})
    with pytest.raises(ImportError, match=r"dm_control/walker-walk-v0 needs .*pip install 'sb3-ezv2\[dmc\]'"):
        zoo.import_env("dm_control/walker-walk-v0")
    for env_id in ("ALE/Pong-v5", "PongNoFrameskip-v4"):
        with pytest.raises(SystemExit, match=rf"{env_id} needs ale_py.*pip install 'sb3-ezv2\[atari\]'"):
            zoo._prepare_command(["train", "--algo", "ezv2", f"--env={env_id}"])
    zoo._prepare_command(["train", "--algo", "ppo", "--env", "ALE/Pong-v5"])  # not our business


@pytest.mark.parametrize(
    "hyperparams, message",
    [
        (dict(n_simulation=3), "EZV2 has no argument 'n_simulation'. Did you mean 'n_simulations'.*-params"),
        (dict(use_sde=True), "gSDE"),
        (dict(noise_type="normal", noise_std=0.1), "no argument 'noise_type'"),
    ],
)
def test_unknown_key(tmp_path: Path, hyperparams: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        manager(tmp_path, "Pendulum-v1", hyperparams=hyperparams).setup_experiment()


# ---------------------------------------------------------------------- configurations


def test_tasks_of_the_paper() -> None:
    for config, budgets in {"ezv2.yml": (50_000, 100_000), "ezv2_vision.yml": (100_000, 200_000)}.items():
        entries = {name: entry for name, entry in CONFIGS[config].items() if name.startswith("dm_control/")}
        for tasks, budget in zip((EASY, HARD), budgets):
            for task in tasks:
                assert entries.pop(f"dm_control/{task}-v0")["n_timesteps"] == budget
        assert not entries


@pytest.mark.parametrize("config, name", ENTRIES)
def test_entry_is_consistent(config: str, name: str) -> None:
    entry = CONFIGS[config][name]
    # One observation more for the end of every episode
    assert entry["buffer_size"] > 1.05 * entry["n_timesteps"]
    assert entry["gradient_steps"] == (4 if name in ("CartPole-v1", "Pendulum-v1") else -1)
    assert entry["learning_starts"] <= 500


@pytest.mark.parametrize("config, name", ENTRIES)
def test_entry_runs(config: str, name: str, tmp_path: Path) -> None:
    env_id = {"default": "ZooBox-v0", "atari": "ALE/Pong-v5"}.get(name, name)
    register("ZooBox-v0", partial(SpacesEnv, BOX, spaces.Box(-1.0, 1.0, (2,), np.float32)))
    need(env_id, rendered=config == "ezv2_vision.yml")
    experiment = manager(tmp_path, env_id, config=config, seed=0)
    setup = experiment.setup_experiment()
    assert setup is not None
    model = setup[0]
    assert isinstance(model, EZV2)
    model.learn(2 * experiment.n_envs)
    vec_env: Any = model.get_env()
    model.predict(vec_env.reset(), deterministic=True)
    vec_env.close()


# ---------------------------------------------------------------------- environments


def train_env(experiment: Any, eval_env: bool = False) -> VecEnv:
    hyperparams, saved = experiment.read_hyperparameters()
    _, experiment.env_wrapper, _, experiment.vec_env_wrapper = experiment._preprocess_hyperparams(hyperparams)
    experiment.create_log_folder()
    experiment._save_config(saved)
    return experiment.create_envs(1, eval_env=eval_env, no_log=True)


class Agent:
    """In place of a trained agent: random actions; remembers whether it was asked for deterministic ones."""

    asked: list[bool]

    def __init__(self, action_space: spaces.Space):
        self.action_space = action_space
        self.asked = []

    def predict(self, obs: Any, deterministic: bool = False, **_: Any) -> tuple[np.ndarray, None]:
        self.asked.append(deterministic)
        return np.stack([self.action_space.sample() for _ in obs]), None


def command_env(command: str, env_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[VecEnv, Agent]:
    """:return: the environment that ``enjoy`` or ``record_video`` makes for a run in ``folder``, and the agent that acted"""
    made: list[Any] = []
    create_test_env = rl_zoo3.utils.create_test_env

    def create(*args: Any, **kwargs: Any) -> VecEnv:
        env = create_test_env(*args, **kwargs)
        made.extend([env, Agent(env.action_space)])
        monkeypatch.setattr(env, "close", lambda: None)
        return env

    class Loaded:
        @staticmethod
        def load(*_: Any, **__: Any) -> Agent:
            return made[1]

    monkeypatch.setattr(rl_zoo3.utils, "create_test_env", create)
    monkeypatch.setattr(rl_zoo3, "create_test_env", create)
    monkeypatch.setitem(rl_zoo3.ALGOS, "ezv2", Loaded)
    arguments = ["--algo", "ezv2", "--env", env_id, "-f", str(folder), "-n", "3", "--seed", "0"]
    if command == "enjoy":
        arguments.append("--no-render")
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", f"rl_zoo3.{command}", *arguments])
    zoo._prepare_command(sys.argv)
    name = env_id.replace("/", "-")
    (folder / "ezv2" / f"{name}_1" / f"{name}.zip").touch()
    monkeypatch.delitem(sys.modules, f"rl_zoo3.{command}", raising=False)
    runpy.run_module(f"rl_zoo3.{command}", run_name="__main__")
    return made[0], made[1]


def rollout(env: VecEnv, seed: int = 0, steps: int = 40) -> list[np.ndarray]:
    """:return: observations, rewards and ends under fixed actions, images channel-last"""
    layer = env.unwrapped.envs[0]  # type: ignore[attr-defined]
    while layer is not layer.unwrapped:
        if isinstance(layer, EpisodicLifeEnv):
            layer.was_real_done = True  # or a reset in the middle of a game would not begin a new one
        layer = layer.env
    env.seed(seed)
    env.action_space.seed(seed)
    obs = env.reset()
    results: list[Any] = []
    for _ in range(steps):
        results.append(obs)
        obs, rewards, dones, _ = env.step(np.array([env.action_space.sample()]))
        results.extend([rewards, dones])
    if isinstance(env, VecTransposeImage):
        results[::3] = [image.transpose(0, 2, 3, 1) for image in results[::3]]
    return results


@pytest.mark.parametrize(
    "env_id, config, env_kwargs",
    [
        ("ALE/Pong-v5", None, None),
        ("ALE/Pong-v5", None, dict(difficulty=1)),
        ("PongNoFrameskip-v4", None, None),
        ("dm_control/walker-walk-v0", None, None),
        ("dm_control/walker-walk-v0", "ezv2_vision.yml", None),
    ],
)
def test_every_command_has_the_same_environment(
    env_id: str, config: str | None, env_kwargs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(env_id, rendered=config is not None)
    pytest.importorskip("moviepy", reason="record_video needs it")
    experiment = manager(tmp_path, env_id, config=config, env_kwargs=env_kwargs, seed=0)
    expected = rollout(train_env(experiment))
    assert experiment.deterministic_eval
    study = manager(tmp_path / "study", env_id, config=config, env_kwargs=env_kwargs, optimize_hyperparameters=True)
    environments = {"eval": experiment.create_envs(1, eval_env=True), "optimize": train_env(study)}
    environments["optimize, eval"] = study.create_envs(1, eval_env=True)
    for command in zoo.EVALUATIONS:
        with monkeypatch.context() as patch:
            if command == "record_video" and env_id.startswith("dm_control") and config is None:
                need(env_id, rendered=True)
            environments[command], agent = command_env(command, env_id, tmp_path, patch)
            assert agent.asked == [True] * 3
    for name, env in environments.items():
        for ours, theirs in zip(expected, rollout(env), strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        env.close()


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "PongNoFrameskip-v4"])
def test_atari_environment(env_id: str, tmp_path: Path) -> None:
    need(env_id)
    env = train_env(manager(tmp_path, env_id, seed=0))
    assert env.observation_space == spaces.Box(0, 255, (12, 96, 96), np.uint8)
    assert env.action_space == spaces.Discrete(6)
    ale = env.get_attr("unwrapped")[0]
    assert ale._frameskip == 1 and ale.ale.getFloat("repeat_action_probability") == 0
    env.reset()
    noops = ale.ale.getEpisodeFrameNumber()
    assert 1 <= noops <= 30
    for step in range(1, 31):
        obs: Any = env.step(np.array([2]))[0]
        assert ale.ale.getEpisodeFrameNumber() == noops + 4 * step
    assert len(np.unique(obs[0].reshape(4, -1), axis=0)) == 4 and obs.dtype == np.uint8


def test_atari_scores_are_raw_and_of_whole_games(tmp_path: Path) -> None:
    need("ALE/SpaceInvaders-v5")
    env = train_env(manager(tmp_path, "ALE/SpaceInvaders-v5", seed=0), eval_env=True)
    rewards, ends, games = [], [], []

    def record(local: dict[str, Any], _: dict[str, Any]) -> None:
        rewards.append(local["reward"])
        ends.append(local["done"])
        games.append("episode" in local["info"])

    agent = Agent(env.action_space)
    agent.action_space.seed(0)
    (score,), (length,) = evaluate_policy(  # type: ignore[misc]
        agent,  # type: ignore[arg-type]
        env,
        n_eval_episodes=1,
        callback=record,
        return_episode_rewards=True,
        deterministic=True,
    )
    # What the agent sees: a lost life ends an episode, and rewards are clipped. What counts: one game, its score
    assert sum(ends) == 3 and sum(games) == 1 and games[-1]
    assert set(rewards) <= {-1.0, 0.0, 1.0} and score % 5 == 0 and score >= 5 * sum(rewards) > 0
    assert length > 3 * len(rewards)  # in frames


def test_vision_environment(tmp_path: Path) -> None:
    need("dm_control/walker-walk-v0", rendered=True)
    env = train_env(manager(tmp_path, "dm_control/walker-walk-v0", config="ezv2_vision.yml", seed=0))
    assert env.observation_space == spaces.Box(0, 255, (12, 96, 96), np.uint8)
    env.reset()
    for _ in range(3):
        obs: Any = env.step(np.array([env.action_space.sample()]))[0]
    images = obs[0].reshape(4, 3, 96, 96)  # VecTransposeImage moves the stacked channels, newest last
    assert images.std() > 10 and not np.array_equal(images[-1], images[-2])
    assert env.get_attr("unwrapped")[0].physics.time() == pytest.approx(3 * 2 * 0.025)


def test_control_suite_environment(tmp_path: Path) -> None:
    need("dm_control/walker-walk-v0")
    env = train_env(manager(tmp_path, "dm_control/walker-walk-v0", seed=0))
    assert env.observation_space.shape == (24,)
    env.reset()
    steps, total, ended = 0, 0.0, False
    while not ended:
        _, rewards, (ended,), (info,) = env.step(np.array([env.action_space.sample()]))
        steps, total = steps + 1, total + rewards[0]
        assert 0 <= rewards[0] <= 2
    assert steps == 500 and info["TimeLimit.truncated"] and info["episode"]["l"] == 1000
    assert info["episode"]["r"] == pytest.approx(total, abs=1e-4)


def test_env_kwargs_reach_every_environment(tmp_path: Path) -> None:
    settings = dict(hyperparams=dict(env_kwargs=dict(g=3.0)), env_kwargs=dict(render_mode="rgb_array"))
    experiment = manager(tmp_path, "Pendulum-v1", **settings)
    for env in (train_env(experiment), experiment.create_envs(1, eval_env=True)):
        assert env.get_attr("unwrapped")[0].g == 3.0 and env.render_mode == "rgb_array"
    assert experiment.args.env_kwargs == dict(g=3.0, render_mode="rgb_array")
    experiment = manager(tmp_path, "Pendulum-v1", **settings, eval_env_kwargs=dict(g=5.0))
    envs = (train_env(experiment), experiment.create_envs(1, eval_env=True))
    assert [env.get_attr("unwrapped")[0].g for env in envs] == [3.0, 5.0]


# ---------------------------------------------------------------------- the search space


@pytest.mark.parametrize(
    "n_actions, action_space",
    [(0, spaces.Discrete(3)), (2, spaces.Box(-1.0, 1.0, (2,), np.float32)), (3, spaces.MultiDiscrete([5, 2, 9]))],
)
@pytest.mark.parametrize("n_envs", [1, 4])
def test_samples_are_valid(n_actions: int, action_space: spaces.Space, n_envs: int) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    env = SpacesEnv(BOX, action_space)
    params: dict[str, set[Any]] = {}
    for index in range(60):
        trial = study.ask()
        sampled = sample_ezv2_params(trial, n_actions, n_envs, {})
        assert convert_ezv2_params(trial.params) == sampled
        assert 2 <= sampled["n_sampled_actions"] <= sampled["n_simulations"]
        assert sampled["gradient_steps"] / (sampled["train_freq"] * n_envs) in (0.5, 1, 2)
        assert trial.user_attrs["gamma"] == sampled["gamma"] < 1
        for name, value in trial.params.items():
            params.setdefault(name, set()).add(value)
        if index < 10:
            EZV2("MlpPolicy", env, device="cpu", **sampled)
    assert all(len(values) > 1 for values in params.values())
    assert ("flat_std_scale" in params) == (n_actions > 0)


def test_sampled_network_leaves_other_policy_kwargs() -> None:
    study = optuna.create_study()
    supports = dict(value_support=(299.0, 51, "h"), net_arch=[7])
    token = study_hyperparams.set(dict(policy="MlpPolicy", policy_kwargs=supports))
    sampled = sample_ezv2_params(study.ask(), 0, 1, {})
    study_hyperparams.set(dict(policy="CnnPolicy", policy_kwargs=supports))
    of_images = sample_ezv2_params(study.ask(), 0, 1, {})
    study_hyperparams.reset(token)
    assert sampled["policy_kwargs"]["value_support"] == (299.0, 51, "h")
    assert sampled["policy_kwargs"]["net_arch"] in [network["net_arch"] for network in NETWORKS.values()]
    assert "policy_kwargs" not in of_images


# ---------------------------------------------------------------------- studies


@pytest.fixture
def study_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A manager that optimizes tiny agents: the search space's batches and networks would take minutes."""

    def sample(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict) -> dict[str, Any]:
        return {**sample_ezv2_params(trial, n_actions, n_envs, additional_args), **TINY}

    monkeypatch.setitem(rl_zoo3.exp_manager.HYPERPARAMS_SAMPLER, "ezv2", sample)

    def make(env_id: str, **settings: Any) -> Any:
        experiment = manager(
            tmp_path,
            env_id,
            optimize_hyperparameters=True,
            n_timesteps=80,
            n_evaluations=2,
            n_eval_episodes=1,
            hyperparams=dict(learning_starts=40),
            **settings,
        )
        assert experiment.setup_experiment() is None
        return experiment

    return make


def test_trials_free_agents_and_threads(study_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    agents = []

    class Watched(EZV2):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            agents.append(weakref.ref(self))

    monkeypatch.setitem(rl_zoo3.ALGOS, "ezv2", Watched)

    class PruneSecond(optuna.pruners.NopPruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return trial.number == 1

    experiment = study_of("CartPole-v1")
    study = optuna.create_study(pruner=PruneSecond())
    threads = threading.active_count()
    study.optimize(experiment.objective, n_trials=3, gc_after_trial=True)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    gc.collect()
    assert len(agents) == 3 and not any(agent() for agent in agents)
    assert threading.active_count() == threads


def test_the_search_space_of_multi_discrete_actions(study_of: Callable[..., Any]) -> None:
    for name, space in (("Multi", spaces.MultiDiscrete([3, 2, 9])), ("Binary", spaces.MultiBinary(3))):
        experiment = study_of(register(f"Zoo{name}-v0", partial(SpacesEnv, BOX, space)))
        assert experiment.n_actions == 3
    study = optuna.create_study()
    study.optimize(experiment.objective, n_trials=1)
    (trial,) = study.trials
    assert trial.state.name == "COMPLETE" and 1 <= trial.params["flat_std_scale"] <= 4


def test_nan_prunes_the_trial(study_of: Callable[..., Any]) -> None:
    env_id = register("ZooNaN-v0", partial(FaultyEnv, "reward", 60))
    study = optuna.create_study()
    study.optimize(study_of(env_id).objective, n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "PRUNED"]


def test_two_jobs(study_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads learn at once: both searches are traced, and each agent has generators of its own."""
    states: list[str] = []
    traced: list[bool] = []

    class Watched(EZV2):
        def learn(self, *args: Any, **kwargs: Any) -> Any:
            result = super().learn(*args, **kwargs)
            states.append(str(self._generators["acting"].bit_generator.state))  # type: ignore[index]
            # batches of more than NATIVE_MAX_ROOTS states are searched with the traced model
            self.policy.target_search.run(th.zeros(100, 4), np.random.default_rng(0))
            traced.append(isinstance(self.policy.target_search._traced._step, th.jit.ScriptModule))
            return result

    monkeypatch.setitem(rl_zoo3.ALGOS, "ezv2", Watched)
    experiment = study_of("CartPole-v1")
    study = optuna.create_study(pruner=optuna.pruners.NopPruner())
    study.optimize(experiment.objective, n_trials=6, n_jobs=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 6
    assert len(set(states)) == 6 and all(traced)


def test_hyperparameters_of_a_trial(study_of: Callable[..., Any], tmp_path: Path) -> None:
    storage = str(tmp_path / "study.log")
    settings = dict(storage=storage, study_name="s", n_trials=2, sampler="random", pruner="none", seed=0)
    study_of("CartPole-v1", **settings, no_optim_plots=True).hyperparameters_optimization()
    trials = load_study(Path(storage), "s").trials
    for trial in trials:  # also the one whose id is 0
        expected = convert_ezv2_params(trial.params)
        experiment = manager(tmp_path, "CartPole-v1", storage=storage, study_name="s", trial_id=trial.number)
        setup = experiment.setup_experiment()
        assert setup is not None
        model, saved = setup
        assert model.gamma == expected["gamma"] == saved["gamma"]
        assert model.batch_size == expected["batch_size"] and model.n_simulations == expected["n_simulations"]
        assert model.policy_kwargs == {**dict(n_blocks=1, net_arch=[128], projection_dim=128), **expected["policy_kwargs"]}
    experiment = manager(tmp_path, "CartPole-v1", storage=storage, study_name="s", trial_id=1, hyperparams=dict(gamma=0.5))
    assert experiment.setup_experiment()[0].gamma == 0.5
