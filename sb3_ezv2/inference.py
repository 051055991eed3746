"""
How a search evaluates its model: traced with batch norm folded for batches of any size, in C++ for small ones.

Both see the model's weights as they are when a search begins, however they were changed. The traced step shares the
model's tensors and folds batch norm anew for each search; the C++ model compares its sources with what it was made of.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ezv2.ctree import Mlp
from sb3_ezv2.distributions import CategoricalSupport
from sb3_ezv2.networks import Dynamics, Ezv2Network, Head, ResidualBlock, RunningNorm

_TRACING = threading.Lock()
"""Tracing a module uses state of the whole process."""

Step = Callable[[th.Tensor, th.Tensor], tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]]


class SearchModel(Protocol):
    """What the search needs of a model; see :class:`sb3_ezv2.networks.Ezv2Network`."""

    discrete: bool
    category_sizes: tuple[int, ...]
    action_dim: int
    state_dim: int
    training: bool
    reward_support: CategoricalSupport

    def initial_inference(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor, th.Tensor]: ...

    def recurrent_inference(
        self, state: th.Tensor, action: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]: ...

    def eval(self) -> Any: ...

    def state_dict(self) -> Mapping[str, th.Tensor]: ...


def bfloat16_is_fast() -> bool:
    """:return: whether the processor computes in bfloat16"""
    supported = getattr(th.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


class TracedModel:
    """
    A model's step, traced: in a small batch Python's share of the eager step is larger than the arithmetic.

    Models that cannot be traced, or are no modules, are evaluated eagerly.

    :param model: see :class:`SearchModel`
    :param bfloat16: matrix products in bfloat16 (autocast)
    """

    def __init__(self, model: SearchModel, bfloat16: bool = False):
        self.model = model
        self.bfloat16 = bfloat16
        self._watch: _Watch | None = None
        self._device: th.device | None = None
        self._folds: list[_Fold] = []
        self._step: Step = _Step(model)

    def step(self, state: th.Tensor, action: th.Tensor) -> Step:
        """
        The step with the weights as they are now, for the simulations of one search.

        :param state: [B, ...], an example
        :param action: int64 [B], int64 [B, D] or float [B, A], an example
        :return: from these two to the new states, rewards [B], values [B], and the output of the policy head
        """
        if self._watch is None or self._device != state.device or not self._watch.holds():
            self._trace(state, action)
        for fold in self._folds:
            fold.refresh()
        return self._step

    def _trace(self, state: th.Tensor, action: th.Tensor) -> None:
        self._watch, self._device, self._folds = _Watch([]), state.device, []
        autocast: Any = nullcontext()
        if self.bfloat16 and (state.device.type != "cpu" or bfloat16_is_fast()):
            autocast = th.autocast(state.device.type, dtype=th.bfloat16, cache_enabled=False)
        self._step = _Step(self.model, autocast)
        if not isinstance(self.model, nn.Module):
            return
        self._watch = _Watch([self.model])
        with _TRACING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                folded, folds = _fold_batch_norm(self.model)
                for fold in folds:
                    fold.refresh()
                with autocast:
                    folds = _used(folds, lambda: _StepModule(folded)(state, action))
                    traced = th.jit.trace(_StepModule(folded), (state, action), check_trace=False)
            except (RuntimeError, AttributeError, NotImplementedError, TypeError, ValueError):
                return
        self._folds, self._step = folds, traced


class _Step:
    """The step of a search, eagerly. :param model: see :class:`SearchModel` :param context: entered for each step"""

    def __init__(self, model: Any, context: Any = None):
        self.model = model
        self.context = nullcontext() if context is None else context

    def __call__(self, state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        with self.context:
            state, reward, value, policy = self.model.recurrent_inference(state, action)
        return state, reward.float(), value.float(), policy.float()


class _StepModule(nn.Module):
    """The same as a module, to be traced."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        return _Step(self.model)(state, action)


class _Fold:
    """
    A linear or convolutional layer that does the work of the batch norm after it.

    :param layer: the original
    :param norm: the batch norm
    """

    def __init__(self, layer: Any, norm: Any):
        self.layer, self.norm = layer, norm
        self.folded = copy.deepcopy(layer).requires_grad_(False)
        if self.folded.bias is None:
            self.folded.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)), requires_grad=False)

    @th.no_grad()
    def refresh(self) -> None:
        """Takes over the weights and statistics as they are now."""
        layer, norm = self.layer, self.norm
        scale = th.rsqrt(norm.running_var + norm.eps) * norm.weight
        th.mul(layer.weight, scale.view(-1, *[1] * (layer.weight.dim() - 1)), out=self.folded.weight)
        bias = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
        th.addcmul(norm.bias, bias, scale, out=self.folded.bias)


