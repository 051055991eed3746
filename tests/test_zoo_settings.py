"""``benchmarks.learn --zoo``: settings from RL Zoo's files, read as RL Zoo reads them."""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise

from benchmarks import learn, zoo_settings
from benchmarks.envs import make_vec_env
from benchmarks.plots import read_rows
from benchmarks.zoo_settings import Noise, describe

yaml = pytest.importorskip("yaml")

SWINGUP = "dm_control/cartpole-swingup-v0"
# A run of a second
TINY = ["learning_starts:16", "batch_size:4", "n_simulations:2", "n_sampled_actions:2", "unroll_steps:2", "buffer_size:500"]


def parse(*words: str) -> learn.Run:
    return learn.parse([*words, "--zoo", "--out", "x"])[0]


def entries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    """RL Zoo's file of every algorithm is this one."""
    file = tmp_path / "some.yml"
    file.write_text(text)
    monkeypatch.setattr(zoo_settings, "file_of", lambda algo: file)


def test_a_task_of_the_paper_has_the_papers_settings() -> None:
    run = parse("--env", SWINGUP)
    assert (run.steps, run.policy, run.n_envs, run.action_repeat, run.env_kwargs) == (50000, "MlpPolicy", 1, 2, {})
    assert (run.params["gamma"], run.params["td_steps"], run.params["tau"]) == (0.994009, 5, 1.0)
    assert run.params["observation_coef"] == 10.0  # the one loss that the paper has not
    kwargs = dict(value_support=(299.0, 51, "h"), reward_support=(2.0, 51, "h"), reward_scale=1.0)
    assert run.params["policy_kwargs"] == kwargs
    for part in (
        "steps=50000 policy=MlpPolicy n_envs=1 action_repeat=2",
        f"zoo=ezv2.yml:{SWINGUP} ",
        "mixed_value_start=40000",
        f"policy_kwargs={kwargs}",
    ):
        assert part in run.settings


def test_the_command_line_has_precedence() -> None:
    line = ["--steps", "90", "--n-envs", "3", "--action-repeat", "4", "--policy", "MultiInputPolicy", "--env", SWINGUP]
    run = parse(*line, "--params", "gamma:0.9", "policy_kwargs.train_dtype:'bfloat16'", "policy_kwargs.reward_scale:2.0")
    assert (run.steps, run.n_envs, run.action_repeat, run.policy) == (90, 3, 4, "MultiInputPolicy")
    expected = dict(value_support=(299.0, 51, "h"), reward_support=(2.0, 51, "h"), reward_scale=2.0, train_dtype="bfloat16")
    assert run.params["policy_kwargs"] == expected and run.params["tau"] == 1.0
    assert "gamma=0.9 " in run.settings and f"policy_kwargs={expected}" in run.settings
    # The file is read anew, so that nothing of it may have changed
    assert "train_dtype" not in parse("--env", SWINGUP).params["policy_kwargs"]


@pytest.mark.parametrize(
    ("pairs", "expected", "text"),
    [
        (["policy_kwargs:dict(a=1)"], {"a": 1}, "dict(a=1)"),
        (["policy_kwargs.b:2"], {"a": 0, "b": 2}, "{'a': 0, 'b': 2}"),
        (["policy_kwargs:dict(c=3)", "policy_kwargs.b:th.optim.SGD"], {"c": 3, "b": th.optim.SGD}, "torch.optim.sgd.SGD"),
        (["policy_kwargs:None", "policy_kwargs.b:2"], {"b": 2}, "{'b': 2}"),
    ],
)
def test_one_key_of_a_dictionary(pairs: list[str], expected: dict[str, Any], text: str) -> None:
    base = {"policy_kwargs": {"a": 0}}
    params = learn.keyword_arguments(pairs, base)
    assert params["policy_kwargs"] == expected and base == {"policy_kwargs": {"a": 0}}
    assert text in learn._texts(pairs, params)["policy_kwargs"]


def test_one_key_beside_the_small_settings() -> None:
    line = ["--env", "CartPole-v1", "--steps", "9", "--small", "--out", "x", "--params", "policy_kwargs.state_dim:64"]
    run = learn.parse(line)[0]
    assert run.params["policy_kwargs"] == {"net_arch": [128], "n_blocks": 1, "projection_dim": 128, "state_dim": 64}
    assert "'projection_dim': 128, 'state_dim': 64}" in run.settings


