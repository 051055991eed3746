"""Batches made ahead of their update: what they are, and that a thread that makes them changes nothing."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from common import BOX, SpacesEnv, make, weights
from gymnasium import spaces
from resume_tools import digest
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import sb3_ezv2.ezv2 as algorithm
from sb3_ezv2 import EZV2, ahead
from sb3_ezv2.ahead import preparing_next
from sb3_ezv2.reanalyze import Reanalyzer
from sb3_ezv2.search import GumbelSearch

ACTIONS: dict[str, spaces.Space] = {"discrete": spaces.Discrete(3), "box": spaces.Box(-1.0, 1.0, (2,), np.float32)}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())  # other tests' libraries may have left some
    yield
    assert set(threading.enumerate()) <= before


def make_ahead(kind: str = "discrete", n_envs: int = 1, **settings: Any) -> EZV2:
    """:param kind: a key of :data:`ACTIONS` :return: an agent whose replay buffer soon is full"""
    env = VecNormalize(DummyVecEnv([lambda: SpacesEnv(BOX, ACTIONS[kind], truncates=kind == "box")] * n_envs))
    prepares = dict(reanalyze_ahead=True, td_steps=5, mixed_value_start=10, fresh_transitions=20)
    short = dict(buffer_size=45, learning_starts=20, target_update_interval=12)
    return make(env, **{**prepares, **short, **settings})


def pending(model: EZV2) -> Any:
    assert model.replay_buffer is not None
    return model.replay_buffer.prepared


def state(model: EZV2) -> dict[str, Any]:
    """:return: all that a run has made, by names"""
    assert model.replay_buffer is not None and model._reanalyzer is not None
    if model._reanalyzer.cache is None:
        parts: dict[str, Any] = {"generators": repr([g.bit_generator.state for g in (model._generators or {}).values()])}
        return {**parts, "weights": weights(model).tolist(), "priorities": model.replay_buffer.weights.tolist()}
    return digest(model)


class Spy:
    """
    Who calls a method, and in what order.

    :param patch: of pytest
    :param owners: pairs of a class or module and a name
    """

    def __init__(self, patch: pytest.MonkeyPatch, *owners: tuple[Any, str]):
        self.calls: list[tuple[str, bool]] = []  # name, in the main thread
        for owner, name in owners:
            patch.setattr(owner, name, self._wrap(name, getattr(owner, name)))

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, threading.current_thread() is threading.main_thread()))
            return function(*args, **kwargs)

        return wrapper

    def threads(self, name: str) -> set[bool]:
        return {main for called, main in self.calls if called == name}


# --------------------------------------------------------------------------------------------------------------------
# The thread changes nothing
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        dict(gradient_steps=2),
        dict(n_envs=3, gradient_steps=-1, reanalyze_cache=False),
        dict(tau=1.0, cache_refresh_fraction=0.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ACTIONS)
def test_same_run_with_and_without_a_thread(kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over refreshes of the target network, a buffer that is overwritten, and a second learn()."""
    spy = Spy(monkeypatch, (Reanalyzer, "searches"))
    states = []
    for thread in (False, True):
        spy.calls = []
        model = make_ahead(kind, reanalyze_thread=thread, **settings).learn(50)
        model.learn(12, reset_num_timesteps=False)
        assert model._n_updates > 3 * 12 and model.replay_buffer.written.max() > model.replay_buffer.ring  # type: ignore[union-attr]
        assert spy.threads("searches") == ({True, False} if thread else {True})
        states.append(state(model))
    assert [name for name in states[0] if states[0][name] != states[1][name]] == []