def _fold_batch_norm(model: nn.Module) -> tuple[nn.Module, list[_Fold]]:
    """
    :return: a copy of the model that shares its tensors but for the layers that are followed by a batch norm in a
        ``Sequential``; those layers
    """
    folded = copy.deepcopy(model, {id(x): x for x in [*model.parameters(), *model.buffers()]})
    folds = []
    for module in folded.modules():
        if type(module) is not nn.Sequential:
            continue
        for i in range(len(module) - 1):
            layer, norm = module[i], module[i + 1]
            pair = (type(layer), type(norm))
            if pair not in ((nn.Linear, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d)):
                continue
            if norm.affine and norm.track_running_stats:
                folds.append(_Fold(layer, norm))
                module[i], module[i + 1] = folds[-1].folded, nn.Identity()
    return folded, folds


def _used(folds: list[_Fold], function: Callable[[], Any]) -> list[_Fold]:
    """:return: those whose layers the function calls: a search does not need the projection"""
    called: list[nn.Module] = []
    handles = [fold.folded.register_forward_hook(lambda layer, *_: called.append(layer)) for fold in folds]
    function()
    for handle in handles:
        handle.remove()
    return [fold for fold in folds if any(fold.folded is layer for layer in called)]


class _Watch:
    """
    Tells whether modules still hold the same submodules and tensors, wherever these may have moved.

    :param modules: the modules
    """

    def __init__(self, modules: list[nn.Module]):
        self._entries: list[tuple[dict[str, Any], str, Any, int]] = []
        for root in modules:
            for module in root.modules():
                for part in (module._parameters, module._buffers):
                    self._entries += [(part, name, x, 0 if x is None else x.data_ptr()) for name, x in part.items()]
                self._entries += [(module._modules, name, x, 0) for name, x in module._modules.items()]

    def holds(self) -> bool:
        for owner, name, x, address in self._entries:
            if owner.get(name) is not x or (x is not None and address and x.data_ptr() != address):
                return False
        return True


class NativeModel:
    """
    The C++ model that has the weights of a :class:`sb3_ezv2.networks.Ezv2Network`, where that is what
    :mod:`sb3_ezv2.networks` builds for states and ``Discrete`` or ``Box`` actions, in float32 on the CPU.

    :param model: see :class:`SearchModel`
    """

    def __init__(self, model: SearchModel):
        self.model = model
        self._watch: _Watch | None = None
        self._mlp: Mlp | None = None

    def get(self) -> Mlp | None:
        """:return: the C++ model with the weights as they are now; None if there is none for this model"""
        model = self.model
        if type(model) is not Ezv2Network or model.category_sizes:
            return None
        if self._watch is None or not self._watch.holds() or (self._mlp is not None and not self._mlp.is_current()):
            parts = _searched_parts(model)
            # The model's own entries tell when one of the parts is replaced
            self._watch = _Watch(parts)
            self._watch._entries += [(model._modules, name, x, 0) for name, x in model._modules.items()]
            weights = export_weights(model)
            sources = [_array(x) for x in _tensors(parts)]
            self._mlp = None if weights is None else Mlp(weights, model.discrete, sources)
        return self._mlp


class HostCopy:
    """
    A copy in the host's memory, for :class:`NativeModel`, of a :class:`sb3_ezv2.networks.Ezv2Network` on a device. Its
    features extractor, which may be anybody's, is not kept up to date: the features are computed on the device.

    :param model: see :class:`SearchModel`
    """

    def __init__(self, model: SearchModel):
        self.model = model
        self._watch: _Watch | None = None
        self._copy: Ezv2Network | None = None
        self._flat: th.Tensor | None = None

    @th.no_grad()
    def get(self) -> Ezv2Network | None:
        """
        :return: the copy with the weights as they are now, in evaluation mode, the same object as long as the model has the
            same layers; None of models that have no C++ version
        """
        model = self.model
        if type(model) is not Ezv2Network or model.category_sizes:
            return None
        tensors = model.float_tensors()
        if any(x.dtype != th.float32 for x in tensors):
            return None
        if self._watch is None or not self._watch.holds():
            self._watch = self._copy = self._flat = None  # and so they stay if this is interrupted
            host = copy.deepcopy(model).cpu().eval()
            self._copy = None if export_weights(host) is None else host
            self._watch = _Watch([model])
        if self._copy is None:
            return None
        # One comparison on the device, and one transfer where something has changed
        flat = th.cat([x.flatten() for x in tensors])
        if self._flat is None or not th.equal(flat, self._flat):
            self._flat = None
            host_values = flat.cpu().split([x.numel() for x in tensors])
            for x, values in zip(self._copy.float_tensors(), host_values):
                x.copy_(values.view_as(x))
            self._flat = flat
        return self._copy


class _NotStockError(Exception):
    """A module is not what :mod:`sb3_ezv2.networks` builds."""


