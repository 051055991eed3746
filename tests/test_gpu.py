"""
What a GPU must give: losses and searches of the CPU, the same run for the same seed, bfloat16 near float32, bounded memory.

Skipped where there is no CUDA device; by name: ``pytest -m gpu``.
"""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from common import TINY, SpacesEnv
from gymnasium import spaces
from test_losses import BOX, DISCRETE, losses_of, make_data, make_network

from sb3_ezv2 import EZV2
from sb3_ezv2.reanalyze import Reanalyzer
from sb3_ezv2.search import HOST_MAX_ROOTS, GumbelSearch, SearchSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not th.cuda.is_available(), reason="there is no CUDA device"),
]
KINDS = pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["discrete", "box"])
IMAGE = spaces.Box(0, 255, (3, 24, 24), np.uint8)
SIZES: dict[str, Any] = dict(channels=8, n_downsamples=3, head_channels=2, projection_dim=8, net_arch=[8])


def to_gpu(fields: Any) -> Any:
    """:param fields: a named tuple of tensors and arrays"""
    return fields._make(x.cuda() if isinstance(x, th.Tensor) else x for x in fields)


def run(env: Any, policy: str = "MlpPolicy", **settings: Any) -> EZV2:
    return EZV2(policy, env, **{"seed": 0, **TINY, "device": "cuda", **settings}).learn(80)


def weights(model: EZV2) -> th.Tensor:
    return th.cat([x.float().flatten() for x in model.policy.state_dict().values()])


@KINDS
def test_losses_and_gradients_are_those_of_the_cpu(space: spaces.Space) -> None:
    batch, targets = make_data(space, size=32)
    network = make_network(space)
    on_gpu = copy.deepcopy(network).cuda()
    expected, found = losses_of(network, batch, targets), losses_of(on_gpu, to_gpu(batch), to_gpu(targets))
    for name, a, b in zip(expected._fields, expected, found):
        th.testing.assert_close(b.cpu(), a, rtol=1e-3, atol=1e-4, msg=name)
    expected.total.backward()
    found.total.backward()
    for p, q in zip(network.parameters(), on_gpu.parameters()):
        if p.grad is not None:
            assert q.grad is not None
            th.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-2, atol=1e-4)


@KINDS
@pytest.mark.parametrize("roots", [3, 20, 100])
def test_a_search_is_that_of_the_cpu(space: spaces.Space, roots: int) -> None:
    """With the same noise; float32 rounds otherwise there, so that a few may choose otherwise where two choices tie."""
    network = make_network(space).eval()
    observations = th.from_numpy(np.random.default_rng(0).standard_normal((roots, 3), dtype=np.float32))
    settings = SearchSettings(n_simulations=16, n_sampled_actions=4)
    expected = GumbelSearch(network, settings).run(observations, np.random.default_rng(1))
    search = GumbelSearch(copy.deepcopy(network).cuda(), settings)
    found = search.run(observations.cuda(), np.random.default_rng(1))
    same = (found.action.cpu() == expected.action).float().mean()
    assert same >= 0.9
    assert all(x is None or x.device.type == "cuda" for x in found)
    assert search._searched_on_host == (roots <= HOST_MAX_ROOTS)
    assert th.isclose(found.value.cpu(), expected.value, rtol=1e-2, atol=1e-2).float().mean() >= 0.9


@KINDS
def test_a_search_on_the_host_sees_every_change(space: spaces.Space) -> None:
    network = make_network(space).eval().cuda()
    observations = th.randn(3, 3, generator=th.Generator().manual_seed(0)).cuda()
    search = GumbelSearch(network, SearchSettings(n_simulations=4, n_sampled_actions=4))
    before = search.run(observations, None).value
    assert th.equal(search.run(observations, None).value, before)
    with th.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    found = search.run(observations, None).value
    fresh = GumbelSearch(copy.deepcopy(network), search.settings).run(observations, None).value
    assert th.equal(found, fresh) and not th.equal(found, before) and search._searched_on_host


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_same_seed_same_run(env_id: str) -> None:
    assert th.equal(weights(run(env_id)), weights(run(env_id)))


