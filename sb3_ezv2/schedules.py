"""What follows the planned length of a run or the updates so far: settings that are None, the learning rate, averaging."""

from __future__ import annotations

from typing import NamedTuple

from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

LONGEST_PLAN = 200_000
"""Steps and updates that a run counts as at most, those of the paper's longest runs: what is a share of them grows no further,
so that a run which a callback shall stop can have a budget without limit."""

TD_STEPS_AGE_FRACTION, SHORTEST_TD_STEPS_AGE = 0.005, 20
"""``td_steps_age`` of None, as a share of the planned steps, and its lower limit."""

MIXED_VALUE_START_FRACTION, EARLIEST_MIXED_VALUE_START = 0.04, 300
"""``mixed_value_start`` of None, as a share of the planned updates, and its lower limit: values of a network that has hardly
learned yet would be learned from themselves."""

FRESH_TRANSITIONS_FRACTION, FEWEST_FRESH_TRANSITIONS = 0.1, 500
"""``fresh_transitions`` of None, as a share of the planned steps, and its lower limit; the paper's 20,000 of 100,000
are twice that share."""

TARGET_UPDATE_FRACTION, SHORTEST_TARGET_UPDATE_INTERVAL = 0.002, 48
"""``target_update_interval`` of None, as a share of the planned updates, and its lower limit, below which states would
be searched anew for little."""

LONGEST_TARGET_UPDATE_INTERVAL = round(TARGET_UPDATE_FRACTION * LONGEST_PLAN)
"""The paper's 400."""


class RunPlan(NamedTuple):
    """
    The settings of these names, all of them numbers, and the updates in which the learning rate rises.

    :param td_steps_age: transitions
    :param mixed_value_start: updates
    :param fresh_transitions: transitions
    :param target_update_interval: updates
    :param warmup_updates: updates
    """

    td_steps_age: int
    mixed_value_start: int
    fresh_transitions: int
    target_update_interval: int
    warmup_updates: int


def plan_run(
    steps: int,
    updates: float,
    capacity: int,
    td_steps_age: int | None,
    mixed_value_start: int | None,
    fresh_transitions: int | None,
    target_update_interval: int | None,
    warmup_fraction: float,
) -> RunPlan:
    """
    :param steps: environment steps of the whole run
    :param updates: updates of the whole run
    :param capacity: transitions that the replay buffer holds: shares of the steps are shares of these, if they are fewer
    :param warmup_fraction: share of the updates in which the learning rate rises
    :return: the settings as given, those that are None as shares of the run, which counts as one of at most
        :data:`LONGEST_PLAN`
    """
    steps, updates = min(steps, capacity, LONGEST_PLAN), min(updates, LONGEST_PLAN)

    def share(setting: int | None, fraction: float, planned: float, least: int) -> int:
        return max(least, round(fraction * planned)) if setting is None else setting

    return RunPlan(
        share(td_steps_age, TD_STEPS_AGE_FRACTION, steps, SHORTEST_TD_STEPS_AGE),
        share(mixed_value_start, MIXED_VALUE_START_FRACTION, updates, EARLIEST_MIXED_VALUE_START),
        share(fresh_transitions, FRESH_TRANSITIONS_FRACTION, steps, FEWEST_FRESH_TRANSITIONS),
        share(target_update_interval, TARGET_UPDATE_FRACTION, updates, SHORTEST_TARGET_UPDATE_INTERVAL),
        round(warmup_fraction * updates),
    )


def planned_updates(steps: int, learning_starts: int, train_freq: TrainFreq, gradient_steps: int, n_envs: int) -> float:
    """
    :param steps: environment steps of the whole run
    :param learning_starts: those of them without updates
    :param train_freq: as SB3 converts it
    :param gradient_steps: -1: as many as steps
    :param n_envs: number of environments
    :return: updates of the whole run
    """
    learning = max(0, steps - learning_starts)
    if gradient_steps < 0 or train_freq.unit == TrainFrequencyUnit.EPISODE:
        return float(learning)  # episodes are of unknown length: as if there were one update per step
    return learning * gradient_steps / (train_freq.frequency * n_envs)


def learning_rate_factor(n_updates: int, warmup_updates: int, decay_updates: int | None, decay_factor: float) -> float:
    """
    :param n_updates: updates so far
    :param warmup_updates: those in which the factor rises from 0 to 1
    :param decay_updates: it is multiplied by ``decay_factor`` after every ``decay_updates`` updates; None: never
    :param decay_factor: see there
    :return: factor of SB3's own schedule
    """
    warmup = min(1.0, (n_updates + 1) / max(1, warmup_updates))
    return warmup if decay_updates is None else warmup * decay_factor ** (n_updates // decay_updates)


def averaging_weight(n_updates: int, fraction: float) -> float:
    """
    Of a power-function average (Karras et al. 2024, https://arxiv.org/abs/2312.02696, Sec. 3.1): weights of update s count
    with s**e, so that the window grows with the run. Their mean age is 1 / (e + 2) of the updates so far.

    :param n_updates: updates so far, the newest included, at least 1
    :param fraction: that mean age, at most 0.5 (all weights count alike); 0: the newest weights alone
    :return: share of the newest weights in the average
    """
    if fraction == 0:
        return 1.0
    exponent = 1 / fraction - 2
    return 1 - (1 - 1 / n_updates) ** (exponent + 1)