def test_the_thread_runs_while_the_update_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update waits for the search to begin, and the search for the end of the backward pass."""
    model = make_ahead(reanalyze_thread=True, reanalyze_cache=False, target_update_interval=1000).learn(21)
    begun, backward = threading.Event(), threading.Event()
    overlapped = []
    search, clip = GumbelSearch.run, th.nn.utils.clip_grad_norm_

    def run(self: GumbelSearch, *args: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            overlapped.append(backward.wait(20))
        return search(self, *args)

    def clip_grad_norm(*args: Any) -> Any:
        overlapped.append(begun.wait(20))
        backward.set()
        return clip(*args)

    monkeypatch.setattr(GumbelSearch, "run", run)
    monkeypatch.setattr(th.nn.utils, "clip_grad_norm_", clip_grad_norm)
    model.learn(1, reset_num_timesteps=False)
    assert overlapped == [True, True]


def test_on_the_cpu_there_is_no_thread_if_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch, (Reanalyzer, "searches"))
    make_ahead().learn(26)
    assert spy.threads("searches") == {True}


@pytest.mark.parametrize("fails", [False, True])
def test_order_of_the_streams(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins: the new stream waits for what is queued, and the thread for the new stream."""
    calls: list[Any] = []

    class Stream:
        def __init__(self, index: int):
            self.device = th.device("cuda", index)

        def wait_stream(self, other: str) -> None:
            calls.append(f"wait for {other}")

        def synchronize(self) -> None:
            calls.append("synchronize")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        calls.append("on")
        yield
        calls.append("off")

    def work() -> Any:
        calls.append("work")
        assert not fails
        return "batch"

    monkeypatch.setattr(ahead, "_stream", Stream)
    monkeypatch.setattr(th.cuda, "stream", on)
    monkeypatch.setattr(th.cuda, "current_stream", lambda device: f"that of {device}")
    run = ahead._on_own_stream(work, th.device("cuda", 1))
    assert calls == ["wait for that of cuda:1"]
    calls.clear()
    if fails:
        with pytest.raises(AssertionError):
            run()
        assert calls == ["on", "work", "synchronize"]
    else:
        assert run() == "batch" and calls == ["on", "work", "off", "synchronize"]  # type: ignore[comparison-overlap]


