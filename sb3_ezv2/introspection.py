"""
What an agent thinks, as arrays: the search tree of an observation, imagined futures beside real ones, and the errors of values
and rewards over an episode. :mod:`sb3_ezv2.plotting` draws them.

Shapes: K root actions, N nodes of a tree, T steps of an episode, H steps of an imagined future, A action
dimensions, D of MultiDiscrete actions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs
from stable_baselines3.common.vec_env import unwrap_vec_normalize
from torch.nn import functional as F

from sb3_ezv2.base_policy import Ezv2Policy
from sb3_ezv2.multi_discrete import MultiCategorical
from sb3_ezv2.networks import BaseNetwork
from sb3_ezv2.observations import apply, batch_size
from sb3_ezv2.search import SearchResult


class SearchTree(NamedTuple):
    """
    The search of one observation.

    :param action: index of the action that is recommended
    :param candidates: the root's actions as the environment takes them, float [K, A] of Box actions (flat), integers [K, D] of
        MultiDiscrete and MultiBinary ones; None for discrete actions
    :param prior: float32 [K], the network's policy; equal for candidates that are drawn from it: those of Box actions, and
        those of MultiDiscrete ones where there are more actions than candidates
    :param policy: float32 [K], improved by the search
    :param visits: int32 [K], simulations through each; they sum to the number of simulations
    :param q: float32 [K], reward + discount * value of each; NaN for those without a visit
    :param network_value: the network's value of the observation
    :param value: the search's
    :param nodes: the tree itself, each entry [N], see :meth:`sb3_ezv2.ctree.Tree.nodes`
    :param node_actions: [N, A] or [N, D], the actions that lead to the nodes, as ``candidates`` (of the root: the middle of
        the bounds, or the first categories); None for discrete actions
    """

    action: int
    candidates: np.ndarray | None
    prior: np.ndarray
    policy: np.ndarray
    visits: np.ndarray
    q: np.ndarray
    network_value: float
    value: float
    nodes: dict[str, np.ndarray]
    node_actions: np.ndarray | None


class Episode(NamedTuple):
    """
    One episode, or its beginning.

    :param observations: [T + 1, ...] tensors as the policy takes them, or a dictionary of them; the final one included
    :param actions: int64 [T] or [T, D], counted from 0, or float32 [T, A] in [-1, 1]
    :param rewards: float64 [T]
    :param terminated: it ended in a terminal state; otherwise it was truncated or cut short
    """

    observations: Any
    actions: th.Tensor
    rewards: np.ndarray
    terminated: bool


class ImaginedRollout(NamedTuple):
    """
    The model unrolled along the actions that were taken, beside what happened. Step 0 is where the imagination begins.

    :param rewards: float [H], real
    :param imagined_rewards: float [H], of the model
    :param values: float [H + 1], the network's values of the real observations
    :param imagined_values: float [H + 1], the network's values of the imagined states; the first are equal
    :param similarity: float [H + 1], cosine similarity of the imagined states and those of the real observations, at first 1
    :param projected_similarity: float [H + 1], the same of what the consistency loss compares (Eq. 4): the projections
    :param unchanged_similarity: float [H + 1], cosine similarity of the first state and those of the real observations: what a
        model that imagines no change would get
    """

    rewards: np.ndarray
    imagined_rewards: np.ndarray
    values: np.ndarray
    imagined_values: np.ndarray
    similarity: np.ndarray
    projected_similarity: np.ndarray
    unchanged_similarity: np.ndarray


class EpisodeErrors(NamedTuple):
    """
    Values and rewards over an episode.

    :param rewards: float [T], real
    :param predicted_rewards: float [T], the model's from each real observation and the action taken there
    :param returns: float [T], measured: discounted sums of the rewards that followed. If the episode did not end in a terminal
        state, the network's value of its last observation stands for the rest
    :param network_values: float [T]
    :param search_values: float [T]
    """

    rewards: np.ndarray
    predicted_rewards: np.ndarray
    returns: np.ndarray
    network_values: np.ndarray
    search_values: np.ndarray


def policy_of(agent: Any) -> Ezv2Policy:
    """
    :param agent: an EZV2 agent or its policy
    :return: the policy, in evaluation mode
    :raises TypeError: it is neither
    """
    policy = getattr(agent, "policy", agent)
    if not isinstance(policy, Ezv2Policy):
        raise TypeError(f"an EZV2 agent or its policy is needed, not {type(agent).__name__}.")
    policy.set_training_mode(False)
    return policy


def search_tree(
    agent: Any,
    observation: np.ndarray | dict[str, np.ndarray],
    n_simulations: int | None = None,
    rng: np.random.Generator | None = None,
) -> SearchTree:
    """
    :param agent: an EZV2 agent or its policy
    :param observation: one, as :meth:`~sb3_ezv2.base_policy.Ezv2Policy.predict` takes it
    :param n_simulations: of the search; None: as many as in training
    :param rng: of the search's noise; None: the search of deterministic prediction
    :return: the search of this observation
    :raises ValueError: there are several observations
    """
    policy = policy_of(agent)
    obs, _ = policy.obs_to_tensor(observation)
    if batch_size(obs) != 1:
        raise ValueError("a tree belongs to one observation, but a batch was given: take one of them.")
    search = policy.search_with(n_simulations)
    result = search.run(obs, rng)
    batch, actions = search.last_tree()
    nodes = {name: array[0] for name, array in batch.items()}
    count = search.num_root_actions
    visits, q = np.zeros(count, np.int32), np.full(count, np.nan, np.float32)
    children = np.flatnonzero(nodes["parent"] == 0)
    visits[nodes["action"][children]] = nodes["visits"][children]
    q[nodes["action"][children]] = nodes["q"][children]
    return SearchTree(
        action=int(result.action[0]),
        candidates=None if result.candidates is None else _unscale(policy, result.candidates[0]),
        prior=_prior(policy.averaged_network, obs, result),
        policy=result.policy[0].cpu().numpy(),
        visits=visits,
        q=q,
        network_value=float(result.network_value[0]),
        value=float(result.value[0]),
        nodes=nodes,
        node_actions=None if actions is None else _unscale(policy, th.from_numpy(actions[0])),
    )


def play(
    agent: Any,
    env: GymEnv,
    max_steps: int = 1000,
    seed: int | None = None,
    n_simulations: int | None = None,
) -> Episode:
    """
    Play an episode with the deterministic policy.

    :param agent: an EZV2 agent or its policy
    :param env: a Gymnasium environment or a ``VecEnv`` with one: not the one that the agent goes on training with, which would
        lose its place. If it has a ``VecNormalize``, its statistics stay as they are, and rewards are normalised as it does it
    :param max_steps: steps after which the episode is cut short
    :param seed: of the episode
    :param n_simulations: of each search, as in :meth:`~sb3_ezv2.base_policy.Ezv2Policy.predict`
    :return: the episode
    :raises ValueError: there are several environments
    """
    policy = policy_of(agent)
    vec_env = BaseAlgorithm._wrap_env(env, monitor_wrapper=False)
    if vec_env.num_envs != 1:
        raise ValueError(f"one environment is played at a time, but there are {vec_env.num_envs}: make one.")
    normalize = unwrap_vec_normalize(vec_env)
    was_training = normalize is not None and normalize.training
    if normalize is not None:
        normalize.training = False
    try:
        if seed is not None:
            vec_env.seed(seed)
        obs: Any = vec_env.reset()
        observations: list[Any] = [apply(np.copy, obs)]
        actions: list[np.ndarray] = []
        rewards: list[float] = []
        done = terminated = False
        while not done and len(rewards) < max_steps:
            action, _ = policy.predict(obs, deterministic=True, n_simulations=n_simulations)
            obs, reward, dones, infos = vec_env.step(action)
            done = bool(dones[0])
            terminated = done and not infos[0].get("TimeLimit.truncated", False)
            last = apply(lambda x: np.asarray(x)[None], infos[0]["terminal_observation"]) if done else obs
            observations.append(apply(np.copy, last))
            actions.append(action)
            rewards.append(float(reward[0]))
    finally:
        if normalize is not None:
            normalize.training = was_training
    parts = observations
    joined = (
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        if isinstance(parts[0], dict)
        else np.concatenate(parts)
    )
    tensors, _ = policy.obs_to_tensor(joined)
    taken = th.from_numpy(policy.from_env_actions(np.concatenate(actions)))
    taken = taken if taken.is_floating_point() else taken.long()
    return Episode(tensors, taken, np.array(rewards), terminated)


@th.no_grad()
def imagine(agent: Any, episode: Episode, start: int = 0, steps: int = 20) -> ImaginedRollout:
    """
    Unroll the model from one of an episode's observations along the actions that were taken.

    :param agent: an EZV2 agent or its policy
    :param episode: of :func:`play`
    :param start: step of the episode where the imagination begins
    :param steps: how far it goes, at most to the end of the episode
    :return: what was imagined and what happened
    :raises ValueError: ``start`` is no step of the episode, or ``steps`` is not positive
    """
    network = policy_of(agent).averaged_network
    length = len(episode.rewards)
    if not 0 <= start < length or steps < 1:
        raise ValueError(
            f"start must be a step of the episode (0 to {length - 1}) and steps positive, not {start} and {steps}."
        )
    end = min(start + steps, length)
    obs = apply(lambda x: x[start : end + 1], episode.observations)
    real = network.represent(obs)
    state, value, _ = network.initial_inference(apply(lambda x: x[:1], obs))
    latents, rewards, values = [_latent(network, state)], [], [value]
    for action in episode.actions[start:end].to(state.device):
        state, reward, value, _ = network.recurrent_inference(state, action[None])
        latents.append(_latent(network, state))
        rewards.append(reward)
        values.append(value)
    imagined = th.cat(latents)
    predicted = network.projection_predictor(network.project(imagined))
    return ImaginedRollout(
        rewards=episode.rewards[start:end],
        imagined_rewards=_numpy(th.cat(rewards)),
        values=_numpy(network.value_support.decode(network.value_head(real))),
        imagined_values=_numpy(th.cat(values)),
        similarity=_cosine(imagined, real),
        projected_similarity=_cosine(predicted, network.project(real)),
        unchanged_similarity=_cosine(real[:1].expand_as(real), real),
    )


@th.no_grad()
def episode_errors(agent: Any, episode: Episode, n_simulations: int | None = None) -> EpisodeErrors:
    """
    :param agent: an EZV2 agent or its policy
    :param episode: of :func:`play`
    :param n_simulations: of the searches; None: as many as in training
    :return: what the agent expected at each step, and what came
    """
    policy = policy_of(agent)
    network = policy.averaged_network
    obs = apply(lambda x: x[:-1], episode.observations)
    search = policy.search_with(n_simulations).run(obs, None)
    state, _, _ = network.initial_inference(obs)
    _, predicted, _, _ = network.recurrent_inference(state, episode.actions.to(state.device))
    values = network.values(episode.observations)
    return EpisodeErrors(
        rewards=episode.rewards,
        predicted_rewards=_numpy(predicted),
        returns=discounted_returns(
            episode.rewards, policy.search_settings.gamma, 0.0 if episode.terminated else float(values[-1])
        ),
        network_values=_numpy(values[:-1]),
        search_values=_numpy(search.value),
    )


def discounted_returns(rewards: np.ndarray, gamma: float, bootstrap: float) -> np.ndarray:
    """
    :param rewards: [T]
    :param gamma: discount of one step
    :param bootstrap: value of the state after the last step; 0 if that is terminal
    :return: float64 [T], at each step the sum of the discounted rewards from it on
    """
    returns, following = np.zeros(len(rewards)), bootstrap
    for step in reversed(range(len(rewards))):
        following = rewards[step] + gamma * following
        returns[step] = following
    return returns


def _latent(network: BaseNetwork, state: th.Tensor) -> th.Tensor:
    """The latent state alone of what a search keeps, [B, ...] (with a value prefix that is more)."""
    return state.flatten(1)[:, : network.state_dim].unflatten(1, network.state_shape)


def _cosine(a: th.Tensor, b: th.Tensor) -> np.ndarray:
    return _numpy(F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1))


def _numpy(x: th.Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


@th.no_grad()
def _prior(network: BaseNetwork, obs: PyTorchObs, result: SearchResult) -> np.ndarray:
    """The network's policy over the root's actions, float32 [K], of one observation."""
    count = result.policy.shape[1]
    policy = network.initial_inference(obs)[2]
    if result.candidates is None:
        return _numpy(F.softmax(policy[0], dim=-1))
    if network.category_sizes and count == math.prod(network.category_sizes):
        return _numpy(MultiCategorical(policy, network.category_sizes).log_prob(result.candidates[0]).exp())
    return np.full(count, 1 / count, np.float32)


def _unscale(policy: Ezv2Policy, actions: th.Tensor) -> np.ndarray:
    """As the model takes them, [n, A] or [n, D], to as the environment does, flat."""
    found = _numpy(policy.to_env_actions(actions))
    if not isinstance(policy.action_space, spaces.Box):
        return found
    return policy.unscale_action(found.reshape(-1, *policy.action_space.shape)).reshape(len(found), -1)
