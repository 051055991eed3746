"""The queue of benchmark runs: what is unfinished is run, and goes on where it stopped."""

import inspect
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import learn, paper, queue
from benchmarks.plots import read_rows
from sb3_ezv2 import EZV2

PARAMS = (
    "learning_starts:16 batch_size:4 n_simulations:2 n_sampled_actions:2 unroll_steps:2 buffer_size:500 "
    "'policy_kwargs:dict(net_arch=[8], state_dim=8, n_blocks=1)'"
)


def line(out: Path, seeds: str, steps: int = 40) -> str:
    return f"--env CartPole-v1 --steps {steps} --eval-every 20 --episodes 1 --seeds {seeds} --out {out} --params {PARAMS}\n"


def test_the_committed_list_can_be_read() -> None:
    pytest.importorskip("rl_zoo3")
    jobs = queue.read_jobs(Path(queue.__file__).with_suffix(".txt"))
    assert len(jobs) > 5 and jobs[0].run.task == "CartPole-v1" and [job.run.seed for job in jobs[:3]] == [0, 1, 2]
    runs = [job.run for job in jobs]
    # One folder holds one variant of one task, so that its picture and its table need no explanation
    assert len({(run.out, run.task, run.label) for run in runs}) == len({run.out for run in runs})

    papers = {run.task: run for run in runs if run.out.parent.name == "paper" and run.seed == 0}
    assert len(papers) == 8
    for task, run in papers.items():
        assert run.zoo == f"ezv2.yml:{task}" and run.action_repeat == 2 and run.eval_every == 2500 and run.save_every == 1200
        assert paper.score("proprio", task) is not None
        baselines = [other for other in runs if other.task == task and other.algo != "ezv2"]
        assert sorted(other.algo for other in baselines) == ["crossq", "sac", "tqc"]
        for other in baselines:
            assert (other.steps, other.action_repeat, other.params) == (run.steps, 2, {})

    ablations = {run.out.name: run for run in runs if run.out.parent.name == "ablations" and run.seed == 0}
    for task in ("swingup", "pendulum"):
        base = ablations[f"{task}-base"]
        others = [run for name, run in ablations.items() if name.startswith(task) and run is not base]
        assert len(others) == 8 and len({run.settings for run in others}) == 8
        for run in others:
            changed = {name: value for name, value in run.params.items() if base.params.get(name) != value}
            assert changed and set(changed) <= inspect.signature(EZV2).parameters.keys()
            assert any(inspect.signature(EZV2).parameters[name].default != value for name, value in changed.items())
            assert (run.steps, run.task, run.eval_every, run.episodes) == (
                base.steps,
                base.task,
                base.eval_every,
                base.episodes,
            )


def test_a_line_has_precedence_over_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(queue.subprocess, "Popen", lambda command, **kwargs: commands.append(command))
    for own in ("", " --threads 3 --save-every 5"):
        file = tmp_path / "queue.txt"
        file.write_text(f"--env A-v1 --steps 9 --out {tmp_path}{own} --time-limit 7\n")
        queue.read_jobs(file)[0].start(60.0, 1, 600.0)
    parsed = [learn._parser().parse_args(command[3:]) for command in commands]
    assert [(options.threads, options.save_every, options.time_limit) for options in parsed] == [(1, 600, 60), (3, 5, 60)]


def test_runs_are_finished_in_order_and_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    file = tmp_path / "queue.txt"
    file.write_text("# two runs, one of them done\n\n" + line(out, "0 1"))
    jobs = queue.read_jobs(file)
    assert [job.run.seed for job in jobs] == [0, 1]
    # Seed 0 was stopped in the middle by an earlier command, seed 1 was not begun
    assert learn.main([*jobs[0].arguments, "--threads", "1", "--time-limit", "1e-9"]) == learn.UNFINISHED
    assert not jobs[0].is_finished()
    assert queue.main([str(file), "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [f"       0 of       40  {out}/{job.run.name}" for job in jobs]
    assert queue.main([str(file), "--workers", "2", "--hours", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("is finished") == 2 and "2 of 2 runs are finished." in printed
    for job in jobs:
        assert [row["step"] for row in read_rows([job.run.csv])] == [20, 40]
        assert "Curves" in (out / f"{job.run.name}.log").read_text()
    assert "goes on at step 1." in (out / f"{jobs[0].run.name}.log").read_text()
    # Nothing is left to do
    before = jobs[0].run.csv.read_bytes()
    assert queue.main([str(file)]) == 0
    assert "from step" not in capsys.readouterr().out and jobs[0].run.csv.read_bytes() == before


def test_the_time_limit_leaves_runs_that_can_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "queue.txt"
    file.write_text(line(tmp_path / "out", "0", steps=10**6))
    assert queue.main([str(file), "--hours", str(6 / 3600)]) == learn.UNFINISHED
    assert "was stopped and can go on" in capsys.readouterr().out
    assert any((tmp_path / "out" / "checkpoints").iterdir())


def test_terminating_the_queue_ends_its_runs_and_saves_them(tmp_path: Path) -> None:
    file, out = tmp_path / "queue.txt", tmp_path / "out"
    file.write_text(line(out, "0", steps=10**6))
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.queue", str(file)], stderr=subprocess.DEVNULL)
    log = out / "CartPole-v1_ezv2_seed0.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and "step" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    process.wait(60)
    assert "To go on" in log.read_text()
    assert any((out / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--env CartPole-v1 --steps 0 --out x", "line 1: --steps must be positive, not 0."),
        ("--env CartPole-v1 --steps 9 --out x --params no_such:1", "line 1: ezv2 takes no parameter 'no_such'"),
        (
            "--env A-v1 --steps 9 --out x\n--env A-v1 --steps 8 --out x",
            "line 2: x/A-v1_ezv2_seed0.csv would be written by two runs",
        ),
    ],
)
def test_a_bad_list_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    file = tmp_path / "queue.txt"
    file.write_text(text)
    with pytest.raises(SystemExit):
        queue.main([str(file)])
    assert message in capsys.readouterr().err


def test_a_run_that_fails_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "queue.txt"
    file.write_text(line(tmp_path / "out", "0").replace("CartPole-v1", "NoSuchTask-v0"))
    assert queue.main([str(file), "--hours", "0.1"]) == learn.UNFINISHED
    printed = capsys.readouterr().out
    assert "failed with status 2" in printed and "0 of 1 runs are finished." in printed
    assert "NoSuchTask" in (tmp_path / "out" / "NoSuchTask-v0_ezv2_seed0.log").read_text()


@pytest.mark.parametrize(("option", "value"), [("--workers", "0"), ("--hours", "-1"), ("--save-every", "0")])
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    with pytest.raises(SystemExit):
        queue.main([str(tmp_path / "queue.txt"), option, value])
    assert f"{option} must be positive" in capsys.readouterr().err
