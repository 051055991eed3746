"""The search tree against mctx, against a plain Python search, and against answers known by hand."""

import dataclasses
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from oracles import Problem, Result, Settings, mctx_search, plain_search, random_problem, sequential_halving

from sb3_ezv2.ctree import Tree, considered_visits

# Below this lead of one option over the next, float32 rounding may decide otherwise than float64.
NEAR_TIE = 1e-5


def make_tree(problem: Problem, settings: Settings, num_roots: int | None = None, num_threads: int = 1) -> Tree:
    return Tree(
        num_roots or problem.num_roots,
        problem.num_simulations,
        problem.num_root_actions,
        problem.num_inner_actions,
        num_considered=settings.num_considered,
        discount=settings.discount,
        c_visit=settings.c_visit,
        c_scale=settings.c_scale,
        min_q_range=settings.min_q_range,
        num_threads=num_threads,
    )


def tree_search(
    problem: Problem,
    settings: Settings,
    tree: Tree | None = None,
    num_threads: int = 1,
    equal_priors: bool = False,
    fused: bool = True,
) -> Result:
    """Search a problem with the tree as the package does: states and candidates lie in flat pools.

    :param tree: use this one rather than a new one of just the right size
    :param equal_priors: pass no logits to ``backup``
    :param fused: ``step`` instead of ``backup`` and the next ``select``
    """
    batch, simulations = problem.num_roots, problem.num_simulations
    tree = make_tree(problem, settings, num_threads=num_threads) if tree is None else tree
    row = np.arange(batch)
    states = np.zeros((simulations + 1, batch), dtype=np.int64)
    codes = np.concatenate([problem.root_codes.reshape(-1), problem.inner_codes.reshape(-1)])  # [B * K + S * B * M]
    parents = np.zeros((batch, simulations), dtype=np.int64)
    actions = np.zeros((batch, simulations), dtype=np.int64)

    tree.reset(problem.root_value, problem.root_logits, problem.gumbel)
    for simulation in range(simulations):
        if simulation == 0 or not fused:
            tree.select()
        for array in (tree.parent, tree.action, tree.edge):
            assert array.shape == (batch,) and array.dtype == np.int64
        assert (tree.parent % batch == row).all()
        parents[:, simulation], actions[:, simulation] = tree.parent // batch, tree.action
        before, code = states.reshape(-1)[tree.parent], codes[tree.edge]
        after = problem.next_state[row, before, code]
        states[simulation + 1] = after
        logits = None if equal_priors else problem.logits[row, after]
        backup = tree.step if fused else tree.backup
        backup(problem.reward[row, before, code], problem.value[row, after], logits)
    return Result(
        parent=parents,
        action=actions,
        visits=tree.visits(),
        best_action=tree.best_action(),
        policy=tree.policy(),
        root_value=tree.root_value(),
        q_values=tree.q_values(),
        depth=tree.depth(),
        margin=np.full(batch, np.inf),
    )


def assert_same(found: Result, expected: Result, scale: np.ndarray, tolerance: float, roots: np.ndarray | None = None) -> None:
    """Same choices exactly and same numbers to ``tolerance``, for ``roots`` ([B] bool, None: all).

    :param scale: [B] magnitude of the values, by which errors of values are divided (never by less than 1)
    """
    keep = np.ones(len(scale), dtype=bool) if roots is None else roots
    for name in ("parent", "action", "visits", "best_action"):
        np.testing.assert_array_equal(getattr(found, name)[keep], getattr(expected, name)[keep], err_msg=name)
    unit = np.maximum(1.0, scale)[keep]
    np.testing.assert_allclose(found.policy[keep], expected.policy[keep], rtol=0, atol=tolerance, err_msg="policy")
    np.testing.assert_allclose(found.depth[keep], expected.depth[keep], rtol=0, atol=1e-5, err_msg="depth")
    for name in ("root_value", "q_values"):
        error = np.abs(getattr(found, name)[keep].astype(np.float64) - getattr(expected, name)[keep])
        limit = tolerance * unit.reshape(-1, *[1] * (error.ndim - 1))
        assert (error <= limit).all(), f"{name} off by up to {error.max()}"


def assert_identical(found: Result, expected: Result) -> None:
    for name in Result._fields:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def value_scale(problem: Problem) -> np.ndarray:
    """Largest magnitude that a root's model outputs. [B]"""
    largest = np.maximum(np.abs(problem.value).max(axis=1), np.abs(problem.reward).max(axis=(1, 2)))
    return np.maximum(largest, np.abs(problem.root_value)).astype(np.float64)