# --------------------------------------------------------------------------------------------------------------------
# What the batches are
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thread", [False, True])
def test_a_batch_is_drawn_without_the_priorities_of_the_update_before(thread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_ahead(reanalyze_thread=thread, gradient_steps=2, target_update_interval=5).learn(24)
    assert model._n_updates == 8 and model.replay_buffer is not None and pending(model) is not None
    buffer = type(model.replay_buffer)
    spy = Spy(monkeypatch, (buffer, "take_fresh"), (buffer, "draw"), (algorithm, "compute_losses"))
    monkeypatch.setattr(model, "_update_priorities", lambda *args: spy.calls.append(("priorities", True)))
    model.train(4, 16)
    draw, losses, priorities = "draw", "compute_losses", "priorities"
    assert [name for name, _ in spy.calls] == [
        "take_fresh",
        # update 9 has a batch, and draws that of update 10
        *(draw, losses, priorities),
        # update 10 refreshes the target network: update 11 draws its batch itself, with all priorities
        *(losses, priorities),
        *(draw, draw, losses, priorities),
        *(draw, losses, priorities),
    ]
    assert pending(model) is not None


def test_it_is_a_setting_of_its_own() -> None:
    """Another run than the one that draws with all priorities, and off by default."""
    plain = make_ahead(reanalyze_ahead=False).learn(30)
    assert pending(plain) is None
    other = make_ahead().learn(30)
    assert pending(other) is not None and not th.equal(weights(plain), weights(other))
    # the first batch of all is the same
    plain, other = make_ahead(reanalyze_ahead=False).learn(21), make_ahead().learn(21)
    assert plain._n_updates == 1 and th.equal(weights(plain), weights(other))


def test_targets_of_a_prepared_batch_are_those_of_the_moment() -> None:
    """n-step values follow the bootstrap network, searches are those that were made."""
    model = make_ahead(value_target="td").learn(30)
    reanalyzer, prepared = model._reanalyzer, pending(model)
    assert reanalyzer is not None
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    first, stats = reanalyzer.targets(prepared.batch, 0, rng, prepared.searches)
    with th.no_grad():
        for x in model.policy.bootstrap_network.value_head.parameters():
            x.add_(0.1)
    second, _ = reanalyzer.targets(prepared.batch, 0, rng, prepared.searches)
    assert not th.equal(first.values, second.values) and th.equal(first.policies, second.policies)
    assert (
        rng.bit_generator.state == before and "target/td_value" in stats and "target/td_value" not in prepared.searches.stats
    )


def test_priorities_of_what_was_overwritten_are_left_alone() -> None:
    """The buffer has 45 slots, of which 15 and more are overwritten between the updates."""
    model = make_ahead(
        train_freq=15, gradient_steps=2, learning_starts=50, target_update_interval=1000, priority_alpha=1.0
    ).learn(105)
    buffer, prepared = model.replay_buffer, pending(model)
    assert buffer is not None
    model.learn(15, reset_num_timesteps=False)  # the batch that was prepared is the first to be learned from
    assert (buffer.stamps[prepared.batch.slots[:, 0]] != prepared.stamps).any()
    there = buffer.stamps >= 0
    newest = buffer.stamps.max()
    final = there & (buffer.kinds != 0)
    assert not buffer.weights[final].any() and not buffer.weights[buffer.stamps == newest].any()
    sampleable = np.flatnonzero(buffer.weights)
    assert (buffer.stamps[sampleable] < buffer.waiting[sampleable // buffer.ring]).all()
    # by hand: one that is still there, one that was overwritten, one that is not to be sampled
    buffer.weights[:] = 0
    buffer.weights[[3, 4]] = 7
    stamps = buffer.stamps[[3, 4, 5]] - [0, buffer.ring, 0]
    buffer.update_priorities(np.array([3, 4, 5]), np.array([2.0, 2.0, 2.0]), stamps)
    assert buffer.weights[[3, 4, 5]] == pytest.approx([2, 7, 0], abs=1e-5)


def test_what_drops_a_prepared_batch(tmp_path: Path) -> None:
    model = make_ahead(target_update_interval=1000).learn(30)
    assert model.replay_buffer is not None
    # another size
    prepared = pending(model)
    model.train(1, 8)
    assert len(pending(model).stamps) == 8 and pending(model) is not prepared
    model.train(1, 16)
    # other weights
    assert pending(model) is not None
    model.set_parameters(model.get_parameters())
    assert pending(model) is None
    model.train(1, 16)
    # a buffer of another agent: the batch goes, as the remembered searches do
    model.save_replay_buffer(tmp_path / "replay")
    other = make_ahead(seed=1)
    other.load_replay_buffer(tmp_path / "replay")
    assert pending(other) is not None
    other._setup_learn(10)
    assert pending(other) is None
    other.learn(10)
    # another buffer
    model.load_replay_buffer(tmp_path / "replay")
    assert pending(model) is not None
    model.replay_buffer.reset()
    assert pending(model) is None


@pytest.mark.parametrize("cache", [True, False])
def test_a_prepared_batch_is_saved_with_the_buffer(cache: bool, tmp_path: Path) -> None:
    """Also by a buffer that was loaded and belongs to no agent yet."""
    settings = dict(reanalyze_cache=cache, reanalyze_thread=True)
    model = make_ahead("box", **settings).learn(30)
    model.save_checkpoint(tmp_path / "agent")
    env = VecNormalize(DummyVecEnv([lambda: SpacesEnv(BOX, ACTIONS["box"], truncates=True)]))
    loaded = EZV2.load_checkpoint(tmp_path / "agent", env=env, device="cpu")
    assert loaded.replay_buffer is not None
    loaded.replay_buffer = pickle.loads(pickle.dumps(loaded.replay_buffer))
    one, two = pending(model), pending(loaded)
    assert all(th.equal(a, b) for a, b in zip(one.searches.roots, two.searches.roots)) and two.made_by == one.made_by
    loaded._setup_learn(10, reset_num_timesteps=False)
    assert pending(loaded) is two
    for agent in (model, loaded):
        agent.learn(16, reset_num_timesteps=False)
    assert th.equal(weights(model), weights(loaded))


# --------------------------------------------------------------------------------------------------------------------
# When something goes wrong
# --------------------------------------------------------------------------------------------------------------------


def spoil_next_search(error: BaseException, patch: pytest.MonkeyPatch) -> None:
    """The batch that is made ahead next cannot be searched."""

    def fail(*args: Any) -> Any:
        patch.undo()
        raise error

    patch.setattr(Reanalyzer, "searches", fail)


@pytest.mark.parametrize("thread", [False, True])
def test_an_error_of_the_batch_is_raised_after_the_update(thread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_ahead(reanalyze_thread=thread, gradient_steps=3).learn(30)
    before = model._n_updates
    spoil_next_search(ValueError("the model's outputs cannot be searched"), monkeypatch)
    with pytest.raises(ValueError, match="outputs cannot be searched") as caught:
        model.learn(5, reset_num_timesteps=False)
    assert any(entry.name == "fail" for entry in caught.traceback)  # where it was raised
    assert model._n_updates == before + 1 and pending(model) is None and not model.policy.network.training
    model.learn(4, reset_num_timesteps=False)
    # the two that were left of the step, and those of four more
    assert model._n_updates == before + 1 + 2 + 12 and pending(model) is not None


def test_an_error_of_the_update_goes_before_one_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And both ways the generators are left where they were."""
    states = []
    for thread in (False, True):
        model = make_ahead(reanalyze_thread=thread, target_update_interval=1000).learn(30)
        for update in (11, 14):  # the one that failed is made by the next learn()
            handle = next(model.policy.network.dynamics.parameters()).register_hook(lambda gradient: gradient * float("inf"))
            if update == 14:
                spoil_next_search(ZeroDivisionError(), monkeypatch)
            with pytest.raises(ValueError, match=f"update {update} at step .*: the gradient is NaN or infinite"):
                model.train(1, 16)
            handle.remove()
            assert pending(model) is None
            model.learn(2, reset_num_timesteps=False)
        states.append(state(model))
    assert states[0] == states[1]


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_ahead(reanalyze_thread=True).learn(30)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        model.train(1, 16)
    monkeypatch.undo()
    model.train(1, 16)


@pytest.mark.parametrize("when", ["update", "wait"])
@pytest.mark.parametrize("count", [1, 2])
def test_ctrl_c(when: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within an update whose next batch is being searched, or while it is waited for. The second raises at once."""
    threads = set(threading.enumerate())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    model = make_ahead(reanalyze_thread=True, reanalyze_cache=False, gradient_steps=3, target_update_interval=1000).learn(30)
    searches, clip, updates = Reanalyzer.searches, th.nn.utils.clip_grad_norm_, model._n_updates
    begun, release = threading.Event(), threading.Event()

    def interrupt() -> None:
        for _ in range(count):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # two at a time are one

    def slow_searches(self: Reanalyzer, *args: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert release.wait(20)
            if when == "wait":
                interrupt()
        return searches(self, *args)

    def clip_grad_norm(*args: Any) -> Any:
        assert begun.wait(20)
        release.set()
        if when == "update":
            interrupt()
        return clip(*args)

    monkeypatch.setattr(Reanalyzer, "searches", slow_searches)
    monkeypatch.setattr(th.nn.utils, "clip_grad_norm_", clip_grad_norm)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.learn(5, reset_num_timesteps=False)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert set(threading.enumerate()) <= threads
    complete = count == 1 or when == "wait"
    assert model._n_updates == updates + complete and (pending(model) is not None) == (count == 1)
    assert not model.policy.network.training and model.num_timesteps == 31
    model.learn(5, reset_num_timesteps=False)
    assert all(bool(th.isfinite(x).all()) for x in model.policy.parameters())


def test_leaving_the_context_waits_for_the_batch() -> None:
    threads, model = set(threading.enumerate()), make_ahead(reanalyze_thread=True).learn(30)
    assert model._reanalyzer is not None and model._generators is not None
    rng = model._generators["reanalyze"]
    with pytest.raises(LookupError):
        with preparing_next(model._reanalyzer, 16, model.get_vec_normalize_env(), rng, True):
            raise LookupError
    assert set(threading.enumerate()) <= threads