@pytest.mark.parametrize(
    ("algo", "task"),
    [
        ("ezv2", "CartPole-v1"),
        ("ezv2", "LunarLander-v3"),
        ("sac", "Pendulum-v1"),
        ("sac", "MountainCarContinuous-v0"),
        ("sac", "PointMass2D-v0"),
        ("tqc", "BipedalWalker-v3"),
        ("crossq", "Pendulum-v1"),
        ("td3", "Pendulum-v1"),
        ("dqn", "CartPole-v1"),
        ("ppo", "CartPole-v1"),
        ("ppo", "Pendulum-v1"),
        ("qrdqn", "CartPole-v1"),
    ],
)
def test_the_same_as_rl_zoo(tmp_path: Path, algo: str, task: str) -> None:
    pytest.importorskip("rl_zoo3")
    from rl_zoo3.exp_manager import ExperimentManager

    from sb3_ezv2 import zoo

    zoo.register()
    manager = ExperimentManager(argparse.Namespace(env_kwargs=None), algo, task, str(tmp_path), verbose=0)
    expected, wrapper, _, _ = manager._preprocess_hyperparams(manager.read_hyperparameters()[0])
    run = parse("--algo", algo, "--env", task)
    assert (run.steps, run.n_envs, run.action_repeat) == (manager.n_timesteps, manager.n_envs, 1)
    assert wrapper is None and not manager.normalize and run.policy == expected.pop("policy")
    params = dict(run.params)
    if "noise_type" in expected:
        noise = params.pop("action_noise")
        assert (noise.kind, noise.std) == (expected.pop("noise_type"), expected.pop("noise_std"))
    assert params.keys() == expected.keys()
    for name, value in params.items():
        for remaining in (1.0, 0.3, 0.0):
            got, there = (x(remaining) if callable(x) and not isinstance(x, type) else x for x in (value, expected[name]))
            assert got == (pytest.approx(there) if isinstance(there, float) else there), name


def test_settings_of_a_baseline_name_the_version_of_the_defaults() -> None:
    pytest.importorskip("rl_zoo3")
    import sb3_contrib
    import stable_baselines3

    line = ("--env", SWINGUP, "--steps", "50000", "--action-repeat", "2")
    run = parse(*line, "--algo", "sac")
    assert run.params == {} and run.action_repeat == 2
    assert run.settings.endswith(f"zoo=sac.yml:default stable_baselines3={stable_baselines3.__version__}")
    assert f"zoo=tqc.yml:default sb3_contrib={sb3_contrib.__version__}" in parse(*line, "--algo", "tqc").settings
    assert "clip_range=lin_0.2" in parse("--algo", "ppo", "--env", "CartPole-v1").settings


def test_baselines_need_rl_zoo_and_ezv2_does_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(zoo_settings.importlib.util, "find_spec", lambda name: None)
    assert parse("--env", "CartPole-v1").params["batch_size"] == 64
    with pytest.raises(ImportError, match="settings of sac for --zoo come with RL Zoo: pip install"):
        parse("--env", "Pendulum-v1", "--algo", "sac")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(SystemExit):
        learn.main(["--zoo", "--env", "CartPole-v1", "--out", "x"])
    assert "needs PyYAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("normalize: true", "normalize: True"),
        ("frame_stack: 4", "frame_stack: 4"),
        ("env_wrapper: gymnasium.wrappers.FlattenObservation", "the wrapper gymnasium.wrappers.FlattenObservation"),
        ("env_wrapper: [rl_zoo3.wrappers.FrameSkip, {a.B: {c: 1}}]", "the wrapper a.B"),
        ("vec_env_wrapper: a.B", "vec_env_wrapper: a.B"),
        ("callback: a.B", "callback: a.B"),
        ("no_such: 1", "no_such: 1"),
        ("learning_rate: lin_much", "the schedule lin_much"),
        ("policy_kwargs: dict(a=Nothing)", r"policy_kwargs: dict\(a=Nothing\) \(name 'Nothing' is not defined\)"),
        ("noise_type: pink", "noise_type pink"),
    ],
)
def test_what_cannot_be_done_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entry: str, what: str) -> None:
    entries(monkeypatch, tmp_path, f"A-v1:\n  policy: MlpPolicy\n  n_timesteps: !!float 1e3\n  {entry}\n")
    with pytest.raises(ValueError, match=f"The entry some.yml:A-v1 has {what}, which benchmarks.learn cannot do"):
        parse("--env", "A-v1")