def bandit(rewards: np.ndarray, num_simulations: int, value: float = 0.0) -> Problem:
    """A root whose candidates pay ``rewards`` ([B, K]) once; nothing is paid after, priors are equal, no noise."""
    batch, arms = rewards.shape
    paid = np.zeros((batch, 2, arms), dtype=np.float32)
    paid[:, 0] = rewards
    return Problem(
        root_value=np.full(batch, value, dtype=np.float32),
        root_logits=np.zeros((batch, arms), dtype=np.float32),
        gumbel=np.zeros((batch, arms), dtype=np.float32),
        next_state=np.ones((batch, 2, arms), dtype=np.int64),
        reward=paid,
        value=np.full((batch, 2), value, dtype=np.float32),
        logits=np.zeros((batch, 2, arms), dtype=np.float32),
        root_codes=np.tile(np.arange(arms), (batch, 1)),
        inner_codes=np.tile(np.arange(arms), (num_simulations, batch, 1)),
    )


# --------------------------------------------------------------------------------------------------------------------
# Against mctx and the plain search
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roots", "actions", "considered", "simulations", "settings"),
    [
        (1, 18, 8, 16, {}),
        (64, 2, 2, 50, {"discount": 1.0}),
        (33, 4, 3, 32, {"discount": 0.9, "c_visit": 20.0, "c_scale": 1.0}),
        (48, 20, 20, 50, {"discount": 0.99, "min_q_range": 1.0}),
    ],
)
def test_discrete_search_is_that_of_mctx(
    roots: int, actions: int, considered: int, simulations: int, settings: dict[str, float]
) -> None:
    pytest.importorskip("mctx")
    rng = np.random.default_rng(roots)
    ambiguous = 0
    for _ in range(3):  # one compilation serves several draws
        problem = random_problem(rng, roots, simulations, actions)
        chosen = Settings(considered, **settings)
        plain, mctx, ours = plain_search(problem, chosen), mctx_search(problem, chosen), tree_search(problem, chosen)
        scale = value_scale(problem)
        assert_same(plain, mctx, scale, 1e-9, plain.margin > 1e-9)
        clear = plain.margin > NEAR_TIE
        ambiguous += (~clear).sum()
        assert_same(ours, mctx, scale, 1e-5, clear)
        assert (ours.visits.sum(axis=1) == simulations).all()
    assert ambiguous <= 0.05 * 3 * roots


@pytest.mark.parametrize(("considered", "simulations"), [(1, 10), (2, 1), (5, 24), (16, 32), (20, 50)])
def test_discrete_search_of_any_size_is_that_of_mctx(considered: int, simulations: int) -> None:
    """Number of actions (1..20) and discount differ from root to root: mctx masks the actions that a root lacks."""
    pytest.importorskip("mctx")
    roots, most_actions = 60, 20
    rng = np.random.default_rng(simulations)
    problem = random_problem(rng, roots, simulations, most_actions)
    num_actions = rng.integers(1, most_actions + 1, size=roots)
    discount = rng.choice([0.0, 0.5, 0.95, 0.997, 1.0], size=roots)
    base = Settings(considered, c_visit=rng.uniform(0.0, 60.0), c_scale=rng.uniform(0.05, 0.5), min_q_range=0.05)
    mctx = mctx_search(problem, base, discount=discount, num_valid=num_actions)
    ambiguous = 0
    for root, count in enumerate(num_actions):
        alone = problem.take(slice(root, root + 1))
        alone = dataclasses.replace(
            alone,
            root_logits=alone.root_logits[:, :count].copy(),
            gumbel=alone.gumbel[:, :count].copy(),
            logits=alone.logits[..., :count].copy(),
            root_codes=alone.root_codes[:, :count],
            inner_codes=alone.inner_codes[..., :count],
        )
        settings = base._replace(num_considered=min(considered, int(count)), discount=float(discount[root]))
        expected = Result(*(array[root : root + 1] for array in mctx))
        expected = expected._replace(
            visits=expected.visits[:, :count], policy=expected.policy[:, :count], q_values=expected.q_values[:, :count]
        )
        plain, scale = plain_search(alone, settings), value_scale(alone)
        assert_same(plain, expected, scale, 1e-9, plain.margin > 1e-9)
        clear = plain.margin > NEAR_TIE
        ambiguous += (~clear).sum()
        assert_same(tree_search(alone, settings), expected, scale, 1e-5, clear)
    assert ambiguous <= 0.05 * roots


@pytest.mark.parametrize(
    ("root_actions", "inner_actions", "simulations"),
    [(16, 2, 32), (16, 16, 32), (8, 3, 50), (4, 2, 64), (5, 1, 20), (1, 2, 12), (1, 1, 9), (20, 2, 7), (3, 5, 1)],
)
@pytest.mark.parametrize("discount", [0.5, 0.997])
def test_sampled_search_is_the_plain_one(root_actions: int, inner_actions: int, simulations: int, discount: float) -> None:
    """Box actions: K candidates at the root, M inside, all with equal priors, every node with candidates of its own."""
    rng = np.random.default_rng(root_actions + 100 * simulations)
    problem = random_problem(rng, 40, simulations, root_actions, inner_actions)
    settings = Settings(root_actions, discount)
    plain = plain_search(problem, settings)
    clear = plain.margin > NEAR_TIE
    assert clear.mean() >= 0.9
    for equal_priors in (True, False):  # logits of zeros say the same as none
        found = tree_search(problem, settings, equal_priors=equal_priors)
        assert_same(found, plain, value_scale(problem), 1e-5, clear)
        assert (found.visits.sum(axis=1) == simulations).all()


