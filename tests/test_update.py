"""One update: what it reads of the device, bfloat16, refreshed searches, and that nothing else needs numbers on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from common import BOX, TINY, SpacesEnv
from gymnasium import spaces
from test_losses import BOX as ACTIONS
from test_losses import DISCRETE, losses_of, make_data, make_network

from sb3_ezv2 import EZV2
from sb3_ezv2.inference import bfloat16_is_fast
from sb3_ezv2.losses import Losses
from sb3_ezv2.reanalyze import SearchCache
from sb3_ezv2.replay_buffer import SequenceReplayBuffer
from sb3_ezv2.search import SearchSettings

KINDS = pytest.mark.parametrize("space", [DISCRETE, ACTIONS], ids=["discrete", "box"])


def make(env: Any = "CartPole-v1", **settings: Any) -> EZV2:
    return EZV2("MlpPolicy", env, **{"seed": 0, **TINY, **settings})


def make_losses(**fields: th.Tensor) -> Losses:
    zero = th.zeros(())
    scalars = {name: zero for name in ("total", "reward", "policy", "value", "consistency", "observation", "entropy")}
    return Losses(**{**scalars, "value_error": th.tensor([0.5, 2.0]), **fields})


def test_read() -> None:
    errors, fault = make_losses().read(th.ones(()))
    assert errors.dtype == np.float32 and errors.tolist() == [0.5, 2.0] and fault is None
    nan = th.tensor(float("nan"))
    for field, name in (
        ("reward", "reward loss"),
        ("policy", "policy loss"),
        ("value", "value loss"),
        ("observation", "observation loss"),
        ("entropy", "policy's entropy"),
    ):
        assert make_losses(**{field: nan}).read(th.ones(()))[1] == name
    assert make_losses(value_error=th.tensor([0.5, float("inf")])).read(th.ones(()))[1] == "value error"
    assert make_losses().read(th.tensor(float("inf")))[1] == "gradient"
    assert make_losses(reward=nan, policy=nan).read(nan)[1] == "reward loss"


@KINDS
def test_nothing_in_the_losses_and_the_step_reads_the_device(space: spaces.Space) -> None:
    """The meta device has shapes but no numbers: what needs one on the host, or a shape that depends on one, fails."""
    network = make_network(space).to("meta")
    batch, targets = make_data(space)

    def to_meta(x: Any) -> Any:
        return x.to("meta") if isinstance(x, th.Tensor) else x

    batch, targets = type(batch)(*map(to_meta, batch)), type(targets)(*map(to_meta, targets))
    optimizer = th.optim.Adam(network.parameters(), foreach=True)
    losses = losses_of(network, batch, targets)
    losses.total.backward()
    norm = th.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    optimizer.step()
    assert losses.value_error.device.type == norm.device.type == "meta" and losses.value_error.shape == (6,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        losses.read(norm)


@KINDS
def test_losses_in_bfloat16(space: spaces.Space) -> None:
    """Close to those in float32, with float32 gradients in about the same direction."""
    batch, targets = make_data(space, size=32)
    results = []
    for bfloat16 in (False, True):
        network = make_network(space)
        losses = losses_of(network, batch, targets, bfloat16=bfloat16)
        losses.total.backward()
        assert all(x.dtype == th.float32 for x in losses)
        assert all(p.dtype == p.grad.dtype == th.float32 for p in network.parameters() if p.grad is not None)
        results.append((losses, th.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])))
    (exact, gradient), (rounded, other) = results
    assert not th.equal(exact.total, rounded.total)
    th.testing.assert_close(rounded.total, exact.total, rtol=0.03, atol=0.0)
    assert th.nn.functional.cosine_similarity(gradient, other, dim=0) > 0.99


def test_train_dtype() -> None:
    runs = {}
    for dtype in ("float32", "bfloat16"):
        model = make("Pendulum-v1", policy_kwargs={**TINY["policy_kwargs"], "train_dtype": dtype}).learn(60)
        assert model.policy.trains_in_bfloat16 == (dtype == "bfloat16" and bfloat16_is_fast())
        assert all(p.dtype == th.float32 for p in model.policy.parameters())
        runs[dtype] = th.cat([p.flatten() for p in model.policy.network.parameters()])
    assert th.equal(*runs.values()) != bfloat16_is_fast() and bool(th.isfinite(runs["bfloat16"]).all())
    with pytest.raises(ValueError, match="train_dtype must be"):
        make(policy_kwargs=dict(train_dtype="float16"))


def test_a_share_of_the_cache_is_searched_again() -> None:
    shares = {}
    for fraction in (0.0, 0.5, 1.0):
        model = make(cache_refresh_fraction=fraction, target_update_interval=1000).learn(60)
        reanalyzer, buffer = model._reanalyzer, model.replay_buffer
        assert reanalyzer is not None and buffer is not None
        batch = buffer.sequences(np.arange(5, 25))
        reanalyzer.targets(batch, 0, np.random.default_rng(0))  # now all are known
        _, stats = reanalyzer.targets(batch, 0, np.random.default_rng(1))
        unique = len(np.unique(batch.slots[batch.policy_mask.numpy()]))
        shares[fraction] = float(stats["search/searched_states"]) / unique
    assert shares[0.0] == 0 and shares[1.0] == 1 and 0.1 < shares[0.5] < 0.9
    with pytest.raises(ValueError, match="cache_refresh_fraction must be"):
        make(cache_refresh_fraction=1.5)
    with pytest.raises(ValueError, match="cache_refresh_fraction is of the searches"):
        make(cache_refresh_fraction=0.5, reanalyze_cache=False)


def test_memory_of_the_cache_is_said_and_checked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("Pendulum-v1", verbose=1, buffer_size=200_000).learn(1)
    assert "Search cache: 0.01 GB when full" in capsys.readouterr().out
    assert model._reanalyzer is not None and model._reanalyzer.cache is not None
    cache = model._reanalyzer.cache
    assert cache.candidates is not None
    arrays = (cache.versions, cache.stamps, cache.values, cache.policies, cache.candidates)
    assert cache.nbytes == sum(x.nbytes for x in arrays) == 200_000 * (2 * 8 + 4 + 4 * 4 * 2)
    monkeypatch.setattr("sb3_ezv2.validation.free_memory", lambda: 1000)
    buffer = SequenceReplayBuffer(100, BOX, DISCRETE)
    with pytest.raises(ValueError, match=r"search cache takes .* or give reanalyze_cache=False"):
        SearchCache(buffer, 4, None)


def test_searches_do_not_read_what_the_cache_knows() -> None:
    """A batch of known states makes no search, and its targets are those of the searches that were made."""
    model = make(SpacesEnv(BOX, spaces.Box(-1.0, 1.0, (2,), np.float32), length=20)).learn(60)
    reanalyzer, buffer = model._reanalyzer, model.replay_buffer
    assert reanalyzer is not None and buffer is not None and isinstance(reanalyzer.search.settings, SearchSettings)
    batch = buffer.sequences(np.arange(20, 30))
    first, _ = reanalyzer.targets(batch, 0, np.random.default_rng(0))
    again, stats = reanalyzer.targets(batch, 0, np.random.default_rng(1))
    assert stats["search/searched_states"] == 0
    assert th.equal(first.policies, again.policies) and first.candidates is not None and again.candidates is not None
    assert th.equal(first.candidates, again.candidates)
