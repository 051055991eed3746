"""
Train an agent on any environment id and measure how fast it learns.

``python -m benchmarks.learn --env CartPole-v1 --steps 7000 --seeds 0 1 2 --eval-every 1000 --out benchmarks/results/cartpole``

The agent is evaluated with its deterministic policy on environments of its own, one whole episode on each of several
copies at once. Every evaluation is a row in ``<out>/<task>_<label>_seed<seed>.csv``, written as it comes, and the curves
of all files of the folder are drawn in ``<out>/curves.png``. A run that reaches ``--time-limit``, or is interrupted, saves
everything; the same command goes on where it stopped, in the middle of an episode.
"""

import argparse
import copy
import csv
import importlib
import inspect
import json
import os
import pickle
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.checkpoints import Checkpoints, alone
from benchmarks.envs import make_vec_env
from benchmarks.plots import COLUMNS, Row, draw, read_rows, summary
from benchmarks.provenance import commit, machine
from benchmarks.settings import SMALL
from benchmarks.zoo_settings import NAMES, Defaults, Noise, describe
from benchmarks.zoo_settings import read as read_zoo
from sb3_ezv2.base_policy import Ezv2Policy
from sb3_ezv2.checkpoint import random_states, set_random_states

#: Where each algorithm is found. All but the first are baselines to compare with.
ALGORITHMS = {
    "ezv2": ("sb3_ezv2", "EZV2"),
    "sac": ("stable_baselines3", "SAC"),
    "td3": ("stable_baselines3", "TD3"),
    "dqn": ("stable_baselines3", "DQN"),
    "ppo": ("stable_baselines3", "PPO"),
    "crossq": ("sb3_contrib", "CrossQ"),
    "tqc": ("sb3_contrib", "TQC"),
    "qrdqn": ("sb3_contrib", "QRDQN"),
}

#: Exit status of a command that stopped before its end and can be given again (EX_TEMPFAIL of sysexits.h).
UNFINISHED = 75


class _StopRun(Exception):
    """Leaves ``learn()`` between two updates, where a checkpoint has just been saved."""


@dataclass(frozen=True)
class Run:
    """
    One training run: everything that decides its result, and how it is measured.

    :param task: environment id
    :param algo: a key of :data:`ALGORITHMS`
    :param seed: seeds the agent and the training environments; evaluation uses 10,000 · (1 + seed) and following
    :param steps: environment steps to train
    :param eval_every: steps between evaluations
    :param eval_start: step of the first evaluation
    :param episodes: episodes per evaluation, run at once on as many copies
    :param out: folder of the results
    :param label: name of this variant in files, tables and pictures
    :param policy: SB3's policy alias
    :param params: keyword arguments of the algorithm's constructor
    :param texts: how they were written, where that tells more than the value's own text (a schedule, a class)
    :param zoo: RL Zoo's file and entry that settings come from, of a baseline also the version whose defaults hold for what is
        not named there; empty: none
    :param n_envs: training environments
    :param action_repeat: how often each action is applied
    :param env_kwargs: keyword arguments of the environment
    :param device: where the networks live
    :param save_every: seconds between checkpoints besides those of a stop; None: none
    :param record: names of logged values to put into the rows
    :param newest_too: of EZV2 with averaged weights: evaluate the newest ones, too, and record what they return
    :param save_agent: keep the trained agent as a file
    """

    task: str
    algo: str
    seed: int
    steps: int
    eval_every: int
    eval_start: int
    episodes: int
    out: Path
    label: str
    policy: str = "MlpPolicy"
    params: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    zoo: str = ""
    n_envs: int = 1
    action_repeat: int = 1
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    save_every: float | None = None
    record: tuple[str, ...] = ()
    newest_too: bool = False
    save_agent: bool = False

    @property
    def name(self) -> str:
        """Name of the run's files."""
        return re.sub(r"[^\w.+-]+", "_", f"{self.task}_{self.label}_seed{self.seed}")

    @property
    def csv(self) -> Path:
        """The run's results."""
        return self.out / f"{self.name}.csv"

    @property
    def settings(self) -> str:
        """What, with task, algorithm and seed, decides the result. Two runs that differ here are not the same run."""
        parts: dict[str, Any] = {"steps": self.steps, "policy": self.policy, "n_envs": self.n_envs}
        parts.update(action_repeat=self.action_repeat, **({"env_kwargs": self.env_kwargs} if self.env_kwargs else {}))
        parts.update({"zoo": self.zoo} if self.zoo else {})
        return " ".join(f"{key}={value}" for key, value in {**parts, **self.params, **self.texts}.items())


