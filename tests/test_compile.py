"""Training with a compiled model: what it computes, where it cannot be compiled, and what is saved of it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from common import TINY, SpacesEnv
from gymnasium import spaces
from test_losses import BOX, DISCRETE, losses_of, make_data, make_network
from torch._dynamo.backends.common import aot_autograd

from sb3_ezv2 import EZV2
from sb3_ezv2.losses import Losses
from sb3_ezv2.networks import Ezv2Network
from sb3_ezv2.unroll import CompiledOutputs, model_outputs

MIXED = spaces.Dict(camera=spaces.Box(0, 255, (3, 16, 16), np.uint8), speed=spaces.Box(-1, 1, (3,), np.float32))
IMAGE_SIZES: dict[str, Any] = dict(channels=4, n_downsamples=2, head_channels=2, projection_dim=4, net_arch=[8])


@pytest.fixture()
def backend(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The whole model is one graph that runs without code made for it, which takes seconds. :return: arguments of the calls"""
    calls, compile_ = [], th.compile

    def spy(function: Any, **arguments: Any) -> Any:
        calls.append(arguments)
        return compile_(function, dynamic=arguments["dynamic"], fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(th, "compile", spy)
    th._dynamo.reset()
    return calls


def make(
    compiled: str | None, policy: str = "MlpPolicy", env: Any = "Pendulum-v1", prefix: bool = False, **settings: Any
) -> EZV2:
    sizes = dict(IMAGE_SIZES if policy != "MlpPolicy" else TINY["policy_kwargs"], train_compile=compiled)
    if prefix:
        sizes, settings = dict(sizes, value_prefix=True, lstm_dim=8), dict(settings, unroll_steps=5)
    return EZV2(policy, env, **{"seed": 0, **TINY, "policy_kwargs": sizes, **settings})


def gradient_of(losses: Losses, network: Ezv2Network) -> th.Tensor:
    losses.total.backward()
    return th.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def weights(model: EZV2) -> th.Tensor:
    return th.cat([x.float().flatten() for x in model.policy.network.state_dict().values()])


@pytest.mark.parametrize(
    "space, bfloat16",
    [(DISCRETE, False), (BOX, True), (spaces.MultiDiscrete([2, 3]), False)],
    ids=["discrete", "box-bfloat16", "multi"],
)
def test_losses_gradients_and_statistics_are_the_same(space: spaces.Space, bfloat16: bool, backend: list[Any]) -> None:
    if isinstance(space, spaces.MultiDiscrete):
        network = make_network(space)
        batch, targets = make_data(DISCRETE, size=6)
        batch = batch._replace(actions=th.stack([batch.actions % 2, batch.actions % 3], -1))
        targets = targets._replace(candidates=th.zeros(*targets.policies.shape, 2, dtype=th.long))
    else:
        network = make_network(space)
        batch, targets = make_data(space, size=6)
    other = pickle.loads(pickle.dumps(network))
    expected = losses_of(network, batch, targets, bfloat16=bfloat16)
    outputs = CompiledOutputs("default")
    found = losses_of(other, batch, targets, bfloat16=bfloat16, outputs=outputs)
    assert outputs._function is not model_outputs
    for name, x, y in zip(expected._fields, expected, found):
        th.testing.assert_close(x, y, rtol=3e-2 if bfloat16 else 1e-4, atol=1e-5, msg=name)
    gradient, its_gradient = gradient_of(expected, network), gradient_of(found, other)
    if bfloat16:  # rounds otherwise in other places
        assert th.nn.functional.cosine_similarity(gradient, its_gradient, dim=0) > 0.999
    else:
        th.testing.assert_close(its_gradient, gradient, rtol=1e-3, atol=1e-5)
    for x, y in zip(network.buffers(), other.buffers()):
        th.testing.assert_close(x, y)


@pytest.mark.parametrize("kind", ["states", "observation_coef", "value_prefix", "images", "dict"])
def test_an_agent_learns_the_same(kind: str, backend: list[Any]) -> None:
    """In one graph, without a break."""
    arguments: dict[str, Any] = {}
    if kind == "observation_coef":
        arguments = dict(observation_coef=2.0)
    elif kind == "value_prefix":
        arguments = dict(prefix=True)
    elif kind != "states":
        space = MIXED if kind == "dict" else MIXED["camera"]
        arguments = dict(policy="MultiInputPolicy" if kind == "dict" else "CnnPolicy", env=SpacesEnv(space, DISCRETE))
    plain, compiled = make(None, **arguments).learn(54), make("reduce-overhead", **arguments).learn(54)
    outputs = compiled.policy.outputs
    assert compiled._n_updates > 2 and isinstance(outputs, CompiledOutputs)
    assert outputs._function not in (None, model_outputs)  # it has not fallen back
    assert backend == [dict(dynamic=False, mode="reduce-overhead")]
    th.testing.assert_close(weights(compiled), weights(plain), rtol=1e-3, atol=1e-4)


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    th._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    model = make("default")
    with pytest.warns(UserWarning, match="cannot be compiled here and is trained without") as caught:
        model.learn(54)
    assert sum("train_compile" in str(x.message) for x in caught) == 1
    assert th.equal(weights(model), weights(make(None).learn(54)))


def test_without_a_backward_pass_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fails only there does so at once, and not in the middle of an update."""

    def fails(*_: Any) -> None:
        raise RuntimeError("no code for this")

    compile_, only_forward = th.compile, aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=fails)
    monkeypatch.setattr(th, "compile", lambda function, **_: compile_(function, dynamic=False, backend=only_forward))
    th._dynamo.reset()
    model = make("default")
    with pytest.warns(UserWarning, match="cannot be compiled here and is trained without"):
        model.learn(54)
    assert model._n_updates > 2 and model.policy.outputs._function is model_outputs  # type: ignore[attr-defined]


def test_it_is_a_setting_that_is_saved(tmp_path: Path, backend: list[Any]) -> None:
    model = make("max-autotune").learn(54)
    model.save(tmp_path / "agent")
    loaded = EZV2.load(tmp_path / "agent", env="Pendulum-v1")
    assert isinstance(loaded.policy.outputs, CompiledOutputs) and loaded.policy.outputs.mode == "max-autotune"
    copied = pickle.loads(pickle.dumps(model.policy))
    assert copied.outputs.mode == "max-autotune" and copied.outputs._function is None
    model.save_replay_buffer(tmp_path / "buffer")
    loaded.load_replay_buffer(tmp_path / "buffer")
    for agent in (model, loaded):
        agent.learn(10, reset_num_timesteps=False)
    assert bool(th.isfinite(weights(loaded)).all())
    with pytest.raises(ValueError, match="train_compile must be None or one of default, reduce-overhead"):
        make("fast")
