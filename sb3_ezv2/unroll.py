"""What an update asks of the model: all heads over the unrolled states, and the observed states to compare them with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch._functorch import config as functorch_config

from sb3_ezv2.networks import BaseNetwork
from sb3_ezv2.observations import apply

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Of :func:`torch.compile`."""


class Outputs(NamedTuple):
    """
    Of B sequences with U unroll steps, step by step: row u * B + b is step u of sequence b. Float32, or bfloat16 if so wanted.

    :param value: [(U + 1) * B, bins]
    :param reward: [U, B, bins]
    :param policy: [(U + 1) * B, outputs]
    :param predicted: [U * B, P], what the predictor makes of the imagined states' projections
    :param observed: [U * B, P], the observed states' projections, without a gradient
    :param observations: [U * B, F], predicted from the imagined states, of a network with an ``observation_head``
    """

    value: th.Tensor
    reward: th.Tensor
    policy: th.Tensor
    predicted: th.Tensor
    observed: th.Tensor
    observations: th.Tensor | None


ModelOutputs = Callable[[BaseNetwork, PyTorchObs, th.Tensor, bool], Outputs]


def later_observations(observations: Any) -> Any:
    """:param observations: [B, U + 1, ...], or a dictionary :return: [U * B, ...], step by step, without the first ones"""
    return apply(lambda x: x[:, 1:].transpose(0, 1).flatten(0, 1), observations)


def unroll(network: BaseNetwork, observations: Any, actions: th.Tensor) -> th.Tensor:
    """
    :param network: the online model
    :param observations: [B, U + 1, ...], or a dictionary of such tensors
    :param actions: [B, U, ...]
    :return: states [U + 1, B, ...] from the first observations and the actions alone. The gradient through the state is
        halved at the start of every step of the dynamics, so that it does not grow with the length of the unroll.
    """
    state = network.represent(apply(lambda x: x[:, 0], observations))
    states = [state]
    for step in range(actions.shape[1]):
        state = network.dynamics_step(0.5 * state + 0.5 * state.detach(), actions[:, step])
        states.append(state)
    return th.stack(states)


def model_outputs(network: BaseNetwork, observations: Any, actions: th.Tensor, bfloat16: bool = False) -> Outputs:
    """
    :param network: the online model, in training mode
    :param observations: [B, U + 1, ...], or a dictionary of such tensors
    :param actions: [B, U, ...]
    :param bfloat16: matrix products and convolutions in bfloat16 (autocast)
    :return: see :class:`Outputs`
    """

    def autocast() -> Any:
        return th.autocast(actions.device.type, dtype=th.bfloat16) if bfloat16 else nullcontext()

    # What follows is observed before the unroll, whose activations are not alive yet, and under an autocast of its own, which
    # would else hand the weights that it has cast without gradients to the unroll.
    with th.no_grad(), autocast():
        observed = network.project(network.represent(later_observations(observations)))
    with autocast():
        states = unroll(network, observations, actions)  # [U + 1, B, ...]
        flat, later = states.flatten(0, 1), states[1:].flatten(0, 1)
        return Outputs(
            value=network.value_head(flat),
            reward=network.reward_logits(states[1:]),
            policy=network.policy_head(flat),
            predicted=network.projection_predictor(network.project(later)),
            observed=observed,
            observations=None if network.observation_head is None else network.observation_head(later),
        )


class CompiledOutputs:
    """
    :func:`model_outputs` by :func:`torch.compile`: compiled at the first update, for a minute or so, and for each size of a
    batch anew; of one process, PyTorch compiles eight and evaluates others eagerly (its ``recompile_limit``). Where it fails,
    for want of a C++ compiler for instance, a warning says so and nothing is compiled.

    :param mode: one of :data:`COMPILE_MODES`
    """

    def __init__(self, mode: str):
        self.mode = mode
        self._function: ModelOutputs | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"mode": self.mode, "_function": None}  # compiled code is made again

    def __call__(self, network: BaseNetwork, observations: Any, actions: th.Tensor, bfloat16: bool = False) -> Outputs:
        if self._function is None:
            self._function = th.compile(model_outputs, dynamic=False, mode=self.mode)
        th.compiler.cudagraph_mark_step_begin()
        try:
            # The backward pass is compiled here, too, not when it is needed, where a failure would end the training
            with functorch_config.patch(force_non_lazy_backward_lowering=True):
                return self._function(network, observations, actions, bfloat16)
        except th._dynamo.exc.ShortenTraceback as error:  # of a compiler that fails or is missing, Triton's as well
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"train_compile: the model cannot be compiled here and is trained without ({reason})", stacklevel=2)
            self._function = model_outputs
            return model_outputs(network, observations, actions, bfloat16)
