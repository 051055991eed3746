"""
The settings of a task in RL Zoo's files, for ``benchmarks.learn --zoo``.

EZV2's are this package's own (``rl_zoo_configs/ezv2.yml``), the baselines' are those that RL Zoo is installed with. They are
read as RL Zoo reads them; what an entry has and ``benchmarks.learn`` cannot do is refused. RL Zoo itself is not
imported: that would replace Gymnasium's ``TimeLimit`` in the process that trains.
"""

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.utils import LinearSchedule

from sb3_ezv2.zoo import ALGO, CONFIGS

#: Arguments that may be a schedule, and those that may be Python code.
SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf")
CODE = ("policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs")
NAMES: dict[str, Any] = {"th": th, "nn": th.nn, "np": np}


@dataclass(frozen=True)
class Defaults:
    """
    What a run has where its command line says nothing.

    :param source: file and entry that this comes from; empty: none
    :param steps: environment steps; None: not said
    :param policy: SB3's policy alias
    :param params: keyword arguments of the algorithm's constructor
    :param texts: how they are written in the results, where that tells more than the value's own text
    :param n_envs: training environments
    :param action_repeat: how often each action is applied
    :param env_kwargs: keyword arguments of the environment
    """

    source: str = ""
    steps: int | None = None
    policy: str = "MlpPolicy"
    params: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    n_envs: int = 1
    action_repeat: int = 1
    env_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Noise:
    """
    Noise of the actions, to be made when their number of dimensions is known.

    :param kind: RL Zoo's name of it: ``"normal"`` or ``"ornstein-uhlenbeck"``
    :param std: standard deviation in each dimension of the actions, which SB3 scales to [-1, 1]
    """

    kind: str
    std: float

    def __str__(self) -> str:
        return f"{self.kind} {self.std}"

    def make(self, action_space: spaces.Space) -> ActionNoise:
        """
        :param action_space: of the environment
        :raises ValueError: its actions are no Box
        """
        if not isinstance(action_space, spaces.Box):
            raise ValueError(f"Noise can only be added to Box actions, not to {action_space}.")
        size = action_space.shape[0]
        cls = NormalActionNoise if self.kind == "normal" else OrnsteinUhlenbeckActionNoise
        return cls(mean=np.zeros(size), sigma=self.std * np.ones(size))


def describe(value: Any) -> str:
    """
    A value as it stands in the results: as Python writes it, but classes and functions by their names, so that it is the same
    in every process.
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(describe, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)


def file_of(algo: str) -> Path:
    """
    :param algo: a key of ``benchmarks.learn.ALGORITHMS``
    :return: RL Zoo's file of its settings
    :raises ImportError: it is a baseline's, and RL Zoo is not installed
    """
    if algo == ALGO:
        return CONFIGS / f"{ALGO}.yml"
    spec = importlib.util.find_spec("rl_zoo3")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"The settings of {algo} for --zoo come with RL Zoo: pip install 'sb3-ezv2[zoo]'.")
    return Path(spec.submodule_search_locations[0]) / "hyperparams" / f"{algo}.yml"


def read(algo: str, task: str, known: Collection[str]) -> Defaults:
    """
    :param algo: a key of ``benchmarks.learn.ALGORITHMS``
    :param task: environment id
    :param known: names of the keyword arguments of the algorithm's constructor
    :return: the settings of the task's entry, or of ``default`` if it has none
    :raises ValueError: there is no entry, or it has what ``benchmarks.learn`` cannot do
    :raises ImportError: RL Zoo or PyYAML is not installed
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError("--zoo reads YAML files, which needs PyYAML: pip install 'sb3-ezv2[zoo]'.") from error
    file = file_of(algo)
    entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    is_atari = task.startswith("ALE/") or "NoFrameskip-v" in task
    name = task if task in entries else "atari" if is_atari else "default"
    if name not in entries:
        raise ValueError(f"{file.name} has no entry for {task} and no '{name}': give the settings without --zoo.")
    return _converted(f"{file.name}:{name}", task, dict(entries[name]), known)


def _refusal(source: str, what: str) -> ValueError:
    return ValueError(f"The entry {source} has {what}, which benchmarks.learn cannot do: train it with rl_zoo3.train.")


def _converted(source: str, task: str, entry: dict[str, Any], known: Collection[str]) -> Defaults:
    """The entry's settings; see :func:`read`."""
    policy = entry.pop("policy")
    if "." in policy:
        raise _refusal(source, f"the policy {policy}")
    steps = int(entry.pop("n_timesteps"))
    n_envs = int(entry.pop("n_envs", 1))
    env_kwargs = dict(entry.pop("env_kwargs", None) or {})
    action_repeat = _action_repeat(source, task, entry.pop("env_wrapper", None) or [])
    params: dict[str, Any] = {}
    texts: dict[str, str] = {}
    if (noise := entry.pop("noise_type", None)) is not None:
        kind = next((kind for kind in ("normal", "ornstein-uhlenbeck") if kind in noise), None)
        if kind is None:
            raise _refusal(source, f"noise_type {noise}")
        params["action_noise"] = Noise(kind, float(entry.pop("noise_std")))
    for name, value in entry.items():
        if name in known:
            params[name] = _converted_value(source, name, value)
            if name in CODE:
                texts[name] = describe(params[name])
            elif params[name] is not value and isinstance(value, str):
                texts[name] = value
        elif value:
            # An option that is off, such as normalize: False, asks for nothing
            raise _refusal(source, f"{name}: {value}")
    return Defaults(source, steps, policy, params, texts, n_envs, action_repeat, env_kwargs)


def _action_repeat(source: str, task: str, wrappers: Any) -> int:
    """How often each action is applied, of a list of wrappers or a single one."""
    result = 1
    for wrapper in wrappers if isinstance(wrappers, list) else [wrappers]:
        name, kwargs = next(iter(wrapper.items())) if isinstance(wrapper, dict) else (wrapper, {})
        if name == "rl_zoo3.wrappers.FrameSkip":
            result *= kwargs.get("skip", 4)
        # benchmarks.envs flattens dictionaries, which all observations of the control suite are
        elif not (name == "gymnasium.wrappers.FlattenObservation" and task.startswith("dm_control/")):
            raise _refusal(source, f"the wrapper {name}")
    return result


def _converted_value(source: str, name: str, value: Any) -> Any:
    """A parameter as the constructor takes it."""
    if name in SCHEDULES and isinstance(value, str):
        # lin_3e-4: from 3e-4 linearly to 0 over the planned steps
        try:
            return LinearSchedule(float(value.partition("_")[2]), 0.0, 1.0)
        except ValueError as error:
            raise _refusal(source, f"the schedule {value}") from error
    if name in CODE and isinstance(value, str):
        try:
            return eval(value, dict(NAMES))  # a file of an installed package
        except Exception as error:
            raise _refusal(source, f"{name}: {' '.join(value.split())} ({error})") from error
    return tuple(value) if name == "train_freq" and isinstance(value, list) else value
