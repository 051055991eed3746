"""The driver, which does all of a simulation but the model's step, against the same done by single calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_search import BOX, DISCRETE, SETTINGS, assert_same, identical, make_network, observations

from sb3_ezv2.ctree import Driver, Tree, sample_actions
from sb3_ezv2.search import GumbelSearch

Outputs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass
class Batch:
    """B searches with a model of random matrices; A = 0: discrete actions."""

    B: int
    S: int
    K: int
    M: int
    A: int
    D: int
    considered: int
    shared_noise: bool = False
    ties: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)

        def draw(*shape: int) -> np.ndarray:
            return rng.normal(size=shape).astype(np.float32)

        self.roots, self.root_value, self.root_logits = draw(self.B, self.D), draw(self.B), draw(self.B, self.K)
        self.gumbel, self.candidates = draw(self.B, self.K), np.tanh(draw(self.B * self.K, max(self.A, 1)))
        self.noise = draw(self.S, 1 if self.shared_noise else self.B, self.M, max(self.A, 1))
        self.outputs = self.M if self.A == 0 else 2 * self.A
        self.weights = draw(self.D + max(self.A, 1), self.D + 2 + self.outputs)
        if self.ties:
            self.root_value, self.root_logits, self.gumbel = (
                np.round(x) for x in (self.root_value, self.root_logits, self.gumbel)
            )

    def model(self, states: np.ndarray, actions: np.ndarray) -> Outputs:
        """Row by row, so that a row's result does not depend on the others'."""
        inputs = np.concatenate([states, actions.reshape(len(states), -1).astype(np.float32)], axis=1)
        out = np.stack([np.tanh((row[:, None] * self.weights).sum(0)) for row in inputs]).astype(np.float32)
        if self.ties:
            out[:, self.D :] = np.round(2 * out[:, self.D :])
        parts = out[:, : self.D], out[:, self.D], out[:, self.D + 1], out[:, self.D + 2 :]
        return tuple(np.ascontiguousarray(x) for x in parts)  # type: ignore[return-value]

    def tree(self, num_threads: int = 1) -> Tree:
        tree = Tree(self.B, self.S, self.K, self.M, num_considered=self.considered, discount=0.9, num_threads=num_threads)
        tree.reset(self.root_value, self.root_logits, self.gumbel)
        tree.select()
        return tree

    def arrays(self) -> dict[str, Any]:
        states = np.zeros(((self.S + 1) * self.B, self.D), np.float32)
        states[: self.B] = self.roots
        arrays: dict[str, Any] = dict(states=states, leaf_states=np.zeros((self.B, self.D), np.float32))
        if self.A > 0:
            actions = np.zeros((self.B * (self.K + self.S * self.M), self.A), np.float32)
            actions[: self.B * self.K] = self.candidates
            arrays |= dict(actions=actions, leaf_actions=np.zeros((self.B, self.A), np.float32), noise=self.noise, limit=0.9)
        return arrays

    def take(self, rows: np.ndarray) -> Batch:
        """The same searches of some of the roots."""
        part = dataclasses.replace(self, B=len(rows))
        for name in ("roots", "root_value", "root_logits", "gumbel"):
            setattr(part, name, getattr(self, name)[rows])
        part.candidates = self.candidates.reshape(self.B, self.K, -1)[rows].reshape(len(rows) * self.K, -1)
        part.noise = self.noise if self.shared_noise else np.ascontiguousarray(self.noise[:, rows])
        part.weights = self.weights
        return part


def results(tree: Tree) -> list[np.ndarray]:
    return [tree.best_action(), tree.policy(), tree.root_value(), tree.visits(), tree.q_values(), tree.depth()]


def drive(batch: Batch, num_threads: int = 1, level: int = 2) -> list[np.ndarray]:
    tree, arrays = batch.tree(num_threads), batch.arrays()
    driver = Driver(tree, **arrays, level=level)
    for _ in range(batch.S):
        actions = tree.action if batch.A == 0 else arrays["leaf_actions"]
        driver.step(*batch.model(arrays["leaf_states"], actions))
    return results(tree)


def by_single_calls(batch: Batch) -> list[np.ndarray]:
    tree, arrays = batch.tree(), batch.arrays()
    states, B, K, M = arrays["states"], batch.B, batch.K, batch.M
    for s in range(batch.S):
        actions = tree.action if batch.A == 0 else arrays["actions"][tree.edge]
        new, reward, value, policy = batch.model(states[tree.parent], actions)
        states[(s + 1) * B : (s + 2) * B] = new
        if batch.A > 0:
            out = arrays["actions"][B * (K + s * M) : B * (K + (s + 1) * M)]
            sample_actions(policy, batch.noise[s], 0.9, out, level=0)
        tree.step(reward, value, policy if batch.A == 0 else None)
    return results(tree)


def assert_identical(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for x, y in zip(found, expected):
        np.testing.assert_array_equal(x, y)


def check_any_batch(data: Any) -> None:
    discrete = data.draw(st.booleans(), label="discrete")
    K = data.draw(st.integers(1, 20), label="K")
    batch = Batch(
        B=data.draw(st.integers(1, 70), label="B"),
        S=data.draw(st.integers(1, 25), label="S"),
        K=K,
        M=K if discrete else data.draw(st.integers(1, 5), label="M"),
        A=0 if discrete else data.draw(st.integers(1, 19), label="A"),
        D=data.draw(st.integers(1, 40), label="D"),
        considered=data.draw(st.integers(1, 25), label="considered"),
        shared_noise=data.draw(st.booleans(), label="shared"),
        ties=data.draw(st.booleans(), label="ties"),
        seed=data.draw(st.integers(0, 2**32 - 1), label="seed"),
    )
    assert_identical(drive(batch, level=data.draw(st.integers(0, 2), label="level")), by_single_calls(batch))


@hypothesis_settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_batch_is_driven_as_by_single_calls(data: Any) -> None:
    check_any_batch(data)


@pytest.mark.slow
@hypothesis_settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_thousands_of_batches_are_driven_as_by_single_calls(data: Any) -> None:
    check_any_batch(data)


@pytest.mark.parametrize("dims", [0, 3])
def test_neither_threads_nor_the_batch_change_a_result(dims: int) -> None:
    batch = Batch(B=1100, S=6, K=5, M=5 if dims == 0 else 2, A=dims, D=7, considered=4)
    alone = drive(batch)
    for num_threads in (2, 3):
        assert_identical(drive(batch, num_threads), alone)
    rows = np.array([1099, 3, 700])
    assert_identical(drive(batch.take(rows)), [x[rows] for x in alone])


@pytest.mark.parametrize("level", [0, 1])
def test_every_instruction_set_samples_the_same(level: int) -> None:
    rng = np.random.default_rng(0)
    params = (rng.normal(size=(333, 22)) * rng.choice([0.01, 1.0, 300.0], size=(333, 1))).astype(np.float32)
    noise = rng.normal(size=(333, 3, 11)).astype(np.float32)
    one, two = np.zeros((2, 999, 11), np.float32)
    sample_actions(params, noise, 0.999, one)
    sample_actions(params, noise, 0.999, two, level=level)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["discrete", "box"])
@pytest.mark.parametrize("seed", [None, 3])
def test_the_search_on_other_devices_is_the_same(space: Any, seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the states are not float32 on the CPU, PyTorch does what the driver does."""
    monkeypatch.setattr("sb3_ezv2.search.NATIVE_MAX_ROOTS", 0)
    network, obs = make_network(space), observations(9)

    def run() -> Any:
        return GumbelSearch(network, SETTINGS).run(obs, None if seed is None else np.random.default_rng(seed))

    driven = run()
    with monkeypatch.context() as patch:
        patch.setattr(GumbelSearch, "_simulate_on_cpu", GumbelSearch._simulate)
        other = run()
    if space is DISCRETE:
        assert identical(driven, other)
    assert_same(driven, other)


