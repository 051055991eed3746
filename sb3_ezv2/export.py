"""
The policy head alone as a module of PyTorch, for deployments without search: ``torch.export`` and TorchScript.

A trained policy that searches needs no export: ``model.policy.save(path)`` and ``MlpPolicy.load(path).predict`` do without
environment and replay buffer.
"""

from __future__ import annotations

import copy
import io
import os
import pathlib
import warnings
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ezv2.base_policy import Ezv2Policy
from sb3_ezv2.multi_discrete import first_category
from sb3_ezv2.observations import apply

FORMATS = ("torch.export", "torchscript")


class PolicyHead(nn.Module):
    """
    From observations to the actions that ``policy.predict(obs, deterministic=True, n_simulations=0)`` gives, with nothing but
    PyTorch: preprocessing, representation, policy head and the scaling to the environment's bounds.

    A copy of the weights as they are now, on the CPU and without gradients.

    :param policy: of a trained agent: ``model.policy``, or one that was loaded
    :raises TypeError: it is no policy of EZV2
    """

    first: th.Tensor
    low: th.Tensor
    high: th.Tensor

    def __init__(self, policy: Ezv2Policy):
        super().__init__()
        if not isinstance(policy, Ezv2Policy):
            raise TypeError(f"the policy of an EZV2 agent is needed (model.policy), not {type(policy).__name__}.")
        network = copy.deepcopy(policy.averaged_network).cpu().requires_grad_(False).eval()
        self.network = network
        space = policy.action_space
        self.box = isinstance(space, spaces.Box)
        self.shape: tuple[int, ...] = ()
        if isinstance(space, spaces.Box):
            self.shape = space.shape
            self.register_buffer("low", th.as_tensor(space.low).clone())
            self.register_buffer("high", th.as_tensor(space.high).clone())
        else:
            first, self.dtype = first_category(space), th.from_numpy(np.zeros(0, space.dtype)).dtype
            if isinstance(space, spaces.Discrete):
                first, self.dtype = int(space.start), th.int64
            self.register_buffer("first", th.as_tensor(first).clone())

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: [B, ...] of the dtype of the policy's observation space and in its layout: images with channels first. A
            dictionary of such tensors for ``Dict`` spaces
        :return: int64 [B], with the space's own start; [B, D] of a MultiDiscrete or MultiBinary space, with its start and
            dtype; or [B, ...] of a Box space's shape, within its bounds
        """
        action = self.network.mode(self.network.policy_head(self.network.represent(obs)))
        if not self.box:
            return (action + self.first).to(self.dtype)
        action = action.unflatten(1, self.shape) if len(self.shape) != 1 else action
        return self.low + (0.5 * (action + 1.0) * (self.high - self.low))


def example_observations(space: spaces.Space, batch: int = 2) -> Any:
    """
    :param space: of the observations
    :param batch: how many
    :return: [batch, ...] tensors of zeros of the space's dtypes, or a dictionary of them: a shape to export with
    """
    if isinstance(space, spaces.Dict):
        return {key: example_observations(member, batch) for key, member in space.spaces.items()}
    return th.from_numpy(np.zeros((batch, *(space.shape or ())), space.dtype))


def export_policy_head(
    policy: Ezv2Policy, path: str | os.PathLike[str] | io.BufferedIOBase, format: str = "torch.export"
) -> None:
    """
    Write :class:`PolicyHead` to a file that needs neither this package nor Stable-Baselines3 to run::

        export_policy_head(model.policy, "head.pt2")
        head = torch.export.load("head.pt2").module()  # "torchscript": torch.jit.load("head.pt")
        actions = head(torch.as_tensor(observations))

    The batch may have any size. What ``VecNormalize`` does to observations is not part of the policy.

    :param policy: of a trained agent: ``model.policy``, or one that was loaded
    :param path: the file to write
    :param format: ``"torch.export"`` (by custom a file ``.pt2``) or ``"torchscript"`` (``.pt``), which also runs from C++
    :raises TypeError: the policy is none of EZV2
    :raises ValueError: an unknown format
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, not {format!r}.")
    head = PolicyHead(policy)
    obs = example_observations(policy.observation_space)
    target: Any = os.fspath(path) if isinstance(path, pathlib.PurePath) else path
    if format == "torch.export":
        batch = th.export.Dim("batch", min=1)
        program = th.export.export(head, (obs,), dynamic_shapes=(apply(lambda _: {0: batch}, obs),), strict=False)
        th.export.save(program, target)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is not developed further, and that preprocessing checks types
        th.jit.save(th.jit.trace(head, (obs,), check_trace=False), target)
