"""
The states of environments in the middle of their episodes: taken out of a ``VecEnv``, and put into an equal one.

What an environment and its wrappers hold is pickled attribute by attribute, into one stream, so that what they share stays
shared. Two kinds of objects live in libraries that pickle in their own ways: the emulator of Atari games and MuJoCo's data.
An environment (or wrapper) with the methods ``snapshot()`` and ``restore(snapshot) -> bool`` is asked for its state instead;
:class:`sb3_ezv2.wrappers.Resumable` gives them to any deterministic simulator.
"""

from __future__ import annotations

import functools
import io
import pickle
from typing import Any

import cloudpickle
import gymnasium as gym
from gymnasium.utils import EzPickle
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

LEFT_OUT = {"env", "venv", "envs", "spec", "_cached_spec", "results_writer", "class_attributes", "buf_infos", "reset_infos"}
"""Attributes that are no state: what is wrapped, open files, and the last step's remarks."""

DISPLAY_MODULES = ("pygame", "glfw", "OpenGL", "gymnasium.envs.mujoco.mujoco_rendering", "cv2")
"""Of objects that only show an environment."""


class UnsavableError(Exception):
    """An object that would not come back as it is."""


class _Pickler(cloudpickle.Pickler):
    """Refuses what pickles without its state, as environments with ``EzPickle`` do."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (gym.Env, VecEnv, EzPickle)):
            raise UnsavableError(f"an attribute is or holds another environment, {type(obj).__name__}")
        if isinstance(obj, io.IOBase) and not isinstance(obj, (io.BytesIO, io.StringIO)):
            raise UnsavableError(f"an attribute is or holds an open file, {type(obj).__name__}")
        return super().reducer_override(obj)


def _dumps(value: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


def class_name(obj: Any) -> str:
    """:return: module and name of an object's class"""
    return f"{type(obj).__module__}.{type(obj).__qualname__}"


def _attributes(obj: Any) -> dict[str, Any]:
    """What an object holds, without what is no state."""
    return {
        name: value
        for name, value in vars(obj).items()
        if name not in LEFT_OUT and not name.startswith("ezv2_") and not type(value).__module__.startswith(DISPLAY_MODULES)
    }


def _layers(env: gym.Env) -> list[gym.Env]:
    """:return: an environment's wrappers from the outermost to the one that tells its state by itself, or to the innermost"""
    layers = [env]
    while isinstance(layers[-1], gym.Wrapper) and not _tells_itself(layers[-1]):
        layers.append(layers[-1].env)
    return layers


def _tells_itself(env: gym.Env) -> bool:
    return callable(getattr(type(env), "snapshot", None)) and callable(getattr(type(env), "restore", None))


def _state(env: gym.Env) -> list[tuple[str, Any]]:
    """:return: for each layer its class and what it holds"""
    states: list[tuple[str, Any]] = []
    for layer in _layers(env):
        if _tells_itself(layer):
            states.append((class_name(layer), layer.snapshot()))  # type: ignore[attr-defined]
            continue
        held = _attributes(layer)
        for name, value in held.items():
            if class_name(value).startswith("ale_py.") and hasattr(value, "cloneState"):
                held[name] = value.cloneState(include_rng=True)
            elif isinstance(value, gym.Env):
                raise UnsavableError(f"the attribute {name} of {class_name(layer)} is another environment")
        states.append((class_name(layer), held))
    return states


def _set_state(env: gym.Env, states: list[tuple[str, Any]]) -> str | None:
    """:return: None if the environment is where the other one was, otherwise the reason"""
    layers = _layers(env)
    if [class_name(layer) for layer in layers] != [name for name, _ in states]:
        return f"it is of other classes than the one that was saved, {', '.join(name for name, _ in states)}"
    for layer, (_, held) in zip(layers, states):
        if _tells_itself(layer):
            if not layer.restore(held):  # type: ignore[attr-defined]
                return "it does not repeat itself"
            continue
        present = _attributes(layer)
        for name in present.keys() - held.keys():
            delattr(layer, name)
        for name, value in held.items():
            fresh = present.get(name)
            if hasattr(fresh, "restoreState"):
                fresh.restoreState(value)  # type: ignore[union-attr]
            elif class_name(value).startswith("mujoco.") and type(value).__name__ == "MjModel":
                pass  # the new environment's own, to which its data and its renderer belong
            elif class_name(value).startswith("mujoco.") and type(value).__name__ == "MjData":
                import mujoco

                mujoco.mj_copyData(fresh, present["model"], value)
            else:
                vars(layer)[name] = value
    return None


def _save_one(env: gym.Env) -> tuple[bytes | None, str]:
    """:return: an environment's state, or None and the reason"""
    try:
        return _dumps(_state(env)), ""
    except Exception as error:  # whatever the attributes of an environment raise when they are pickled
        return None, str(error) or type(error).__name__