# --------------------------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------------------------

SMALL = Batch(B=4, S=3, K=5, M=2, A=3, D=6, considered=5)
FLAT = Batch(B=4, S=3, K=5, M=5, A=0, D=6, considered=5)


def good_step(batch: Batch) -> dict[str, Any]:
    zeros = np.zeros(4, np.float32)
    states, policy = np.ones((4, 6), np.float32), np.zeros((4, batch.outputs), np.float32)
    return dict(new_states=states, reward=zeros, value=zeros, policy=policy)


FAULTS: dict[str, Callable[[np.ndarray], Any]] = {
    "rows": lambda x: np.concatenate([x, x]),
    "fewer rows": lambda x: np.ascontiguousarray(x[:-1]),
    "one more axis": lambda x: x[..., None].repeat(2, -1),
    "double": lambda x: x.astype(np.float64),
    "integer": lambda x: x.astype(np.int32),
    "strided": lambda x: np.repeat(x, 2, axis=0)[::2],
    "list": lambda x: x.tolist(),
    "tensor": lambda x: th.from_numpy(np.ascontiguousarray(x)),
    "none": lambda x: None,
}


@pytest.mark.parametrize("batch", [SMALL, FLAT], ids=["box", "discrete"])
@pytest.mark.parametrize("fault", [*FAULTS, "nan", "inf"])
@pytest.mark.parametrize("name", ["new_states", "reward", "value", "policy"])
def test_bad_outputs_of_the_model_change_nothing(name: str, fault: str, batch: Batch) -> None:
    tree, arrays = batch.tree(), batch.arrays()
    driver = Driver(tree, **arrays)
    before = {key: np.copy(x) for key, x in arrays.items()}
    step = good_step(batch)
    if fault in ("nan", "inf"):
        if name == "new_states":  # the model's own: what it makes of them will be seen
            return
        bad = step[name].copy()
        bad.reshape(-1)[-1] = float(fault)
    else:
        bad = FAULTS[fault](step[name])
    with pytest.raises(ValueError) as error:
        driver.step(**{**step, name: bad})
    assert name in str(error.value) and 20 < len(str(error.value)) < 200
    for key, x in arrays.items():
        np.testing.assert_array_equal(x, before[key])
    for _ in range(3):
        driver.step(**step)
    assert tree.visits().sum() == 12


