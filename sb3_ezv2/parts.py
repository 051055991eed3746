"""What an agent makes from its settings: the settings of its searches, the replay buffer, the reanalysis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sb3_ezv2.frames import ObservationStore, frames_per_observation
from sb3_ezv2.reanalyze import Reanalyzer, learns_best_action
from sb3_ezv2.replay_buffer import SequenceReplayBuffer, check_ring
from sb3_ezv2.search import SearchSettings, searches_all_actions
from sb3_ezv2.validation import check_buffer_kwargs, check_integer, check_memory

if TYPE_CHECKING:
    from sb3_ezv2.ezv2 import EZV2


def search_settings(agent: EZV2) -> SearchSettings:
    """:return: of all its searches; see :func:`sb3_ezv2.search.searches_all_actions`"""
    all_actions = searches_all_actions(agent.action_space, agent.n_sampled_actions)
    return SearchSettings(
        n_simulations=agent.n_simulations,
        n_sampled_actions=agent.n_sampled_actions,
        n_inner_actions=agent.n_inner_actions,
        policy_action_fraction=agent.policy_action_fraction,
        flat_std_scale=agent.flat_std_scale,
        c_visit=agent.c_visit,
        c_scale=(0.3 if all_actions else 0.1) if agent.c_scale is None else agent.c_scale,
        gamma=agent.gamma,
        improved_value=all_actions if agent.search_value is None else agent.search_value == "improved",
    )


def frame_stack(agent: EZV2) -> int:
    """:return: frames of which an image observation is a stack"""
    return agent.replay_buffer_kwargs.get("frame_stack", frames_per_observation(agent.env))


def check_buffer(agent: EZV2) -> None:
    """
    :raises ValueError: the replay buffer is of another kind, too small, or for images that are no stacks of frames
    :raises TypeError: one of its arguments does not exist, or is another setting's
    """
    buffer_class = agent.replay_buffer_class
    assert buffer_class is not None
    if not issubclass(buffer_class, SequenceReplayBuffer):
        raise ValueError(
            f"EZV2 replays sequences: {buffer_class.__name__} does not apply, "
            "replay_buffer_class must be a subclass of sb3_ezv2.replay_buffer.SequenceReplayBuffer or None."
        )
    check_buffer_kwargs(buffer_class, agent.replay_buffer_kwargs)
    check_integer("frame_stack in replay_buffer_kwargs", frame_stack(agent), 1)
    check_ring(agent.buffer_size, agent.n_envs, agent.unroll_steps, agent.td_steps, frame_stack(agent))
    ObservationStore(agent.observation_space, n_envs=1, ring=1, frame_stack=frame_stack(agent))


def make_replay_buffer(agent: EZV2, seed: int) -> SequenceReplayBuffer:
    """
    :param seed: of its sampling
    :return: an empty one
    :raises ValueError: there is not enough memory
    """
    buffer_class = agent.replay_buffer_class
    assert buffer_class is not None and issubclass(buffer_class, SequenceReplayBuffer)
    nbytes = buffer_class.estimate_nbytes(agent.buffer_size, agent.observation_space, agent.action_space, frame_stack(agent))
    if agent.verbose >= 1:
        print(f"Replay buffer: {nbytes / 1e9:.2f} GB when full")
    check_memory(nbytes, agent.buffer_size)
    return buffer_class(
        agent.buffer_size,
        agent.observation_space,
        agent.action_space,
        device=agent.device,
        n_envs=agent.n_envs,
        gamma=agent.gamma,
        unroll_steps=agent.unroll_steps,
        td_steps=agent.td_steps,
        td_steps_min=agent.td_steps_min,
        alpha=agent.priority_alpha,
        beta=agent.priority_beta,
        seed=seed,
        **{"frame_stack": frame_stack(agent), **agent.replay_buffer_kwargs},
    )


def make_reanalyzer(agent: EZV2, buffer: SequenceReplayBuffer) -> Reanalyzer:
    """
    :param buffer: with the searches that it remembers
    :return: of that buffer
    :raises ValueError: there is not enough memory for the search cache
    """
    policy, known = agent.policy, buffer.cache
    reanalyzer = Reanalyzer(
        policy.target_search,
        policy.target_network if agent.tau == 1.0 else policy.bootstrap_network,
        buffer,
        value_target=agent.value_target,
        best_action=learns_best_action(agent.policy_target, agent.action_space, agent.n_sampled_actions),
        cache=agent.reanalyze_cache,
        refresh_fraction=agent.cache_refresh_fraction,
    )
    if reanalyzer.cache is not None and reanalyzer.cache is not known and agent.verbose >= 1:
        print(f"Search cache: {reanalyzer.cache.nbytes / 1e9:.2f} GB when full")
    return reanalyzer