@th.no_grad()
def export_weights(model: Ezv2Network) -> dict[str, Any] | None:
    """
    :param model: in evaluation mode
    :return: the weights as :class:`sb3_ezv2.ctree.Mlp` takes them, batch norm folded: float32 arrays by the names of
        the parts; None if a part of the model is not what :mod:`sb3_ezv2.networks` builds for states, in float32 on the CPU
    """
    parts = _searched_parts(model)
    for x in _tensors(parts):
        if x.device.type != "cpu" or x.dtype != th.float32 or not x.is_contiguous():
            return None
    try:
        if any(x._forward_hooks or x._forward_pre_hooks for part in [model, *parts] for x in part.modules()):
            return None
        normalizer, dynamics = _expect(model.normalizer, RunningNorm), _expect(model.dynamics, Dynamics)
        represent, norm, _, *blocks = _layers(model.representation, nn.Linear, nn.LayerNorm, nn.Tanh, ...)
        embedding, embedding_norm, _ = _layers(dynamics.embedding, nn.Linear, nn.LayerNorm, nn.ReLU)
        joint_norm, joint_first, _, joint_second = _layers(dynamics.joint, nn.LayerNorm, nn.Linear, nn.ReLU, nn.Linear)
        return {
            "feature_mean": _array(normalizer.mean),
            "feature_std_inverse": _array(th.rsqrt(normalizer.var + 1e-5)),
            "represent": _linear(represent),
            "represent_norm": _norm(norm),
            "represent_blocks": [_block(x) for x in blocks],
            "embedding": _linear(embedding),
            "embedding_norm": _norm(embedding_norm),
            "joint_norm": _norm(joint_norm),
            "joint_first": _linear(joint_first),
            "joint_second": _linear(joint_second),
            "dynamics_blocks": [_block(x) for x in _layers(dynamics.tower, ...)],
            "reward_head": _head(model.reward_head),
            "value_head": _head(model.value_head),
            "policy_head": _head(model.policy_head),
            "reward_support": _support(model.reward_support),
            "value_support": _support(model.value_support),
        }
    except _NotStockError:
        return None


def _searched_parts(model: Ezv2Network) -> list[nn.Module]:
    parts = ("normalizer", "representation", "dynamics", "reward_head", "value_head", "policy_head")
    return [getattr(model, name) for name in (*parts, "reward_support", "value_support")]


def _tensors(parts: list[nn.Module]) -> list[th.Tensor]:
    return [x for part in parts for x in [*part.parameters(), *part.buffers()] if x.is_floating_point()]


def _array(x: th.Tensor) -> np.ndarray:
    """:return: float32, one-dimensional, of the same memory"""
    return x.detach().reshape(-1).numpy()


def _expect(module: Any, kind: type) -> Any:
    if type(module) is not kind:
        raise _NotStockError
    return module


def _layers(module: Any, *kinds: Any) -> list[Any]:
    """:return: the layers of a ``Sequential`` of these kinds; ``...``: then any number of residual blocks"""
    layers = list(_expect(module, nn.Sequential))
    if kinds[-1] is ...:
        kinds = (*kinds[:-1], *[ResidualBlock] * (len(layers) - len(kinds) + 1))
    if len(layers) != len(kinds):
        raise _NotStockError
    return [_expect(layer, kind) for layer, kind in zip(layers, kinds)]


def _linear(layer: nn.Linear, norm: nn.BatchNorm1d | None = None) -> tuple[np.ndarray, np.ndarray]:
    if layer.bias is None:
        raise _NotStockError
    if norm is not None:
        if not norm.affine or not norm.track_running_stats:
            raise _NotStockError
        fold = _Fold(layer, norm)
        fold.refresh()
        layer = fold.folded
    return layer.weight.detach().numpy(), _array(layer.bias)


def _norm(layer: nn.LayerNorm) -> tuple[np.ndarray, np.ndarray]:
    if layer.weight is None or layer.bias is None or layer.eps != 1e-5 or len(layer.normalized_shape) != 1:
        raise _NotStockError
    return _array(layer.weight), _array(layer.bias)


def _block(block: ResidualBlock) -> tuple[Any, Any, Any]:
    norm, first, _, second = _layers(block.branch, nn.LayerNorm, nn.Linear, nn.ReLU, nn.Linear)
    return _norm(norm), _linear(first), _linear(second)


def _head(head: Any) -> tuple[Any, Any, list[Any]]:
    _expect(head, Head)
    block, norm = _layers(head.trunk, ResidualBlock, nn.LayerNorm)
    *hidden, last = list(_expect(head.mlp, nn.Sequential))
    kinds = (nn.Linear, nn.BatchNorm1d, nn.ReLU)
    _layers(head.mlp, *kinds * (len(hidden) // 3), nn.Linear)
    layers = [_linear(hidden[i], hidden[i + 1]) for i in range(0, len(hidden), 3)]
    return _block(block), _norm(norm), [*layers, _linear(last)]


def _support(support: Any) -> tuple[np.ndarray, float, bool]:
    _expect(support, CategoricalSupport)
    return _array(support.bins), float(support.scale), support.spec.transform == "h"