@KINDS
def test_losses_in_bfloat16(space: spaces.Space) -> None:
    batch, targets = (to_gpu(x) for x in make_data(space, size=64))
    gradients = []
    for bfloat16 in (False, True):
        network = make_network(space).cuda()
        losses = losses_of(network, batch, targets, bfloat16=bfloat16)
        losses.total.backward()
        assert all(x.dtype == th.float32 for x in losses)
        gradients.append(th.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    exact, rounded = gradients
    assert rounded.dtype == th.float32 and not th.equal(exact, rounded)
    assert th.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.99


def test_one_read_per_update_between_the_losses_and_the_step() -> None:
    """CUDA itself tells of synchronisation: forward, backward, clipping and the optimizer do without."""
    batch, targets = (to_gpu(x) for x in make_data(DISCRETE, size=32))
    network = make_network(DISCRETE).cuda()
    optimizer = th.optim.Adam(network.parameters(), fused=True)
    losses_of(network, batch, targets).total.backward()  # libraries are loaded, workspaces allocated
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    th.cuda.set_sync_debug_mode("error")
    try:
        losses = losses_of(network, batch, targets)
        losses.total.backward()
        norm = th.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        with pytest.raises(RuntimeError, match="synchron"):
            losses.read(norm)
    finally:
        th.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("train_dtype", ["float32", "bfloat16"])
def test_images_train_and_memory_does_not_grow(train_dtype: str) -> None:
    sizes = dict(**SIZES, train_dtype=train_dtype)
    model = run(SpacesEnv(IMAGE, spaces.Discrete(3)), "CnnPolicy", policy_kwargs=sizes)
    th.cuda.synchronize()
    before = th.cuda.memory_allocated()
    th.cuda.reset_peak_memory_stats()
    model.learn(20, reset_num_timesteps=False)
    first = th.cuda.max_memory_allocated()
    model.learn(20, reset_num_timesteps=False)
    assert th.cuda.memory_allocated() <= 1.05 * before + 2**20
    assert th.cuda.max_memory_allocated() <= 1.05 * first + 2**20
    assert all(bool(th.isfinite(p).all()) for p in model.policy.parameters())


@pytest.mark.parametrize("settings", [dict(), dict(reanalyze_cache=False), dict(tau=1.0, gradient_steps=3)], ids=str)
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "images"])
def test_batches_made_ahead_on_a_stream_of_their_own_are_the_same(
    env_id: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those made in turn on the current stream, over refreshes of the target network."""
    searches, made = Reanalyzer.searches, []

    def spy(self: Reanalyzer, *args: Any) -> Any:
        made.append((threading.current_thread() is threading.main_thread(), th.cuda.current_stream()))
        return searches(self, *args)

    monkeypatch.setattr(Reanalyzer, "searches", spy)
    runs = []
    for thread in (False, None):
        made.clear()
        ahead = dict(reanalyze_ahead=True, reanalyze_thread=thread, **settings)
        if env_id == "images":
            model = run(SpacesEnv(IMAGE, spaces.Discrete(3)), "CnnPolicy", policy_kwargs=SIZES, **ahead)
        else:
            model = run(env_id, **ahead)
        of_thread = {stream for main, stream in made if not main}
        assert len(of_thread) == (thread is None) and th.cuda.current_stream() not in of_thread
        runs.append(weights(model))
    assert th.equal(*runs)


def test_a_batch_made_ahead_is_saved(tmp_path: Path) -> None:
    """On the CPU, and it goes on where the agent does."""
    model = EZV2("MlpPolicy", "CartPole-v1", **{"seed": 0, **TINY, "device": "cuda"}, reanalyze_ahead=True).learn(50)
    model.save_checkpoint(tmp_path / "agent")
    loaded = EZV2.load_checkpoint(tmp_path / "agent", env="CartPole-v1", device="cuda")
    one, two = (x.replay_buffer.prepared for x in (model, loaded))  # type: ignore[union-attr]
    assert one.batch.actions.is_cuda and not two.batch.actions.is_cuda
    for agent in (model, loaded):
        agent.learn(20, reset_num_timesteps=False)
    assert th.equal(weights(model), weights(loaded))
