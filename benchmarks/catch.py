"""
Catch as pixels: a small game that shows within minutes whether an agent learns from images::

    python -m benchmarks.learn --env benchmarks.catch:CatchPixels-v0 --policy CnnPolicy ...
    python -m benchmarks.catch    # what a random and a perfect player get
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class CatchPixels(gym.Env):
    """
    Balls fall one after another, one row per step, each from a random column. The paddle in the bottom row must be where they
    land.

    - Action: 0 left, 1 stay, 2 right; by one column.
    - Observation: uint8 [40, 40, 1], 8x8 cells of 4x4 pixels with a border of 4, ball and paddle white on black.
    - Reward: 1 for a ball that is caught, -1 for a lost one, else 0. An episode has 5 balls of 7 steps each.
    """

    cells, pixels, border, balls = 8, 4, 4, 5

    observation_space = spaces.Box(0, 255, (40, 40, 1), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._paddle = int(self.np_random.integers(self.cells))
        self._left = self.balls
        self._new_ball()
        return self._observation(), {}

    def _new_ball(self) -> None:
        self.ball = [0, int(self.np_random.integers(self.cells))]

    @property
    def paddle(self) -> int:
        """Column of the paddle."""
        return self._paddle

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._paddle = int(np.clip(self._paddle + int(action) - 1, 0, self.cells - 1))
        self.ball[0] += 1
        reward = 0.0
        if self.ball[0] == self.cells - 1:
            reward = 1.0 if self.ball[1] == self._paddle else -1.0
            self._left -= 1
        observation = self._observation()
        if reward != 0:
            self._new_ball()
        return observation, reward, self._left == 0, False, {}

    def _observation(self) -> np.ndarray:
        board = np.zeros((self.cells, self.cells), np.uint8)
        board[self.ball[0], self.ball[1]] = 255
        board[-1, self._paddle] = 255
        image = board.repeat(self.pixels, axis=0).repeat(self.pixels, axis=1)
        return np.pad(image, self.border)[..., None]


if "CatchPixels-v0" not in gym.registry:
    gym.register("CatchPixels-v0", entry_point="benchmarks.catch:CatchPixels")


def play(perfect: bool, episodes: int, seed: int = 0) -> np.ndarray:
    """
    :param perfect: move below the ball; otherwise uniformly random actions
    :param episodes: how many
    :param seed: of the episodes
    :return: float64 [episodes], returns
    """
    env = CatchPixels()
    rng = np.random.default_rng(seed)
    returns = np.zeros(episodes)
    for episode in range(episodes):
        env.reset(seed=seed + episode)
        over = False
        while not over:
            action = 1 + int(np.sign(env.ball[1] - env.paddle)) if perfect else int(rng.integers(3))
            _, reward, over, _, _ = env.step(action)
            returns[episode] += reward
    return returns


def main() -> None:
    for name, perfect in (("random", False), ("perfect", True)):
        returns = play(perfect, 1000)
        print(f"{name} player: mean return {returns.mean():.2f}, standard deviation {returns.std():.2f}, 1000 episodes")


if __name__ == "__main__":
    main()