def check_any_search(data: Any) -> None:
    """Sizes and settings at will, discrete and sampled."""
    root_actions = data.draw(st.integers(1, 20), label="K")
    inner_actions = data.draw(st.none() | st.integers(1, 6), label="M")
    simulations = data.draw(st.integers(1, 50), label="S")
    settings = Settings(
        num_considered=data.draw(st.integers(1, root_actions), label="considered"),
        discount=data.draw(st.sampled_from([0.0, 0.3, 0.9, 0.997, 1.0]), label="discount"),
        c_visit=data.draw(st.sampled_from([0.0, 1.0, 50.0]), label="c_visit"),
        c_scale=data.draw(st.sampled_from([0.0, 0.1, 1.0]), label="c_scale"),
        min_q_range=data.draw(st.sampled_from([1e-3, 0.01, 10.0]), label="min_q_range"),
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    problem = random_problem(rng, data.draw(st.integers(1, 6), label="B"), simulations, root_actions, inner_actions)
    if data.draw(st.booleans(), label="ties"):  # whole numbers, so that many q's and scores are exactly equal
        unit = np.abs(problem.value).max()
        problem.value, problem.reward = (np.round(2 * x / unit).astype(np.float32) for x in (problem.value, problem.reward))
        problem.gumbel, problem.root_logits = (np.round(x).astype(np.float32) for x in (problem.gumbel, problem.root_logits))
    plain = plain_search(problem, settings)
    fused = data.draw(st.booleans(), label="fused")
    assert_same(tree_search(problem, settings, fused=fused), plain, value_scale(problem), 1e-5, plain.margin > NEAR_TIE)


@hypothesis_settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_search_is_the_plain_one(data: Any) -> None:
    check_any_search(data)


@pytest.mark.slow
@hypothesis_settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_thousands_of_searches_are_the_plain_ones(data: Any) -> None:
    check_any_search(data)


@pytest.mark.parametrize("sampled", [False, True])
def test_backup_and_select_in_one_call_are_the_same(sampled: bool) -> None:
    problem = random_problem(np.random.default_rng(20), 300, 24, 6, 2 if sampled else None)
    one, two = (tree_search(problem, Settings(6), fused=fused) for fused in (True, False))
    assert_identical(one, two)


def test_the_last_step_selects_nothing() -> None:
    tree = small_tree()
    tree.reset(floats(3), floats(3, 5), floats(3, 5))
    with pytest.raises(RuntimeError) as error:
        tree.step(floats(3), floats(3))
    assert_says_something(error)
    tree.select()
    for _ in range(3):
        tree.step(floats(3), floats(3))
    for call in (tree.select, lambda: tree.step(floats(3), floats(3))):
        with pytest.raises(RuntimeError) as error:
            call()
        assert_says_something(error)
    assert tree.visits().sum() == 9


def test_edge_counts_every_candidate_once() -> None:
    """Edges number the candidates of the roots, then those of the inner nodes in the order of the state pool."""
    problem = random_problem(np.random.default_rng(0), 7, 20, 5, 3)
    tree = make_tree(problem, Settings(5))
    tree.reset(problem.root_value, problem.root_logits, problem.gumbel)
    seen: set[int] = set()
    rng = np.random.default_rng(1)
    for _ in range(20):
        tree.select()
        slot, root = tree.parent // 7, tree.parent % 7
        inner = 7 * 5 + ((slot - 1) * 7 + root) * 3 + tree.action
        np.testing.assert_array_equal(tree.edge, np.where(slot == 0, root * 5 + tree.action, inner))
        seen.update(tree.edge.tolist())
        tree.backup(rng.normal(size=7).astype(np.float32), rng.normal(size=7).astype(np.float32), None)
    assert len(seen) == 7 * 20  # no edge is ever expanded twice


# --------------------------------------------------------------------------------------------------------------------
# Sequential halving
# --------------------------------------------------------------------------------------------------------------------


def test_schedule_by_hand() -> None:
    np.testing.assert_array_equal(considered_visits(16, 32), [0] * 16 + [1] * 8 + [2] * 4 + [3] * 4)
    np.testing.assert_array_equal(considered_visits(1, 5), [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(considered_visits(3, 7), [0, 0, 0, 1, 1, 2, 2])
    assert considered_visits(16, 32).dtype == np.int32


def test_schedule_is_that_of_mctx() -> None:
    pytest.importorskip("mctx")
    from mctx._src import seq_halving

    for considered in range(1, 21):
        for simulations in range(1, 65):
            expected = seq_halving.get_sequence_of_considered_visits(considered, simulations)
            np.testing.assert_array_equal(considered_visits(considered, simulations), expected)
            assert sequential_halving(considered, simulations) == list(expected)


@pytest.mark.parametrize(("considered", "simulations"), [(0, 5), (5, 0), (-1, 5), (5, -1), (1.5, 5), (5, "5"), (2**31, 5)])
def test_schedule_refuses_what_is_not_a_positive_integer(considered: Any, simulations: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        considered_visits(considered, simulations)


# --------------------------------------------------------------------------------------------------------------------
# Answers known by hand
# --------------------------------------------------------------------------------------------------------------------


def test_three_simulations_by_hand() -> None:
    """Two actions, discount 1/2, root value 1; the schedule is 0, 0, 1."""
    tree = Tree(1, 3, 2, 2, num_considered=2, discount=0.5)
    zeros = np.zeros((1, 2), dtype=np.float32)
    tree.reset(np.array([1.0], dtype=np.float32), zeros, zeros)
    steps = [
        # parent slot, action, edge; reward, value of the new node
        (0, 0, 0, 1.0, 2.0),  # q(0) = 1 + 2/2 = 2
        (0, 1, 1, 0.0, 4.0),  # q(1) = 0 + 4/2 = 2: a tie, which goes to action 0
        (1, 0, 2, 3.0, -4.0),  # q inside = 3 - 4/2 = 1, so node 1 has (2 + 1)/2 and q(0) = 1 + 1.5/2 = 1.75
    ]
    for parent, action, edge, reward, value in steps:
        tree.select()
        assert (tree.parent[0], tree.action[0], tree.edge[0]) == (parent, action, edge)
        tree.backup(np.array([reward], dtype=np.float32), np.array([value], dtype=np.float32), zeros)
    np.testing.assert_array_equal(tree.visits(), [[2, 1]])
    np.testing.assert_array_equal(tree.best_action(), [0])  # the most visited, though its q is the lower one
    np.testing.assert_allclose(tree.q_values(), [[1.75, 2.0]])
    np.testing.assert_allclose(tree.root_value(), [(1.0 + 2.0 + 2.0 + 1.5) / 4])
    # The bounds have seen 2, 2, 1 and 1.75; sigma = (50 + 2) * 0.1 * (q - 1) / (2 - 1).
    odds = np.exp(5.2 * 0.75 - 5.2 * 1.0)
    np.testing.assert_allclose(tree.policy(), [[odds / (1 + odds), 1 / (1 + odds)]], rtol=1e-6)
    np.testing.assert_allclose(tree.depth(), [(1 + 1 + 2) / 3], rtol=1e-6)


def test_unvisited_actions_take_the_mixed_value_by_hand() -> None:
    """One simulation of three actions with priors 1/2, 1/4, 1/4: v_mix = (v + 1 * q) / 2, its sigma is not clipped."""
    tree = Tree(1, 1, 3, 3, num_considered=3, discount=1.0, c_visit=4.0, c_scale=1.0, min_q_range=2.0)
    logits = np.log(np.array([[0.5, 0.25, 0.25]], dtype=np.float32))
    tree.reset(np.array([3.0], dtype=np.float32), logits, np.zeros((1, 3), dtype=np.float32))
    tree.select()
    assert tree.action[0] == 0
    tree.backup(np.array([-2.0], dtype=np.float32), np.array([1.0], dtype=np.float32), logits)
    np.testing.assert_allclose(tree.q_values(), [[-1.0, 1.0, 1.0]])
    np.testing.assert_allclose(tree.root_value(), [1.0])
    # min = max = -1, so the range is min_q_range: q_norm = 0 and (1 - -1)/2 = 1, times (4 + 1) * 1.
    weights = np.array([0.5, 0.25 * np.exp(5.0), 0.25 * np.exp(5.0)])
    np.testing.assert_allclose(tree.policy()[0], weights / weights.sum(), rtol=1e-5)


@pytest.mark.parametrize("simulations", [1, 2, 7, 16, 50])
@pytest.mark.parametrize("considered", [1, 4, 10])
def test_a_model_of_zeros_leaves_the_prior(simulations: int, considered: int) -> None:
    """All q are equal, as before training: the action is that of the Gumbel-max trick and the policy the prior."""
    rng = np.random.default_rng(simulations)
    problem = random_problem(rng, 100, simulations, 10).scaled(0.0)
    found = tree_search(problem, Settings(considered))
    np.testing.assert_array_equal(found.best_action, np.argmax(problem.gumbel + problem.root_logits, axis=1))
    prior = np.exp(problem.root_logits - problem.root_logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found.policy, prior / prior.sum(axis=1, keepdims=True), atol=1e-6)
    assert (found.root_value == 0).all() and (found.q_values == 0).all()
    # Exactly the considered actions are visited, and they are those of the Gumbel-top-k trick.
    visited = min(considered, simulations)
    top = np.argsort(-(problem.gumbel + problem.root_logits), axis=1, kind="stable")[:, :visited]
    np.testing.assert_array_equal(np.sort(top, axis=1), [np.flatnonzero(row) for row in found.visits])


def test_ties_go_to_the_lowest_index() -> None:
    found = tree_search(bandit(np.zeros((1, 6)), 20), Settings(6))
    np.testing.assert_array_equal(found.best_action, [0])
    np.testing.assert_array_equal(found.action[0, :6], np.arange(6))
    for simulations in range(1, 13):
        assert tree_search(bandit(np.zeros((1, 6)), simulations), Settings(6)).best_action[0] == 0
    # Two best arms of equal pay, neither of them the first.
    found = tree_search(bandit(np.array([[0.0, 3.0, 1.0, 3.0]]), 8), Settings(4))
    assert found.best_action[0] == 1


@pytest.mark.parametrize("value", [0.0, -5.0, 300.0])
@pytest.mark.parametrize(("arms", "simulations"), [(2, 2), (2, 8), (7, 7), (16, 32), (20, 50)])
def test_the_best_arm_of_a_bandit_is_found(arms: int, simulations: int, value: float) -> None:
    """As many simulations as arms suffice where nothing is random. Pay may be negative throughout."""
    rewards = np.random.default_rng(arms).normal(loc=-2.0, size=(50, arms)).astype(np.float32)
    found = tree_search(bandit(rewards, simulations, value), Settings(arms, discount=1.0))
    np.testing.assert_array_equal(found.best_action, rewards.argmax(axis=1))
    assert (found.visits.sum(axis=1) == simulations).all()
    if simulations >= 2 * arms:  # more than one round: the best arm is among those left at the end
        assert (found.visits[np.arange(50), found.best_action] == found.visits.max(axis=1)).all()
        np.testing.assert_array_equal(found.policy.argmax(axis=1), rewards.argmax(axis=1))


def test_considered_arms_follow_noise_and_prior() -> None:
    """Only the considered actions are visited: a paying arm that is not among them stays unseen."""
    problem = bandit(np.array([[0.0, 0.0, 0.0, 100.0]]), 12)
    problem.gumbel[:] = [[3.0, 1.0, 2.0, 0.0]]
    found = tree_search(problem, Settings(2))
    assert (found.visits[0, [0, 2]] > 0).all() and (found.visits[0, [1, 3]] == 0).all()
    problem.gumbel[:] = 0.0
    problem.root_logits[:] = [[-1.0, -2.0, -3.0, 0.5]]
    found = tree_search(problem, Settings(2))
    assert (found.visits[0, [0, 3]] > 0).all() and (found.visits[0, [1, 2]] == 0).all()
    assert found.best_action[0] == 3


def test_a_long_chain_is_followed() -> None:
    """One action everywhere: the tree is a chain, and the value is the mean of the n-step returns."""
    simulations, discount = 40, 0.9
    rng = np.random.default_rng(3)
    rewards, values = rng.normal(size=(2, simulations)).astype(np.float32)
    tree = Tree(1, simulations, 1, 1, num_considered=1, discount=discount)
    zero = np.zeros((1, 1), dtype=np.float32)
    tree.reset(np.array([2.0], dtype=np.float32), zero, zero)
    returns, paid = [2.0], 0.0
    for step in range(simulations):
        tree.select()
        assert (tree.parent[0], tree.action[0], tree.edge[0]) == (step, 0, step)
        tree.backup(rewards[step : step + 1], values[step : step + 1], zero)
        paid += discount**step * float(rewards[step])
        returns.append(paid + discount ** (step + 1) * float(values[step]))
    np.testing.assert_allclose(tree.root_value(), [np.mean(returns)], rtol=1e-6)
    np.testing.assert_allclose(tree.depth(), [(simulations + 1) / 2])
    np.testing.assert_array_equal(tree.visits(), [[simulations]])
    np.testing.assert_array_equal(tree.policy(), [[1.0]])


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("actions", "simulations"), [(1, 1), (1, 30), (5, 1), (16, 3), (20, 19)])
def test_fewer_simulations_than_actions_and_single_actions(actions: int, simulations: int, sampled: bool) -> None:
    problem = random_problem(np.random.default_rng(5), 20, simulations, actions, 2 if sampled else None)
    found = tree_search(problem, Settings(actions))
    assert (found.visits.sum(axis=1) == simulations).all()
    assert (found.visits[np.arange(20), found.best_action] == found.visits.max(axis=1)).all()
    np.testing.assert_allclose(found.policy.sum(axis=1), 1.0, atol=1e-5)
    assert np.isfinite(found.policy).all() and np.isfinite(found.root_value).all() and np.isfinite(found.q_values).all()
    if simulations == 1:
        assert (found.depth == 1).all() and (found.visits.max(axis=1) == 1).all()


def test_more_considered_than_there_are_actions() -> None:
    problem = random_problem(np.random.default_rng(6), 20, 20, 3)
    assert_identical(tree_search(problem, Settings(16)), tree_search(problem, Settings(3)))


@pytest.mark.parametrize("sampled", [False, True])
def test_the_unit_of_reward_does_not_matter(sampled: bool) -> None:
    """Rewards, values and min_q_range times a constant: the same search, values in the new unit.

    A power of two changes no float32 digit, so the equality is exact; another constant rounds each number anew.
    """
    problem = random_problem(np.random.default_rng(7), 200, 32, 8, 2 if sampled else None)
    settings = Settings(8, min_q_range=0.5)
    found = tree_search(problem, settings)
    for factor in (2.0**-10, 2.0**12):
        other = tree_search(problem.scaled(factor), settings._replace(min_q_range=0.5 * factor))
        rescaled = found._replace(root_value=found.root_value * factor, q_values=found.q_values * factor)
        assert_identical(other, rescaled)
    clear = plain_search(problem, settings).margin > 10 * NEAR_TIE
    assert clear.mean() > 0.8
    other = tree_search(problem.scaled(300.0), settings._replace(min_q_range=0.5 * 300.0))
    rescaled = found._replace(root_value=found.root_value * 300.0, q_values=found.q_values * 300.0)
    assert_same(other, rescaled, 300.0 * value_scale(problem), 1e-4, clear)


def test_only_differences_of_values_choose() -> None:
    """With discount 0 a constant added to all rewards shifts every q: the choices stay, however large the shift."""
    problem = random_problem(np.random.default_rng(8), 100, 32, 6)
    whole = np.round(problem.reward / np.abs(problem.reward).max(axis=(1, 2), keepdims=True).clip(min=1e-30) * 8.0)
    problem = dataclasses.replace(problem, reward=whole.astype(np.float32), root_value=np.zeros(100, dtype=np.float32))
    shifted = dataclasses.replace(problem, reward=problem.reward + 4096, root_value=problem.root_value + 4096)
    problem.value[:] = 0.0
    # The value of a node completes its unvisited actions, so it shifts as well; the discount of 0 keeps it out of every q.
    shifted.value = np.full_like(problem.value, 4096.0)
    settings = Settings(6, discount=0.0)
    found, other = tree_search(problem, settings), tree_search(shifted, settings)
    clear = plain_search(problem, settings).margin > NEAR_TIE
    assert clear.mean() > 0.5
    for name in ("parent", "action", "visits", "best_action"):
        np.testing.assert_array_equal(getattr(other, name)[clear], getattr(found, name)[clear])
    np.testing.assert_allclose(other.policy[clear], found.policy[clear], atol=1e-5)


def test_the_only_considered_action_is_visited_however_low_its_prior() -> None:
    """Logits at the ends of float32, whose difference is not a float32: no action may be lost (mctx: max(-1e9, ...))."""
    problem = bandit(np.array([[0.0, 1.0]]), 2)
    problem.root_logits[:] = [[3e38, -3e38]]
    found = tree_search(problem, Settings(2))
    np.testing.assert_array_equal(found.visits, [[1, 1]])
    problem.root_logits[:] = [[0.0, -1e30]]
    found = tree_search(problem, Settings(2))
    np.testing.assert_array_equal(found.visits, [[1, 1]])
    assert np.isfinite(found.policy).all() and np.isfinite(found.q_values).all()


# --------------------------------------------------------------------------------------------------------------------
# A root's search is its own: batches, threads, reuse
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True])
def test_a_root_does_not_see_the_others_of_its_batch(sampled: bool) -> None:
    problem = random_problem(np.random.default_rng(9), 30, 24, 6, 2 if sampled else None)
    settings = Settings(6)
    together = tree_search(problem, settings)
    for roots in ([0], [17], [29, 3], np.random.default_rng(0).permutation(30)):
        rows = np.asarray(roots)
        assert_identical(tree_search(problem.take(rows), settings), Result(*(array[rows] for array in together)))


@pytest.mark.parametrize("sampled", [False, True])
def test_the_number_of_threads_changes_nothing(sampled: bool) -> None:
    problem = random_problem(np.random.default_rng(10), 1500, 16, 6, 2 if sampled else None, num_states=10)
    settings = Settings(6)
    alone = tree_search(problem, settings)
    for num_threads in (2, 4):
        assert_identical(tree_search(problem, settings, num_threads=num_threads), alone)


def test_trees_in_threads_of_their_own_do_not_disturb_each_other() -> None:
    problems = [random_problem(np.random.default_rng(seed), 200, 32, 6, num_states=10) for seed in range(4)]
    expected = [tree_search(problem, Settings(6)) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for found, alone in zip(pool.map(lambda problem: tree_search(problem, Settings(6)), problems), expected):
                assert_identical(found, alone)


def test_storage_is_what_was_promised() -> None:
    """The largest batch of the paper's state tasks: well below 60 MB, and nothing is added while searching."""
    tree = Tree(1536, 32, 16, 2, num_considered=16, discount=0.99)
    assert 1e6 < tree.nbytes < 10e6
    assert Tree(1536, 32, 16, 16, num_considered=16, discount=0.99).nbytes < 10e6
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 1536)).astype(np.float32)
    zeros = floats(1536, 16)

    def search() -> None:
        tree.reset(value, zeros, zeros)
        tree.select()
        for _ in range(32):
            tree.step(reward, value)
        tree.best_action(), tree.policy(), tree.root_value(), tree.visits(), tree.q_values(), tree.depth()

    for _ in range(3):
        search()
    before = resident_bytes()
    for _ in range(21):  # 1,032,192 simulations
        search()
    assert resident_bytes() - before < 2e6


