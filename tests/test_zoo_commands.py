"""RL Zoo's commands as a user types them, in processes of their own, and what puts EZV2 there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("rl_zoo3", reason="needs the extra zoo")

from zoo_tools import ROOT, environment, load_study, run

from sb3_ezv2 import EZV2

TRAIN = ("-m", "rl_zoo3.train", "--algo", "ezv2", "--seed", "0", "--device", "cpu", "--env")
# At 500 steps the first updates are made
CARTPOLE = (*TRAIN, "CartPole-v1", "-n", "510")


def need(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty directory, then with a trained agent in it."""
    path = tmp_path_factory.mktemp("zoo")
    extra = ("-P", "--eval-freq", "250", "--eval-episodes", "1", "--save-freq", "505", "--save-replay-buffer", "-tb", "tb")
    run(*CARTPOLE, *extra, cwd=path)
    return path


def updates(model: Path) -> int:
    return EZV2.load(model, device="cpu")._n_updates


# ---------------------------------------------------------------------- the commands


def test_train(folder: Path) -> None:
    run_folder = folder / "logs/ezv2/CartPole-v1_1"
    assert {str(path.relative_to(run_folder)) for path in run_folder.rglob("*") if path.is_file()} == {
        "0.monitor.csv",
        "CartPole-v1.zip",
        "CartPole-v1/args.yml",
        "CartPole-v1/command.txt",
        "CartPole-v1/config.yml",
        "best_model.zip",
        "evaluations.npz",
        "replay_buffer.pkl",
        "rl_model_505_steps.zip",
    }
    # The checkpoint is from before its step's update
    assert updates(run_folder / "CartPole-v1.zip") == 40 and updates(run_folder / "rl_model_505_steps.zip") == 16
    config = yaml.load((run_folder / "CartPole-v1/config.yml").read_text(), Loader=yaml.UnsafeLoader)
    assert config["n_timesteps"] == 5000 and config["learning_starts"] == 500
    assert list((folder / "tb").rglob("events*"))


def test_going_on(folder: Path) -> None:
    """After test_train: a later run of its own number."""
    output = run(*CARTPOLE, "-f", "more", "-i", "logs/ezv2/CartPole-v1_1/CartPole-v1.zip", cwd=folder)
    assert "Loading replay buffer" in output
    assert updates(folder / "more/ezv2/CartPole-v1_1/CartPole-v1.zip") == 80


@pytest.mark.parametrize("which", [(), ("--load-best",), ("--load-checkpoint", "505"), ("--stochastic",)])
def test_enjoy(folder: Path, which: tuple[str, ...]) -> None:
    command = ("-m", "rl_zoo3.enjoy", "--algo", "ezv2", "--env", "CartPole-v1", "--no-render", "-f", "logs", *which)
    if which and which != ("--load-best",):
        command = (*command, "-n", "20")
    assert "Loading logs/ezv2/CartPole-v1_1" in run(*command, cwd=folder)


def test_record_video(folder: Path) -> None:
    need("moviepy", "pygame")
    command = ("-m", "rl_zoo3.record_video", "--algo", "ezv2", "--env", "CartPole-v1", "-n", "20", "-f", "logs")
    run(*command, cwd=folder, SDL_VIDEODRIVER="dummy")
    (video,) = (folder / "logs/ezv2/CartPole-v1_1/videos").glob("*.mp4")
    assert video.stat().st_size > 1000


def test_console_script_and_plots(folder: Path) -> None:
    need("seaborn", "pandas")
    script = Path(sys.executable).with_name("rl_zoo3")
    if not script.exists():
        pytest.skip("the script rl_zoo3 is not beside this Python")
    settings = ("-n", "510", "-params", "n_simulations:8", "batch_size:64")
    run(str(script), "train", *TRAIN[2:], "Pendulum-v1", *settings, cwd=folder)
    model = EZV2.load(folder / "logs/ezv2/Pendulum-v1_1/Pendulum-v1.zip", device="cpu")
    assert (model._n_updates, model.n_simulations, model.batch_size) == (40, 8, 64)
    run("-m", "rl_zoo3.plots.plot_train", "-a", "ezv2", "-e", "CartPole", "-w", "5", "-f", "logs/", cwd=folder)


def test_optimize_in_two_processes(tmp_path: Path) -> None:
    options = "-optimize --n-trials 2 --n-evaluations 2 --n-startup-trials 1 --sampler tpe --pruner median"
    storage = ("--storage", "logs/ezv2.log", "--study-name", "s")
    command = [sys.executable, *CARTPOLE, *options.split(), "--eval-episodes", "1", *storage]
    processes: list[Any] = [subprocess.Popen(command, cwd=tmp_path, env=environment()) for _ in range(2)]
    assert [process.wait(600) for process in processes] == [0, 0]
    study = load_study(tmp_path / "logs/ezv2.log", "s")
    assert len(study.trials) == 4 and {trial.state.name for trial in study.trials} <= {"COMPLETE", "PRUNED"}
    assert list((tmp_path / "logs/ezv2").glob("report_*.csv"))
    run(*CARTPOLE, *storage, "--trial-id", "1", cwd=tmp_path)
    [agent] = (tmp_path / "logs/ezv2").glob("CartPole-v1_*/CartPole-v1.zip")
    model = EZV2.load(agent, device="cpu")
    assert model.batch_size == 2 ** study.trials[1].params["batch_size_pow"] and model._n_updates > 0