@pytest.mark.parametrize("name", ["states", "leaf_states", "actions", "leaf_actions", "noise"])
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_pools_are_refused(name: str, fault: str) -> None:
    arrays = SMALL.arrays()
    if fault == "strided" and name == "noise":
        bad: Any = np.repeat(arrays[name], 2, axis=3)[..., ::2]
    else:
        bad = FAULTS[fault](arrays[name])
    with pytest.raises((ValueError, TypeError)) as error:
        Driver(SMALL.tree(), **{**arrays, name: bad})
    assert 10 < len(str(error.value)) < 200


def test_widths_that_do_not_belong_together_are_refused() -> None:
    arrays = SMALL.arrays()
    for name, shape in (
        ("leaf_states", (4, 5)),
        ("leaf_actions", (4, 2)),
        ("actions", (44, 2)),
        ("noise", (3, 2, 2, 3)),
        ("noise", (3, 4, 1, 3)),
        ("noise", (2, 4, 2, 3)),
        ("noise", (3, 4, 2, 4)),
    ):
        with pytest.raises(ValueError, match="shape"):
            Driver(SMALL.tree(), **{**arrays, name: np.zeros(shape, np.float32)})
    arrays["states"].flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        Driver(SMALL.tree(), **arrays)


def test_calls_out_of_order_are_refused() -> None:
    tree = Tree(4, 3, 5, 2, num_considered=5, discount=0.9)
    with pytest.raises(RuntimeError, match="reset"):
        Driver(tree, **SMALL.arrays())
    tree = SMALL.tree()
    driver = Driver(tree, **SMALL.arrays())
    driver.step(**good_step(SMALL))
    with pytest.raises(RuntimeError, match="reset"):  # a search goes on with its own driver
        Driver(tree, **SMALL.arrays())
    for _ in range(2):
        driver.step(**good_step(SMALL))
    with pytest.raises(RuntimeError, match="last simulation"):
        driver.step(**good_step(SMALL))
    one = np.zeros((1, 5), np.float32)
    tree.reset(one[:, 0].copy(), one, one)  # a smaller batch
    tree.select()
    with pytest.raises(RuntimeError, match="otherwise"):
        driver.step(**good_step(SMALL))
    with pytest.raises(TypeError):
        Driver(None, **SMALL.arrays())  # type: ignore[arg-type]