def _restore_one(env: gym.Env, state: bytes) -> str | None:
    try:
        return _set_state(env, pickle.loads(state))
    except Exception as error:
        return str(error) or type(error).__name__


class _Attach(type):
    """
    ``SubprocVecEnv`` runs code of ours in its processes in one case alone: when it asks there whether the environment is an
    instance of a class. Asked for :class:`_StateAccess`, the environment gets the methods that save and restore its state.
    """

    def __instancecheck__(cls, env: Any) -> bool:
        vars(env)["ezv2_save_state"] = functools.partial(_save_one, env)
        vars(env)["ezv2_restore_state"] = functools.partial(_restore_one, env)
        return True


class _StateAccess(metaclass=_Attach):
    pass


def vec_wrappers(venv: VecEnv) -> list[VecEnvWrapper]:
    """:return: the wrappers of a ``VecEnv``, from the outermost"""
    wrappers = []
    while isinstance(venv, VecEnvWrapper):
        wrappers.append(venv)
        venv = venv.venv
    return wrappers


def save_env_states(venv: VecEnv, model: Any, episodes: bool = True) -> dict[str, Any]:
    """
    :param venv: environments and their ``VecEnv`` wrappers
    :param model: the agent, whose action space may be the environments' own
    :param episodes: save the environments, not the wrappers alone
    :return: ``states``, bytes, and ``problems``: the environments that cannot give up theirs, by the names of their classes
    """
    base = venv.unwrapped
    vec = [(class_name(wrapper), _attributes(wrapper)) for wrapper in vec_wrappers(venv)]
    problems: list[str] = []
    states: dict[str, Any] = {"vec": vec, "n_envs": venv.num_envs, "envs": None}
    if episodes and isinstance(base, DummyVecEnv):
        try:
            envs = [_state(env) for env in base.envs]
            together = {**states, "envs": envs, "base": _attributes(base), "action_space": model.action_space}
            return {"states": _dumps(together), "problems": []}
        except Exception:
            for index, env in enumerate(base.envs):
                state, reason = _save_one(env)
                if state is None:
                    problems.append(f"environment {index} ({class_name(env.unwrapped)}: {reason})")
            problems = problems or [f"the environments ({class_name(base.envs[0].unwrapped)})"]
    elif episodes and isinstance(base, SubprocVecEnv):
        if not all(base.env_is_wrapped(_StateAccess)):  # type: ignore[arg-type]
            problems.append("the environments (of processes, without a gymnasium.Wrapper around them)")
        else:
            results = base.env_method("ezv2_save_state")
            problems = [f"environment {i} ({reason})" for i, (state, reason) in enumerate(results) if state is None]
            if not problems:
                states["envs"] = [state for state, _ in results]
                states["base"] = {"_seeds": base._seeds, "_options": base._options}
    elif episodes:
        problems.append(f"the environments of {class_name(base)}")
    return {"states": _dumps(states), "problems": problems}


def restore_env_states(venv: VecEnv, model: Any, saved: bytes) -> str | None:
    """
    :param venv: environments and wrappers as those that were saved
    :param model: the agent
    :param saved: ``states`` of :func:`save_env_states`
    :return: None if the environments are where the others were, otherwise the reason
    :raises ValueError: other wrappers of the ``VecEnv``, or another number of environments
    """
    states = pickle.loads(saved)
    wrappers, names = vec_wrappers(venv), [name for name, _ in states["vec"]]
    if [class_name(wrapper) for wrapper in wrappers] != names:
        raise ValueError(
            f"the environments were wrapped in {', '.join(names) or 'nothing'} when the checkpoint was saved, and are in "
            f"{', '.join(map(class_name, wrappers)) or 'nothing'} now: wrap them as they were."
        )
    if states["n_envs"] != venv.num_envs:
        raise ValueError(f"the checkpoint is of {states['n_envs']} environments, but there are {venv.num_envs} now.")
    for wrapper, (_, held) in zip(wrappers, states["vec"]):
        vars(wrapper).update(held)
    if states["envs"] is None:
        return "it could not be saved"
    base = venv.unwrapped
    if isinstance(base, DummyVecEnv):
        if not isinstance(states["envs"][0], list):
            return "it was in a process of its own"
        reasons = [_set_state(env, state) for env, state in zip(base.envs, states["envs"])]
        model.action_space = states["action_space"]
    elif isinstance(base, SubprocVecEnv) and isinstance(states["envs"][0], bytes):
        if not all(base.env_is_wrapped(_StateAccess)):  # type: ignore[arg-type]
            return "it is in a process, without a gymnasium.Wrapper around it"
        reasons = [base.env_method("ezv2_restore_state", s, indices=i)[0] for i, s in enumerate(states["envs"])]
    else:
        return "it was not in a process of its own"
    failed = [f"environment {index}: {reason}" for index, reason in enumerate(reasons) if reason is not None]
    if failed:
        return "; ".join(failed)
    vars(base).update(states["base"])
    return None