def test_what_an_entry_may_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = """
        policy: MlpPolicy
        n_timesteps: !!float 1e3
        normalize: false
        env_wrapper:
          - rl_zoo3.wrappers.FrameSkip:
              skip: 2
          - rl_zoo3.wrappers.FrameSkip
        env_kwargs: {a: 1, b: {c: 2}}
        train_freq: [1, episode]
        learning_rate: lin_3e-4
        """
    entries(monkeypatch, tmp_path, f"default: {yaml.safe_load(text)!r}")
    run = parse("--env", "A-v1", "--env-kwargs", "b.d:3")
    assert run.action_repeat == 8 and run.env_kwargs == {"a": 1, "b": {"c": 2, "d": 3}}
    assert run.params["train_freq"] == (1, "episode") and "learning_rate=lin_3e-4" in run.settings
    assert [run.params["learning_rate"](remaining) for remaining in (1.0, 0.5, 0.0)] == pytest.approx([3e-4, 1.5e-4, 0.0])


def test_no_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries(monkeypatch, tmp_path, "A-v1: {policy: MlpPolicy, n_timesteps: 9}")
    with pytest.raises(ValueError, match=r"some\.yml has no entry for B-v1 and no 'default'"):
        parse("--env", "B-v1")
    with pytest.raises(ValueError, match=r"some\.yml has no entry for ALE/Pong-v5 and no 'atari'"):
        parse("--env", "ALE/Pong-v5")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--zoo", "--small"], "not allowed with argument"),
        (["--steps", "9", "--params", "batch_sizes.a:1"], "ezv2 takes no parameter 'batch_sizes' here; it has learning_rate,"),
        (["--zoo", "--params", "batch_size.a:1"], "'batch_size.a:1' sets a key of batch_size, which is no dictionary but 64."),
        (["--zoo", "--params", "a.b.c:1"], "'a.b.c:1' is not of the form name:value"),
        ([], "--steps is needed, or --zoo"),
        (["--zoo", "--n-envs", "0"], "--n-envs must be positive, not 0."),
    ],
)
def test_bad_command_lines(capsys: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit):
        learn.main(["--env", "CartPole-v1", "--out", "x", *words])
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_noise_has_the_size_of_the_actions() -> None:
    box = spaces.Box(-1, 1, (3,))
    normal, other = (Noise(kind, 0.2).make(box) for kind in ("normal", "ornstein-uhlenbeck"))
    assert isinstance(normal, NormalActionNoise) and isinstance(other, OrnsteinUhlenbeckActionNoise)
    np.testing.assert_array_equal(normal._sigma, [0.2] * 3)
    assert normal().shape == other().shape == (3,)
    with pytest.raises(ValueError, match="only be added to Box"):
        Noise("normal", 0.2).make(spaces.Discrete(2))


def test_values_are_described_alike_in_every_process() -> None:
    value = {"a": [1, "x"], "b": (2.0,), "c": (), "d": th.nn.ReLU, "e": None, "f": {"g": make_vec_env}}
    expected = "{'a': [1, 'x'], 'b': (2.0,), 'c': (), 'd': torch.nn.modules.activation.ReLU, 'e': None, "
    assert describe(value) == expected + "'f': {'g': benchmarks.envs.make_vec_env}}"


def test_runs_train_and_go_on(tmp_path: Path) -> None:
    line = ["--zoo", "--env", "Pendulum-v1", "--steps", "30", "--eval-every", "15", "--episodes", "1", "--threads", "1"]
    line += ["--out", str(tmp_path), "--params", *TINY, "policy_kwargs.state_dim:8"]
    assert learn.main([*line, "--time-limit", "1e-9"]) == learn.UNFINISHED
    assert learn.main(line) == 0
    rows = read_rows([tmp_path])
    assert [row["step"] for row in rows] == [15, 30] and "zoo=ezv2.yml:Pendulum-v1" in rows[0]["settings"]


def test_a_baseline_with_noise_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("rl_zoo3")
    line = ["--zoo", "--algo", "td3", "--env", "Pendulum-v1", "--steps", "30", "--eval-every", "15", "--episodes", "1"]
    line += ["--threads", "1", "--out", str(tmp_path), "--params", "learning_starts:5", "batch_size:4"]
    assert learn.main([*line, "--time-limit", "1e-9"]) == learn.UNFINISHED
    assert learn.main(line) == 0
    assert [row["step"] for row in read_rows([tmp_path])] == [15, 30]
