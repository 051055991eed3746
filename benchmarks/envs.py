"""Environments of the benchmarks: how any task is built, and a two-dimensional Box task without extra dependencies."""

import os
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_ezv2.wrappers import Resumable


class PointMass2D(gym.Env[np.ndarray, np.ndarray]):
    """
    A point with inertia that must reach the origin and stay there: a double integrator in a square with walls.

    - Action, shape (2,), each in [-1, 1]: the acceleration.
    - Observation, shape (4,): position in [-1, 1]², velocity in [-2, 2]². A wall stops the point.
    - Reward: minus the distance to the origin, minus a tenth of the speed; at most 0, about -1 per step when lost.
    - Start: a position uniform in the square, a velocity uniform in [-0.5, 0.5]². No terminal states; 100 steps.

    Returns of known controllers are in the benchmarks' README: they tell what a learned score is worth.
    """

    #: seconds per step; from a corner the origin is about 20 steps away at full thrust
    dt = 0.1
    max_speed = 2.0

    def __init__(self) -> None:
        high = np.array([1.0, 1.0, self.max_speed, self.max_speed], dtype=np.float32)
        self.observation_space = spaces.Box(-high, high, dtype=np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, shape=(2,), dtype=np.float32)
        self._position = np.zeros(2)
        self._velocity = np.zeros(2)

    def _observation(self) -> np.ndarray:
        return np.concatenate([self._position, self._velocity]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._position = self.np_random.uniform(-1.0, 1.0, size=2)
        self._velocity = self.np_random.uniform(-0.5, 0.5, size=2)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        thrust = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        self._velocity = np.clip(self._velocity + self.dt * thrust, -self.max_speed, self.max_speed)
        position = self._position + self.dt * self._velocity
        self._position = np.clip(position, -1.0, 1.0)
        self._velocity[position != self._position] = 0.0
        reward = -float(np.linalg.norm(self._position)) - 0.1 * float(np.linalg.norm(self._velocity))
        return self._observation(), reward, False, False, {}


if "PointMass2D-v0" not in gym.registry:
    gym.register("PointMass2D-v0", entry_point="benchmarks.envs:PointMass2D", max_episode_steps=100)


def make_env(env_id: str, action_repeat: int = 1, env_kwargs: dict[str, Any] | None = None) -> Resumable:
    """
    Build one environment of a task.

    :param env_id: any Gymnasium id; those of the DeepMind control suite are ``dm_control/<domain>-<task>-v0``
    :param action_repeat: how often each action is applied; rewards are summed
    :param env_kwargs: what else ``gymnasium.make`` shall pass to the environment
    :return: the environment, with dictionary observations flattened, wrapped in SB3's ``Monitor`` and in
        :class:`sb3_ezv2.wrappers.Resumable`
    """
    if env_id.startswith("dm_control/"):
        # States need no rendering; without this dm_control looks for OpenGL, which a bare machine lacks.
        os.environ.setdefault("MUJOCO_GL", "disable")
        try:
            import shimmy  # noqa: F401  (registers the control suite with Gymnasium)
        except ImportError as error:
            raise ImportError(f"{env_id} needs the control suite: pip install 'sb3-ezv2[dmc]'.") from error
    env: gym.Env[Any, Any] = gym.make(env_id, **(env_kwargs or {}))
    if action_repeat > 1:
        # Imported only here because it came with Gymnasium 1.3, later than the rest of what is needed.
        from gymnasium.wrappers import RepeatAction

        env = RepeatAction(env, action_repeat)
    if isinstance(env.observation_space, spaces.Dict):
        env = FlattenObservation(env)
    return Resumable(Monitor(env))


def make_vec_env(env_id: str, n_envs: int, action_repeat: int = 1, env_kwargs: dict[str, Any] | None = None) -> DummyVecEnv:
    """
    Build ``n_envs`` independent copies of a task; see :func:`make_env` for the arguments.

    :param n_envs: number of copies
    :return: the copies as one SB3 ``VecEnv``, in this process
    """

    def build() -> gym.Env[Any, Any]:
        return make_env(env_id, action_repeat, env_kwargs)

    return DummyVecEnv([build] * n_envs)
