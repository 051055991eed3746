"""Random actions while an agent learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from sb3_ezv2.search import searches_all_actions

if TYPE_CHECKING:
    from sb3_ezv2.ezv2 import EZV2


def exploration_eps(agent: EZV2) -> float:
    """:return: probability that a random action begins at a step; see :func:`sb3_ezv2.search.searches_all_actions`"""
    if agent.exploration_eps is not None:
        return agent.exploration_eps
    return 0.1 if searches_all_actions(agent.action_space, agent.n_sampled_actions) else 0.0


def check_exploration(agent: EZV2) -> None:
    """:raises ValueError: random actions would be repeated, but there are none"""
    if agent.exploration_repeat > 1 and exploration_eps(agent) == 0:
        raise ValueError(
            f"exploration_repeat={agent.exploration_repeat} repeats random actions, but exploration_eps is 0 here: "
            "give a probability that one begins, such as exploration_eps=0.03."
        )


class RandomActions:
    """
    Random actions that begin with some probability at each step, each repeated for a number of steps n which is drawn with a
    probability proportional to 1 / n² (temporally extended exploration, Dabney et al. 2021,
    https://arxiv.org/abs/2006.01782): mostly once, and now and then for so long that a body moves instead of trembling.

    :param n_envs: environments, which explore on their own
    """

    def __init__(self, n_envs: int):
        self.left = np.zeros(n_envs, np.int64)  # steps for which each environment's random action is still to be repeated
        self.actions: list[Any] = [None] * n_envs

    def choose(self, eps: float, longest: int, space: spaces.Space, rng: np.random.Generator) -> dict[int, Any]:
        """
        :param eps: probability that a random action begins, in an environment where none is repeated
        :param longest: largest n
        :param space: where the actions are drawn from
        :param rng: of where they begin and of n
        :return: the random actions of this step, by environment
        """
        begins = (rng.random(len(self.left)) < eps) & (self.left == 0)
        for env in np.flatnonzero(begins):
            self.actions[env] = space.sample()
            self.left[env] = _repetitions(longest, rng)
        chosen = {int(env): self.actions[env] for env in np.flatnonzero(self.left > 0)}
        self.left = np.maximum(self.left - 1, 0)
        return chosen

    def end_episodes(self, dones: np.ndarray) -> None:
        """No action is carried into the next episode. :param dones: [n_envs], where one has ended"""
        self.left[np.asarray(dones, bool)] = 0


def _repetitions(longest: int, rng: np.random.Generator) -> int:
    """:return: 1 to ``longest``"""
    if longest == 1:
        return 1
    weights = 1.0 / np.arange(1, longest + 1) ** 2
    return int(rng.choice(longest, p=weights / weights.sum())) + 1