def algorithm(name: str) -> type[BaseAlgorithm]:
    """
    Import an algorithm.

    :param name: a key of :data:`ALGORITHMS`
    """
    module, attribute = ALGORITHMS[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ModuleNotFoundError(f"{name} needs the package {module}, which is not installed.") from error


class _LastValues(KVWriter):
    """A logger output that keeps the latest value of every name."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.values.update(key_values)


class _Stop:
    """
    Whether the command shall end: a time limit, or a signal to end the process.

    :param time_limit: seconds from now; None: unlimited
    """

    def __init__(self, time_limit: float | None):
        self._end = None if time_limit is None else time.monotonic() + time_limit
        self._signalled = False

    def now(self) -> bool:
        return self._signalled or (self._end is not None and time.monotonic() >= self._end)

    def _remember(self, *_: Any) -> None:
        self._signalled = True

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within, SIGINT and SIGTERM ask for a stop at the next place where everything can be saved."""
        before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _newest_weights(model: BaseAlgorithm) -> Iterator[None]:
    """Within, EZV2's ``predict`` has the newest weights instead of averaged ones; training is left as it is."""
    policy = model.policy
    assert isinstance(policy, Ezv2Policy)
    averaged, newest = policy.averaged_network, policy.network
    kept = copy.deepcopy(averaged.state_dict())
    averaged.load_state_dict(newest.state_dict())
    try:
        yield
    finally:
        averaged.load_state_dict(kept)


class _Measure(BaseCallback):
    """
    Evaluates, writes rows and saves checkpoints, always between two updates (SB3 calls ``on_rollout_start`` there): what
    is measured at step n is the agent after the updates that belong to the first n steps.

    :param run: the run
    :param stop: when to end early
    :param train_env: the training environments, of :func:`benchmarks.envs.make_vec_env`
    :param eval_env: the evaluation environments
    :param logged: the values the agent logged
    :param state: of the checkpoint to go on from, or None
    """

    def __init__(
        self,
        run: Run,
        stop: _Stop,
        train_env: DummyVecEnv,
        eval_env: DummyVecEnv,
        logged: _LastValues,
        state: dict[str, Any] | None,
    ):
        super().__init__()
        self.run, self.stop, self.train_env, self.eval_env, self.logged = run, stop, train_env, eval_env, logged
        self.constants = {"machine": machine(), "commit": commit(), "settings": run.settings}
        self.next_eval = state["next_eval"] if state else run.eval_start
        self.train_seconds = state["train_seconds"] if state else 0.0
        self.eval_seconds = state["eval_seconds"] if state else 0.0
        logged.values = state["logged"] if state else {}
        if state:
            # Rows written after the checkpoint (by a process that was killed) will be written again.
            os.truncate(run.csv, state["csv_bytes"])
        else:
            with open(run.csv, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(COLUMNS)
        self.saved_at = time.monotonic()
        self._start_step = -1
        self._resumed = time.perf_counter()

    def _on_training_start(self) -> None:
        self._start_step = self.model.num_timesteps
        self._resumed = time.perf_counter()

    def _on_rollout_start(self) -> None:
        self.train_seconds += time.perf_counter() - self._resumed
        step = self.model.num_timesteps
        if step >= self.next_eval:
            self.evaluate()
            while self.next_eval <= step:
                self.next_eval += self.run.eval_every
        # A step must have been made since the start, or a command with a short limit would never get on.
        if step > self._start_step:
            if self.stop.now():
                self.save()
                raise _StopRun
            if self.run.save_every is not None and time.monotonic() >= self.saved_at + self.run.save_every:
                self.save()
        self._resumed = time.perf_counter()

    def _on_step(self) -> bool:
        return True

    def finish(self) -> None:
        """After ``learn()``, whose last updates come after the last call of ``on_rollout_start``."""
        self.train_seconds += time.perf_counter() - self._resumed
        self.evaluate()

    def returns(self) -> list[float]:
        """Returns of the deterministic policy, one for each episode."""
        # The same start states each time, so that differences along a curve are the agent's; no two seeds share one.
        self.eval_env.seed(10_000 * (1 + self.run.seed))
        returns, _ = evaluate_policy(
            self.model, self.eval_env, n_eval_episodes=self.run.episodes, deterministic=True, return_episode_rewards=True
        )
        assert isinstance(returns, list)
        return returns

    def evaluate(self) -> None:
        """Evaluate the agent and write a row."""
        start = time.perf_counter()
        returns = self.returns()
        recorded = {name: self.logged.values.get(name) for name in self.run.record}
        if self.run.newest_too:
            with _newest_weights(self.model):
                newest = self.returns()
            recorded.update({"newest/mean": float(np.mean(newest)), "newest/std": float(np.std(newest))})
        self.eval_seconds += time.perf_counter() - start
        row = dict(
            task=self.run.task,
            algo=self.run.algo,
            label=self.run.label,
            seed=self.run.seed,
            step=self.model.num_timesteps,
            mean=round(float(np.mean(returns)), 4),
            std=round(float(np.std(returns)), 4),
            episodes=self.run.episodes,
            train_seconds=round(self.train_seconds, 2),
            eval_seconds=round(self.eval_seconds, 2),
            recorded=json.dumps(recorded, default=float) if recorded else "",
            **self.constants,
        )
        with open(self.run.csv, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        print(
            f"{self.run.task}  {self.run.label}  seed {self.run.seed}  step {row['step']:>7}  "
            f"return {row['mean']:.1f} ± {row['std']:.1f}  training {self.train_seconds:.0f} s  "
            f"evaluation {self.eval_seconds:.0f} s" + (f"  {row['recorded']}" if recorded else ""),
            flush=True,
        )

    def save(self) -> None:
        """Save a checkpoint."""
        state = {
            "made_with": (self.run.algo, self.run.settings),
            "next_eval": self.next_eval,
            "train_seconds": self.train_seconds,
            "eval_seconds": self.eval_seconds,
            "logged": self.logged.values,
            "csv_bytes": self.run.csv.stat().st_size,
            "action_space": self.model.action_space,
            "envs": self.train_env.env_method("snapshot"),
            "random": random_states(),
        }
        Checkpoints(self.run.out, self.run.name).save(self.model, state)
        self.saved_at = time.monotonic()


def _found(run: Run) -> tuple[list[Row], Path | None, dict[str, Any] | None]:
    """
    What earlier commands left of a run.

    :return: its rows, the folder of its checkpoint and the state in there, or None and None
    """
    if not run.csv.exists():
        return [], None, None
    rows = read_rows([run.csv])
    folder = Checkpoints(run.out, run.name).newest()
    state = pickle.loads((folder / "state.pkl").read_bytes()) if folder else None
    for algo, settings in [(row["algo"], row["settings"]) for row in rows] + ([state["made_with"]] if state else []):
        # Settings stand in the order in which they were given, which says nothing
        if algo != run.algo or sorted(settings.split()) != sorted(run.settings.split()):
            raise ValueError(
                f"{run.csv} was made with other settings ({algo}: {settings}); "
                "give another --out or --label, or --no-resume to overwrite it."
            )
    if state and run.csv.stat().st_size < state["csv_bytes"]:
        raise ValueError(f"{run.csv} has lost rows since its checkpoint was saved; give --no-resume to begin anew.")
    return rows, folder, state


def _build(run: Run, env: DummyVecEnv) -> BaseAlgorithm:
    """A new agent."""
    cls = algorithm(run.algo)
    params: dict[str, Any] = dict(run.params)
    if isinstance(noise := params.get("action_noise"), Noise):
        params["action_noise"] = noise.make(env.action_space)
    return cls(run.policy, env, seed=run.seed, device=run.device, **params)  # type: ignore[call-arg]


def _load(run: Run, env: DummyVecEnv, folder: Path, state: dict[str, Any]) -> BaseAlgorithm:
    """The agent of a checkpoint, in the middle of its episodes."""
    repeats = [env.env_method("restore", snapshot, indices=index)[0] for index, snapshot in enumerate(state["envs"])]
    if not all(repeats):
        print(f"{run.task} does not repeat itself, so the training goes on with a new episode.", flush=True)
    model = algorithm(run.algo).load(folder / "agent.zip", env=env, device=run.device, force_reset=not all(repeats))
    if (folder / "replay_buffer.pkl").exists():
        model.load_replay_buffer(folder / "replay_buffer.pkl", truncate_last_traj=not all(repeats))  # type: ignore[attr-defined]
    # load() has seeded everything anew.
    model.action_space = state["action_space"]
    set_random_states(state["random"])
    return model


def train(run: Run, stop: _Stop | None = None, resume: bool = True) -> bool:
    """
    Train and measure one agent, or go on with it.

    :param run: what to do
    :param stop: when to end early
    :param resume: go on from a checkpoint, and skip a finished run; otherwise begin anew and overwrite
    :return: whether the run is finished
    :raises BlockingIOError: another process is at this run
    """
    with alone(run.out, run.name):
        return _train(run, stop or _Stop(None), resume)


def _train(run: Run, stop: _Stop, resume: bool) -> bool:
    """See :func:`train`."""
    checkpoints = Checkpoints(run.out, run.name)
    rows, folder, state = _found(run) if resume else ([], None, None)
    if rows and rows[-1]["step"] >= run.steps:
        checkpoints.remove()
        print(f"{run.name} is finished.", flush=True)
        return True
    if folder is None:
        checkpoints.remove()
        if rows:
            kept = run.csv.with_suffix(".csv.old")
            os.replace(run.csv, kept)
            print(f"{run.name} has no checkpoint to go on from and begins anew; its rows are kept in {kept}.", flush=True)
    train_env = make_vec_env(run.task, run.n_envs, run.action_repeat, run.env_kwargs)
    eval_env = make_vec_env(run.task, run.episodes, run.action_repeat, run.env_kwargs)
    try:
        if folder:
            assert state is not None
            model = _load(run, train_env, folder, state)
            print(f"{run.name} goes on at step {model.num_timesteps}.", flush=True)
        else:
            model = _build(run, train_env)
        logged = _LastValues()
        model.set_logger(Logger(folder=None, output_formats=[logged]))
        measure = _Measure(run, stop, train_env, eval_env, logged, state)
        # One call of learn() for the whole plan: schedules depend on it.
        left = run.steps - model.num_timesteps
        model.learn(left, callback=measure, log_interval=1, reset_num_timesteps=folder is None)
        measure.finish()
    except _StopRun:
        return False
    finally:
        train_env.close()
        eval_env.close()
    if run.save_agent:
        model.save(run.out / f"{run.name}.zip")
    checkpoints.remove()
    return True


def keyword_arguments(pairs: Sequence[str] | None, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """
    Keyword arguments from the command line, written as RL Zoo does.

    :param pairs: ``name:value`` each, the value a Python expression; ``name.key:value`` sets a key of a dictionary and leaves
        its others as they are
    :param base: what they are added to; it stays as it is
    :raises ValueError: a pair that is not of this form
    """
    result = dict(base or {})
    for pair in pairs or ():
        path, colon, value = pair.partition(":")
        name, dot, key = path.partition(".")
        if not colon or not name.isidentifier() or (dot and not key.isidentifier()):
            raise ValueError(f"'{pair}' is not of the form name:value, for example batch_size:64.")
        try:
            evaluated = eval(value, dict(NAMES))  # the user's own command line
        except Exception as error:
            raise ValueError(
                f"The value of '{pair}' is no Python expression ({error}); write text as {path}:\"'text'\"."
            ) from error
        if not dot:
            result[name] = evaluated
        elif isinstance(result.get(name) or {}, dict):
            result[name] = {**(result.get(name) or {}), key: evaluated}
        else:
            raise ValueError(f"'{pair}' sets a key of {name}, which is no dictionary but {result[name]!r}.")
    return result


def _known_params(algo: str) -> list[str]:
    """Names of the keyword arguments of an algorithm's constructor that are no options of their own here."""
    elsewhere = ("policy", "env", "seed", "device", "_init_setup_model")
    parameters = inspect.signature(algorithm(algo)).parameters
    return [name for name, p in parameters.items() if name not in elsewhere and p.kind is not p.VAR_KEYWORD]


def _texts(pairs: Sequence[str] | None, params: dict[str, Any]) -> dict[str, str]:
    """How the parameters of the command line stand in the results: as they were written, if that is the whole of a value."""
    paths = [(pair.partition(":")[0], pair.partition(":")[2]) for pair in pairs or ()]
    texts = {path: value for path, value in paths if "." not in path}
    names = [path.partition(".")[0] for path, _ in paths if "." in path]
    return {**texts, **{name: describe(params[name]) for name in names}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learn", description="Train agents and measure how fast they learn.", allow_abbrev=False
    )
    parser.add_argument("--env", required=True, help="environment id, such as CartPole-v1 or dm_control/cartpole-swingup-v0")
    parser.add_argument("--steps", type=int, help="environment steps to train (needed without --zoo)")
    parser.add_argument("--algo", default="ezv2", choices=list(ALGORITHMS), help="the algorithm (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each, in turn")
    parser.add_argument("--eval-every", type=int, default=1000, help="steps between evaluations (default: %(default)s)")
    parser.add_argument("--eval-start", type=int, help="step of the first evaluation (default: as --eval-every)")
    parser.add_argument("--episodes", type=int, default=10, help="episodes per evaluation, run at once (default: %(default)s)")
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--label", help="name of this variant in files, tables and pictures (default: the algorithm)")
    parser.add_argument("--policy", help="SB3's policy alias (default: MlpPolicy)")
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--small", action="store_true", help="the small networks and batches of benchmarks/settings.py")
    base.add_argument("--zoo", action="store_true", help="RL Zoo's settings of the task, --steps included")
    parser.add_argument("--params", nargs="+", metavar="NAME:VALUE", help="the algorithm's parameters, as Python expressions")
    parser.add_argument("--n-envs", type=int, help="training environments (default: 1)")
    parser.add_argument("--action-repeat", type=int, help="how often each action is applied (default: 1)")
    parser.add_argument("--env-kwargs", nargs="+", metavar="NAME:VALUE", help="the environment's parameters")
    parser.add_argument("--record", nargs="+", default=[], metavar="NAME", help="logged values to put into the rows")
    parser.add_argument("--newest-too", action="store_true", help="of ezv2: evaluate the newest weights, too")
    parser.add_argument("--device", default="auto", help="where the networks live (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's choice)")
    parser.add_argument("--time-limit", type=float, help="seconds after which the command saves everything and ends")
    parser.add_argument("--save-every", type=float, help="seconds between checkpoints while running (default: none)")
    parser.add_argument("--save-agent", action="store_true", help="keep the trained agents")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on where a run stopped")
    parser.add_argument("--threshold", type=float, help="a return to reach, for the table and the picture")
    return parser


def _runs(options: argparse.Namespace) -> list[Run]:
    """Check the command line and make the runs of it."""
    for name in ("steps", "eval_every", "episodes", "n_envs", "action_repeat", "threads", "time_limit", "save_every"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {value}.")
    if min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        raise ValueError("--seeds must be different numbers from 0.")
    if options.eval_start is not None and options.eval_start < 0:
        raise ValueError(f"--eval-start must be at least 0, not {options.eval_start}.")
    if options.small and options.algo != "ezv2":
        raise ValueError("--small holds settings of ezv2 alone.")
    if options.newest_too and options.algo != "ezv2":
        raise ValueError("--newest-too is of ezv2 alone, whose predict has averaged weights.")
    known = _known_params(options.algo)
    base = read_zoo(options.algo, options.env, known) if options.zoo else Defaults(params=SMALL if options.small else {})
    steps = base.steps if options.steps is None else options.steps
    if steps is None:
        raise ValueError("--steps is needed, or --zoo, whose entries have a number of steps.")
    params = keyword_arguments(options.params, base.params)
    for name in params:
        if name not in known:
            raise ValueError(f"{options.algo} takes no parameter '{name}' here; it has {', '.join(known)}.")
    zoo, package = base.source, ALGORITHMS[options.algo][0]
    if zoo and options.algo != "ezv2":
        zoo += f" {package}={importlib.import_module(package).__version__}"
    return [
        Run(
            task=options.env,
            algo=options.algo,
            seed=seed,
            steps=steps,
            eval_every=options.eval_every,
            eval_start=options.eval_every if options.eval_start is None else options.eval_start,
            episodes=options.episodes,
            out=Path(options.out),
            label=options.label or options.algo,
            policy=options.policy or base.policy,
            params=params,
            texts={**base.texts, **_texts(options.params, params)},
            zoo=zoo,
            n_envs=options.n_envs or base.n_envs,
            action_repeat=options.action_repeat or base.action_repeat,
            env_kwargs=keyword_arguments(options.env_kwargs, base.env_kwargs),
            device=options.device,
            save_every=options.save_every,
            record=tuple(options.record),
            newest_too=options.newest_too,
            save_agent=options.save_agent,
        )
        for seed in options.seeds
    ]


def parse(arguments: Sequence[str]) -> list[Run]:
    """
    :param arguments: a command line
    :return: its runs, one for each seed
    :raises ValueError: settings that cannot be
    """
    return _runs(_parser().parse_args(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """
    The command line; see the module's docstring.

    :param arguments: instead of the process's
    :return: exit status: 0, or :data:`UNFINISHED` if the same command shall be given again
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    stop = _Stop(options.time_limit)
    try:
        runs = _runs(options)
        for run in runs:
            if options.resume:
                _found(run)
        # Unknown tasks and impossible settings shall fail here with a sentence, not in a run with a traceback.
        env = make_vec_env(runs[0].task, runs[0].n_envs, runs[0].action_repeat, runs[0].env_kwargs)
        _build(runs[0], env)
        env.close()
    except (ValueError, TypeError, AssertionError, ImportError, gym.error.Error) as error:
        parser.error(str(error))
    if options.threads is not None:
        th.set_num_threads(options.threads)
    finished = True
    with stop.signals():
        for run in runs:
            # Each run makes a step before it looks at the clock, so that repeating the command always comes to an end.
            try:
                finished = train(run, stop, options.resume)
            except BlockingIOError as error:
                parser.error(str(error))
            if not finished:
                break
    rows = read_rows([runs[0].out])
    if rows:
        print("\n" + summary(rows, threshold=options.threshold))
        picture = runs[0].out / "curves.png"
        draw(rows, picture, threshold=options.threshold)
        print(f"\nCurves: {picture}")
    if not finished:
        command = " ".join(shlex.quote(word) for word in (arguments if arguments is not None else sys.argv[1:]))
        print(f"Stopped before the end. To go on: python -m benchmarks.learn {command}")
    return 0 if finished else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
