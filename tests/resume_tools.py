"""Runs that are interrupted, in processes of their own: what a whole run gives is compared with what its parts give."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from common import TINY, SpacesEnv
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize

from sb3_ezv2 import EZV2
from sb3_ezv2.wrappers import Resumable

TIMES = ("time/fps", "time/time_elapsed")
STEPS = 96


class Pictures(SpacesEnv):
    """Random images, with a reward for action 0."""

    def __init__(self) -> None:
        super().__init__(spaces.Box(0, 255, (16, 16, 1), np.uint8), spaces.Discrete(2), length=13)


class Stubborn(SpacesEnv):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__(spaces.Box(-1.0, 1.0, (3,), np.float32), spaces.Discrete(2), length=15)
        self.file: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        gym.Env.reset(self, seed=seed)
        self.steps = 0
        self.file = open(__file__)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        _, *rest = super().step(action)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), *rest  # type: ignore[return-value]


def _frames() -> VecEnv:
    return VecFrameStack(make_vec_env(Pictures, 2, seed=3), 3)


PICTURES: dict[str, Any] = dict(
    policy="CnnPolicy",
    policy_kwargs=dict(net_arch=[8], channels=4, n_downsamples=2, head_channels=2, action_embedding_dim=2, projection_dim=8),
)

SHORT, FORK = dict(max_episode_steps=14), dict(start_method="fork")

CASES: dict[str, tuple[Callable[[], VecEnv], dict[str, Any]]] = {
    "discrete": (lambda: make_vec_env("CartPole-v1", 1, seed=3), dict(learning_rate=lambda progress: 1e-3 * progress)),
    "box": (lambda: make_vec_env("Pendulum-v1", 3, seed=3, env_kwargs=SHORT), dict(gradient_steps=-1, train_freq=2)),
    "normalized": (lambda: VecNormalize(make_vec_env("Pendulum-v1", 2, seed=3, env_kwargs=SHORT)), dict(tau=1.0)),
    "images": (_frames, PICTURES),
    "processes": (
        lambda: VecNormalize(make_vec_env("CartPole-v1", 2, seed=3, vec_env_cls=SubprocVecEnv, vec_env_kwargs=FORK)),
        dict(mixed_value_start=20, fresh_transitions=30),
    ),
    "episodes": (lambda: make_vec_env("CartPole-v1", 1, seed=3), dict(train_freq=(1, "episode"), gradient_steps=10)),
    "ahead": (
        lambda: VecNormalize(make_vec_env("Pendulum-v1", 2, seed=3, env_kwargs=SHORT)),
        # a batch is prepared at every stop once there are updates
        dict(gradient_steps=-1, target_update_interval=19, reanalyze_ahead=True, reanalyze_thread=True),
    ),
    "exploring": (
        lambda: make_vec_env("Pendulum-v1", 3, seed=3, env_kwargs=SHORT),
        dict(exploration_eps=0.9, exploration_repeat=8),
    ),
    "replayed": (lambda: make_vec_env(Stubborn, 2, seed=3, wrapper_class=Resumable), {}),
}


def make_case(name: str) -> EZV2:
    """:param name: a key of :data:`CASES` :return: a new agent"""
    make_env, settings = CASES[name]
    settings = {**TINY, "learning_starts": 30, "seed": 5, "warmup_fraction": 0.5, **settings}
    return EZV2(settings.pop("policy", "MlpPolicy"), make_env(), **settings)


class Remember(KVWriter):
    """A logger output that keeps everything but wall times."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append({name: value for name, value in key_values.items() if name not in TIMES})

    def close(self) -> None:
        pass


class Stop(BaseCallback):
    """
    Ends the training, and draws from the process's generators before.

    :param at: environment steps
    :param how: ``"step"`` by returning False, ``"rollout"`` by an exception between two updates, ``"middle"`` by one in the
        middle of a step, after saving there
    :param path: where to save
    """

    def __init__(self, at: int, how: str, path: Path):
        super().__init__()
        self.at, self.how, self.path = at, how, path

    def _on_rollout_start(self) -> None:
        if self.how == "rollout" and self.model.num_timesteps >= self.at:
            raise StopIteration

    def _on_step(self) -> bool:
        np.random.rand(), th.rand(1), random.random()
        if self.how == "middle" and self.num_timesteps >= self.at:
            self.model.save_checkpoint(self.path)  # type: ignore[attr-defined]
            raise StopIteration
        return self.how != "step" or self.num_timesteps < self.at