def test_control_suite(tmp_path: Path) -> None:
    need("dm_control")
    run(*TRAIN, "dm_control/walker-walk-v0", "-n", "403", cwd=tmp_path)
    name = "dm_control-walker-walk-v0"
    assert updates(tmp_path / f"logs/ezv2/{name}_1/{name}.zip") == 3
    command = ("-m", "rl_zoo3.enjoy", "--algo", "ezv2", "--env", "dm_control/walker-walk-v0", "--no-render", "-f", "logs")
    run(*command, "-n", "5", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "PongNoFrameskip-v4"])
def test_atari(env_id: str, tmp_path: Path) -> None:
    need("ale_py", "cv2")
    run(*TRAIN, env_id, "-n", "492", "-params", "batch_size:8", "n_simulations:4", cwd=tmp_path)
    name = env_id.replace("/", "-")
    assert updates(tmp_path / f"logs/ezv2/{name}_1/{name}.zip") == 2
    command = ("-m", "rl_zoo3.enjoy", "--algo", "ezv2", "--env", env_id, "--no-render", "-f", "logs", "-n", "5")
    run(*command, cwd=tmp_path)


def test_unknown_environment(tmp_path: Path) -> None:
    assert "CartPole-v9 not found in gym registry, you maybe meant" in run(*TRAIN, "CartPole-v9", cwd=tmp_path, fails=True)


# ---------------------------------------------------------------------- the hook


def test_switched_off_and_by_hand(tmp_path: Path) -> None:
    output = run(*CARTPOLE, cwd=tmp_path, fails=True, SB3_EZV2_NO_ZOO="1")
    assert "invalid choice: 'ezv2'" in output
    run("-m", "sb3_ezv2.zoo", "train", *CARTPOLE[2:], cwd=tmp_path, SB3_EZV2_NO_ZOO="1")
    assert updates(tmp_path / "logs/ezv2/CartPole-v1_1/CartPole-v1.zip") == 40
    assert "usage: python -m sb3_ezv2.zoo" in run("-m", "sb3_ezv2.zoo", "fly", cwd=tmp_path, fails=True)


def test_nothing_heavy_at_the_start(tmp_path: Path) -> None:
    code = "import sys; print(sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    heavy = {"torch", "numpy", "gymnasium", "stable_baselines3", "sb3_ezv2", "rl_zoo3"}
    output = run("-c", code, cwd=tmp_path)
    assert "sb3_ezv2_zoo_hook" in output and not any(f"'{name}'" in output for name in heavy)


@pytest.mark.parametrize(
    "package, broken, code, expected",
    [
        ("rl_zoo3", "", "import rl_zoo3", ""),
        ("rl_zoo3", "1 / 0", "import rl_zoo3", "ZeroDivisionError"),
        ("sb3_ezv2", "1 / 0", "import rl_zoo3; print('ppo' in rl_zoo3.ALGOS)", "True"),
        ("sb3_ezv2_zoo_hook", "1 / 0", "print('started')", "started"),
        ("sb3_ezv2_zoo_hook", "1 / 0", "import rl_zoo3; print('ezv2' in rl_zoo3.ALGOS)", "False"),
    ],
)
def test_broken_packages(package: str, broken: str, code: str, expected: str, tmp_path: Path) -> None:
    """Python starts and the rest works, whatever is broken; rl_zoo3 itself fails as it would without us."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(broken)
    path = os.pathsep.join([str(tmp_path), environment().get("PYTHONPATH", "")])
    output = run("-c", code, cwd=empty, fails=expected == "ZeroDivisionError", PYTHONPATH=path)
    assert expected in output
    if package == "sb3_ezv2":
        assert "sb3-ezv2 could not register with RL Zoo" in output
    if package == "sb3_ezv2_zoo_hook":
        assert "Error" not in output


@pytest.mark.slow
def test_installations_have_the_hook(tmp_path: Path) -> None:
    """What a wheel and an editable wheel put at the top of site-packages."""
    need("Cython", "setuptools")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs a C++ compiler")
    source = tmp_path / "source"
    kept_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "logs", "results")
    shutil.copytree(ROOT, source, ignore=kept_out)
    run("setup.py", "-q", "editable_wheel", "--dist-dir", "editable", cwd=source)
    run("setup.py", "-q", "bdist_wheel", "--dist-dir", "wheel", cwd=source)
    hook = {"sb3_ezv2_zoo.pth"}
    (editable,), (wheel,) = (list((source / name).glob("*.whl")) for name in ("editable", "wheel"))
    assert hook <= set(zipfile.ZipFile(editable).namelist())
    installed = set(zipfile.ZipFile(wheel).namelist())
    configs = {"sb3_ezv2/rl_zoo_configs/ezv2.yml", "sb3_ezv2/rl_zoo_configs/ezv2_vision.yml"}
    assert hook | configs | {"sb3_ezv2_zoo_hook.py", "sb3_ezv2/zoo.py"} <= installed
    line = zipfile.ZipFile(wheel).read("sb3_ezv2_zoo.pth").decode()
    assert line.startswith("import ") and line.count("\n") == 1