def resident_bytes() -> int:
    """Memory of this process that is in use."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pytest.skip("needs /proc")


def test_more_threads_than_roots() -> None:
    problem = random_problem(np.random.default_rng(11), 3, 16, 6)
    assert_identical(tree_search(problem, Settings(6), num_threads=64), tree_search(problem, Settings(6)))


def test_storage_is_reused_by_batches_of_any_smaller_size() -> None:
    """Nothing of an earlier batch is left over, nor of one that was given up halfway."""
    settings = Settings(5)
    problem = random_problem(np.random.default_rng(12), 40, 20, 5)
    tree = make_tree(problem, settings)
    expected = tree_search(problem, settings)
    assert_identical(tree_search(problem, settings, tree=tree), expected)
    rows = np.arange(7, 20)
    assert_identical(tree_search(problem.take(rows), settings, tree=tree), Result(*(array[rows] for array in expected)))


def test_a_search_that_was_given_up_leaves_nothing() -> None:
    settings = Settings(5)
    problem = random_problem(np.random.default_rng(13), 10, 20, 5)
    expected = tree_search(problem, settings)
    tree = make_tree(problem, settings)
    numbers = np.linspace(-1e6, 1e6, 10, dtype=np.float32)
    for give_up_selected in (True, False):
        tree.reset(problem.root_value, problem.root_logits, problem.gumbel)
        for _ in range(5):
            tree.select()
            tree.backup(numbers, numbers, None)
        if give_up_selected:
            tree.select()
        assert_identical(tree_search(problem, settings, tree=tree), expected)


def test_inputs_are_left_alone_and_results_are_copies() -> None:
    settings = Settings(5)
    problem = random_problem(np.random.default_rng(14), 4, 6, 5)
    tree = make_tree(problem, settings)
    inputs = [problem.root_value.copy(), problem.root_logits.copy(), problem.gumbel.copy()]
    first = tree_search(problem, settings, tree=tree)
    kept = Result(*(array.copy() for array in first))
    for array, before in zip((problem.root_value, problem.root_logits, problem.gumbel), inputs, strict=True):
        np.testing.assert_array_equal(array, before)
        array[:] = 7.0  # the tree must have taken what it needs
    np.testing.assert_array_equal(tree.policy(), kept.policy)
    tree_search(random_problem(np.random.default_rng(15), 4, 6, 5), settings, tree=tree)
    assert_identical(first, kept)


# --------------------------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"num_roots": 4, "num_simulations": 3, "num_root_actions": 5, "num_inner_actions": 2}
OPTIONS: dict[str, Any] = {"num_considered": 5, "discount": 0.9}


def small_tree() -> Tree:
    return Tree(**SIZES, **OPTIONS)


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=np.float32)


def assert_says_something(error: Any) -> None:
    """One sentence of some length, in words of the caller."""
    text = str(error.value)
    assert 10 <= len(text) <= 200 and "\n" not in text, text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in [*SIZES, "num_considered", "num_threads"] for value in (0, -1)),
        *((name, value) for name in [*SIZES, "num_considered", "num_threads"] for value in (1.5, "3", None, True, 2**40)),
        *(("discount", value) for value in (-0.1, 1.1, float("nan"), float("inf"), "x", None)),
        *(("c_visit", value) for value in (-1.0, float("nan"), float("inf"), None)),
        *(("c_scale", value) for value in (-1.0, float("nan"), float("inf"), None)),
        *(("min_q_range", value) for value in (0.0, -1.0, float("nan"), float("inf"), None)),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        Tree(**{**SIZES, **OPTIONS, name: value})
    assert_says_something(error)
    if isinstance(error.value, ValueError):
        assert name in str(error.value)


def test_numpy_numbers_and_whole_discounts_are_accepted() -> None:
    sizes: dict[str, Any] = {name: np.int64(value) for name, value in SIZES.items()}
    options: dict[str, Any] = dict(num_considered=np.int32(5), discount=1, c_visit=np.float32(50), c_scale=1)
    tree = Tree(**sizes, **options, num_threads=np.int64(2))
    assert (tree.num_roots, tree.num_simulations, tree.num_root_actions, tree.num_inner_actions) == (4, 3, 5, 2)
    np.testing.assert_array_equal(considered_visits(np.int64(1), np.int64(2)), [0, 1])


def with_entry(entry: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(-1)[-1] = entry
        return array

    return change


BAD_ARRAYS: dict[str, Callable[[np.ndarray], Any]] = {
    "None": lambda array: None,
    "a list": lambda array: array.tolist(),
    "a scalar": lambda array: 0.0,
    "float64": lambda array: array.astype(np.float64),
    "float16": lambda array: array.astype(np.float16),
    "int32": lambda array: array.astype(np.int32),
    "big endian": lambda array: array.astype(">f4"),
    "no dimension": lambda array: np.zeros((), dtype=np.float32),
    "one dimension more": lambda array: array[..., None],
    "one root fewer": lambda array: array[:-1].copy(),
    "one root more": lambda array: np.concatenate([array, array[:1]]),
    "empty": lambda array: array[:0],
    "every second row": lambda array: np.repeat(array, 2, axis=0)[::2],
    "backwards": lambda array: array[::-1],
    "NaN": with_entry(float("nan")),
    "inf": with_entry(float("inf")),
    "-inf": with_entry(float("-inf")),
}
BAD_MATRICES: dict[str, Callable[[np.ndarray], Any]] = {
    **BAD_ARRAYS,
    "one action fewer": lambda array: array[:, :-1].copy(),
    "one action more": lambda array: np.concatenate([array, array[:, :1]], axis=1),
    "Fortran order": lambda array: np.asfortranarray(array),
    "flat": lambda array: array.reshape(-1),
}


@pytest.mark.parametrize(
    ("argument", "fault"),
    [("root_value", fault) for fault in BAD_ARRAYS]
    + [(name, fault) for name in ("root_logits", "gumbel") for fault in BAD_MATRICES],
)
def test_reset_refuses_bad_arrays(argument: str, fault: str) -> None:
    tree = small_tree()
    good = {"root_value": floats(3), "root_logits": floats(3, 5), "gumbel": floats(3, 5)}
    with pytest.raises((ValueError, TypeError)) as error:
        tree.reset(**{**good, argument: BAD_MATRICES[fault](good[argument])})
    assert_says_something(error)
    with pytest.raises(RuntimeError):
        tree.select()  # nothing was started
    tree.reset(**good)
    tree.select()


@pytest.mark.parametrize(
    ("argument", "fault"),
    [(name, fault) for name in ("reward", "value") for fault in BAD_ARRAYS]
    + [("logits", fault) for fault in BAD_MATRICES if fault != "None"],
)
def test_backup_refuses_bad_arrays_and_takes_good_ones_after(argument: str, fault: str) -> None:
    tree, untouched = small_tree(), small_tree()
    rng = np.random.default_rng(0)
    good = {
        "reward": rng.normal(size=3).astype(np.float32),
        "value": rng.normal(size=3).astype(np.float32),
        "logits": rng.normal(size=(3, 2)).astype(np.float32),
    }
    for one in (tree, untouched):
        one.reset(floats(3), floats(3, 5), floats(3, 5))
    for _ in range(3):
        tree.select()
        with pytest.raises((ValueError, TypeError)) as error:
            tree.backup(**{**good, argument: BAD_MATRICES[fault](good[argument])})
        assert_says_something(error)
        assert argument in str(error.value)
        tree.backup(**good)
        untouched.select()
        untouched.backup(**good)
    np.testing.assert_array_equal(tree.policy(), untouched.policy())
    np.testing.assert_array_equal(tree.root_value(), untouched.root_value())
    np.testing.assert_array_equal(tree.visits(), untouched.visits())


def test_a_batch_has_at_least_one_root_and_no_more_than_there_is_room_for() -> None:
    tree = small_tree()
    for roots in (0, 5, 1000):
        with pytest.raises(ValueError) as error:
            tree.reset(floats(roots), floats(roots, 5), floats(roots, 5))
        assert_says_something(error)


def test_calls_out_of_order_are_refused() -> None:
    tree = small_tree()
    outputs = [tree.best_action, tree.policy, tree.root_value, tree.visits, tree.q_values, tree.depth]
    for call in [tree.select, lambda: tree.backup(floats(3), floats(3)), *outputs]:
        with pytest.raises(RuntimeError) as error:
            call()
        assert_says_something(error)
    tree.reset(floats(3), floats(3, 5), floats(3, 5))
    with pytest.raises(RuntimeError) as error:
        tree.backup(floats(3), floats(3))
    assert_says_something(error)
    for _ in range(3):
        tree.select()
        with pytest.raises(RuntimeError) as error:
            tree.select()
        assert_says_something(error)
        tree.backup(floats(3), floats(3))
        with pytest.raises(RuntimeError):
            tree.backup(floats(3), floats(3))
    before = tree.visits()
    with pytest.raises(RuntimeError) as error:  # S simulations are done
        tree.select()
    assert_says_something(error)
    np.testing.assert_array_equal(tree.visits(), before)
    tree.reset(floats(2), floats(2, 5), floats(2, 5))
    tree.select()


def test_missing_and_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        Tree()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Tree(**SIZES, **OPTIONS, unknown=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Tree(4, 3, 5, 2, 5, 0.9)  # type: ignore[call-arg]  # the settings are keyword-only
    with pytest.raises(TypeError):
        Tree.__new__(Tree)
    tree = small_tree()
    with pytest.raises(TypeError):
        tree.reset()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        pickle.dumps(tree)  # a tree is scratch space: it is made anew, never saved