def digest(model: EZV2) -> dict[str, Any]:
    """:return: all that the run has made so far, by names; arrays as digests"""
    assert model.replay_buffer is not None and model._reanalyzer is not None

    def of(*arrays: Any) -> str:
        result = hashlib.sha256()
        for array in arrays:
            array = array.detach().cpu().numpy() if isinstance(array, th.Tensor) else np.asarray(array)
            result.update(repr((array.shape, array.dtype)).encode() + np.ascontiguousarray(array).tobytes())
        return result.hexdigest()

    buffer, cache = model.replay_buffer, model._reanalyzer.cache
    assert cache is not None and buffer.cache is cache
    optimizer = model.policy.optimizer.state_dict()
    parts: dict[str, Any] = {f"weights/{name}": of(tensor) for name, tensor in model.policy.state_dict().items()}
    parts["optimizer"] = of(*[x for entry in optimizer["state"].values() for x in entry.values()])
    names = ("actions", "rewards", "kinds", "stamps", "episodes", "transitions", "weights", "written", "waiting")
    parts.update({f"replay/{name}": of(getattr(buffer, name)) for name in names})
    parts.update({f"observations/{key}": of(array) for key, array in buffer.store.arrays.items()})
    parts["cache"] = of(*[getattr(cache, name) for name in cache._arrays()])
    if (ahead := buffer.prepared) is not None:
        tensors = [ahead.batch.observations, ahead.batch.actions, ahead.batch.returns, *ahead.searches.roots]
        parts["prepared"] = of(ahead.batch.slots, ahead.stamps, ahead.searches.rows, *[x for x in tensors if x is not None])
    parts["generators"] = repr([{k: g.bit_generator.state for k, g in (model._generators or {}).items()}])
    parts["replay generator"] = repr(buffer.rng.bit_generator.state)
    parts["global"] = of(np.random.rand(3), th.rand(3))
    parts["action space"] = repr(model.action_space.np_random.bit_generator.state)
    numbers = ("num_timesteps", "_n_updates", "_episode_num", "_total_timesteps", "_warmup_updates", "_target_update_interval")
    parts.update({name: getattr(model, name) for name in numbers})
    exploring = model._random_actions
    assert exploring is not None
    parts["random actions"] = [repr((left, action)) for left, action in zip(exploring.left, exploring.actions)]
    parts["progress"] = model._current_progress_remaining
    parts["cache version"] = cache.version
    parts["plan"] = [buffer.td_steps_age, model._reanalyzer.mixed_value_start, model._reanalyzer.fresh_transitions]
    parts["learning rate"] = optimizer["param_groups"][0]["lr"]
    parts["statistics"] = repr([(info["r"], info["l"]) for info in model.ep_info_buffer or ()])
    parts["running means"] = repr({name: float(total) / count for name, (total, count) in model._stats.items()})
    parts["observation"] = of(*[np.asarray(model._last_obs)])
    normalizer: Any = model.get_vec_normalize_env()
    if normalizer is not None:
        parts["normalizer"] = of(normalizer.obs_rms.mean, normalizer.obs_rms.var, normalizer.ret_rms.var, normalizer.returns)
    return parts


def go_on(name: str, folder: Path, stops: list[tuple[int, str]]) -> dict[str, Any]:
    """
    Run a case up to the next of its stops, or to its end, from what is in ``folder``.

    :param name: a key of :data:`CASES`
    :param folder: what an earlier process left
    :param stops: (steps, how)
    :return: see :func:`digest`; empty before the end
    """
    saved, log = folder / f"{name}.zip", Remember()
    if saved.exists():
        model = EZV2.load_checkpoint(saved, env=CASES[name][0](), device="cpu")
        log.rows = json.loads((folder / f"{name}.json").read_text())
        left, begun = model.remaining_timesteps, True
    else:
        model, left, begun = make_case(name), STEPS, False
    model.set_logger(Logger(folder=None, output_formats=[log]))
    at, how = next(((at, how) for at, how in stops if at > model.num_timesteps), (10 * STEPS, "step"))
    try:
        model.learn(left, callback=Stop(at, how, saved), log_interval=1, reset_num_timesteps=not begun)
    except StopIteration:
        pass
    parts: dict[str, Any] = {}
    if model.num_timesteps >= STEPS:
        parts = {**digest(model), "log": log.rows}
    else:
        if how != "middle":
            model.save_checkpoint(saved)
        (folder / f"{name}.json").write_text(json.dumps(log.rows, default=float))
    assert model.env is not None
    model.env.close()
    return json.loads(json.dumps(parts, default=float))


def main() -> None:
    """Every case as far as it goes."""
    th.set_num_threads(1)
    folder, stops = Path(sys.argv[1]), json.loads(sys.argv[2])
    print(json.dumps({name: go_on(name, folder, stops) for name in CASES}))


if __name__ == "__main__":
    main()
