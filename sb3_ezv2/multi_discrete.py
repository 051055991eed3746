"""
``MultiDiscrete`` and ``MultiBinary`` actions: a factorised policy, and the candidate actions that a search takes from it.

An action is one category for each of D dimensions, counted from 0. The policy head gives the logits of all dimensions one
after another. Shapes: B rows, K candidates at a root, M at other nodes, S simulations, L = sum of the dimensions' sizes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from torch.nn import functional as F

NEVER = -1e30
"""Logit of a category that there is not. Finite, so that 0 times a log-probability is 0."""

REPEATED = -1e9
"""Prior logit of a candidate that repeats another one of its node: the search has no reason to visit it."""


def category_sizes(space: spaces.Space) -> tuple[int, ...]:
    """:return: number of categories of each dimension; empty for a space that is neither MultiDiscrete nor MultiBinary"""
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(int(n) for n in space.nvec.reshape(-1))
    if isinstance(space, spaces.MultiBinary):
        return (2,) * int(np.prod(space.shape))
    return ()


def are_sampled(sizes: tuple[int, ...], n_candidates: int) -> bool:
    """:return: whether a root's candidates are a sample of the actions, because there are more than ``n_candidates``"""
    return math.prod(sizes) > n_candidates


def first_category(space: spaces.Space) -> np.ndarray | int:
    """:return: what the environment calls category 0: int64 [D] of ``MultiDiscrete``, its ``start``; otherwise 0"""
    return space.start.astype(np.int64) if isinstance(space, spaces.MultiDiscrete) else 0


class MultiCategorical:
    """
    Independent categorical distributions, one for each dimension of an action.

    :param logits: [..., L]
    :param sizes: categories of the D dimensions
    """

    def __init__(self, logits: th.Tensor, sizes: tuple[int, ...]):
        self.sizes = sizes
        most = max(sizes)
        if min(sizes) == most:
            padded = logits.unflatten(-1, (len(sizes), most))
        else:
            parts = [F.pad(part, (0, most - part.shape[-1]), value=NEVER) for part in logits.split(sizes, dim=-1)]
            padded = th.stack(parts, dim=-2)
        self.log_probs = F.log_softmax(padded, dim=-1)  # [..., D, largest size]

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """:param actions: int64 [..., D], broadcastable with the logits :return: [...] log-probabilities of whole actions"""
        shape = th.broadcast_shapes(self.log_probs.shape[:-1], actions.shape)
        log_probs = self.log_probs.expand(*shape, self.log_probs.shape[-1])
        return log_probs.gather(-1, actions.expand(shape).unsqueeze(-1)).squeeze(-1).sum(-1)

    def entropy(self) -> th.Tensor:
        """:return: [...] the exact entropy: the sum of those of the dimensions"""
        return -(self.log_probs.exp() * self.log_probs).sum((-2, -1))

    def mode(self) -> th.Tensor:
        """:return: int64 [..., D], the most probable action; of equally probable categories the first"""
        return self.log_probs.argmax(-1)

    def sample(self, uniform: th.Tensor) -> th.Tensor:
        """
        :param uniform: [..., D] in [0, 1), broadcastable with the logits
        :return: int64 [..., D], the categories at which the cumulated probabilities pass these numbers
        """
        below = self.log_probs.exp().cumsum(-1) <= uniform.unsqueeze(-1)
        # Rounding can leave the last cumulated probability below 1
        last = th.tensor(self.sizes, device=below.device) - 1
        return below.sum(-1).minimum(last)


def distinct_actions(
    logits: th.Tensor, sizes: tuple[int, ...], count: int, rng: np.random.Generator | None
) -> tuple[th.Tensor, th.Tensor]:
    """
    Draw actions without replacement from a factorised policy, in the order in which they are drawn; without noise, the most
    probable ones in the order of their probabilities.

    This is Gumbel-top-k by stochastic beam search (Kool et al. 2019, https://arxiv.org/abs/1903.06059): dimension by
    dimension the ``count`` best prefixes are kept, by log-probabilities that carry Gumbel noise. It is exact, takes the
    same number of random numbers whatever the policy, and never lists all actions.

    :param logits: [B, L]
    :param sizes: categories of the D dimensions
    :param count: number of actions, at most as many as there are
    :param rng: of the noise; None: no noise
    :return: int64 [B, count, D]; their log-probabilities [B, count]
    """
    rows = len(logits)
    actions = th.zeros(rows, 1, 0, dtype=th.int64, device=logits.device)
    log_prob = score = logits.new_zeros(rows, 1)
    for part in logits.split(sizes, dim=-1):
        size = part.shape[-1]
        joint = log_prob.unsqueeze(-1) + F.log_softmax(part, dim=-1).unsqueeze(1)  # [B, prefixes, size]
        longer = joint
        if rng is not None:
            noise = rng.gumbel(size=joint.shape).astype(np.float32)
            longer = _with_maximum(joint + th.from_numpy(noise).to(joint.device), score.unsqueeze(-1))
        # Stable: among equals the first, whatever the batch
        order = longer.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :count]
        score, log_prob = longer.flatten(1).gather(1, order), joint.flatten(1).gather(1, order)
        prefixes = actions.gather(1, (order // size).unsqueeze(-1).expand(-1, -1, actions.shape[-1]))
        actions = th.cat([prefixes, (order % size).unsqueeze(-1)], dim=-1)
    return actions, log_prob


def _with_maximum(gumbels: th.Tensor, maximum: th.Tensor) -> th.Tensor:
    """
    Gumbel variables given what their maximum is (Kool et al. 2019, App. B.3, in its stable form).

    :param gumbels: [..., n] drawn without that condition
    :param maximum: [..., 1]
    :return: [..., n], in the same order
    """
    below = gumbels - gumbels.amax(-1, keepdim=True)
    v = maximum - gumbels + th.log1p(-below.exp())
    return maximum - v.clamp(min=0) - th.log1p(th.exp(-v.abs()))


class RootCandidates(NamedTuple):
    """
    :param actions: int64 [B, K, D], all different
    :param logits: [B, K], prior logits
    :param gumbel: float32 [B, K], noise of the root's choices
    """

    actions: th.Tensor
    logits: th.Tensor
    gumbel: np.ndarray


class MultiDiscreteCandidates:
    """
    The candidate actions of a search.

    Where there are no more actions than candidates, all actions are candidates with their log-probabilities as prior logits,
    and the search is that of ``Discrete`` actions. Otherwise they are sampled as those of ``Box`` actions are (EfficientZero
    V2 4.2.1), but without replacement, since a repeated candidate would take a part of the simulations and tell nothing new.

    :param sizes: categories of the D dimensions
    :param n_root: candidates at the root, silently at most the number of actions
    :param n_inner: candidates at the other nodes, the same
    :param policy_fraction: share of the root candidates drawn from the policy (one at least), the rest from its flattened
        version
    :param flat_std_scale: c; a Gaussian with c times the standard deviation is proportional to p^(1/c^2), so the flattened
        version has its logits divided by c^2
    """

    def __init__(self, sizes: tuple[int, ...], n_root: int, n_inner: int, policy_fraction: float, flat_std_scale: float):
        self.sizes = sizes
        self.num_actions = math.prod(sizes)
        self.n_root = min(n_root, self.num_actions)
        self.n_inner = min(n_inner, self.num_actions)
        self.from_policy = max(1, round(policy_fraction * self.n_root))
        self.temperature = flat_std_scale**2

    @property
    def dimensions(self) -> int:
        """D"""
        return len(self.sizes)

    def at_root(self, policy: th.Tensor, rng: np.random.Generator | None) -> RootCandidates:
        """
        :param policy: [B, L] output of the policy head
        :param rng: of the candidates, and of the Gumbel noise where all actions are candidates; None: no noise, and otherwise
            the most probable actions
        """
        rows = len(policy)
        gumbel = np.zeros((rows, self.n_root), np.float32)
        if self.n_root == self.num_actions:
            if rng is not None:
                gumbel = rng.gumbel(size=gumbel.shape).astype(np.float32)
            actions = self._all_actions(policy.device).expand(rows, -1, -1)
            return RootCandidates(actions, self._log_prob(policy, actions), gumbel)
        equal = policy.new_zeros(rows, self.n_root)
        if rng is None:
            return RootCandidates(distinct_actions(policy, self.sizes, self.n_root, None)[0], equal, gumbel)
        own, _ = distinct_actions(policy, self.sizes, self.from_policy, rng)
        if self.from_policy == self.n_root:
            return RootCandidates(own, equal, gumbel)
        flat, _ = distinct_actions(policy / self.temperature, self.sizes, self.n_root, rng)
        # Those that the policy has given already are left out: what follows them was drawn without them
        known = (flat.unsqueeze(2) == own.unsqueeze(1)).all(-1).any(-1)  # [B, K]
        new = known.int().sort(dim=1, stable=True).indices[:, : self.n_root - self.from_policy]
        flat = flat.gather(1, new.unsqueeze(-1).expand(-1, -1, self.dimensions))
        return RootCandidates(th.cat([own, flat], dim=1), equal, gumbel)

    def inner_noise(self, n_simulations: int, n_roots: int, rng: np.random.Generator | None) -> th.Tensor:
        """:return: uniform numbers [S, B, M, D], or without ``rng`` fixed ones [S, 1, M, D], the same for every root"""
        rows = 1 if rng is None else n_roots
        rng = np.random.default_rng(0) if rng is None else rng
        return th.from_numpy(rng.random((n_simulations, rows, self.n_inner, self.dimensions), dtype=np.float32))

    def at_node(self, policy: th.Tensor, noise: th.Tensor, out: th.Tensor) -> th.Tensor:
        """
        Candidates of new nodes: samples of the policy. Equal ones become one whose prior is the sum of theirs.

        :param policy: [B, L] output of the policy head
        :param noise: [B or 1, M, D], of :meth:`inner_noise`
        :param out: int64 [B * M, D], is filled
        :return: prior logits [B, M]
        """
        if self.n_inner == self.num_actions:
            actions = self._all_actions(policy.device).expand(len(policy), -1, -1)
            logits = self._log_prob(policy, actions)
        else:
            actions = MultiCategorical(policy.unsqueeze(1), self.sizes).sample(noise)  # [B, M, D]
            same = (actions.unsqueeze(2) == actions.unsqueeze(1)).all(-1)  # [B, M, M]
            first = ~same.tril(-1).any(-1)
            logits = th.where(first, same.sum(-1).float().log(), REPEATED)
        out.copy_(actions.flatten(0, 1))
        return logits

    def _all_actions(self, device: th.device) -> th.Tensor:
        """:return: int64 [1, all, D]"""
        indices = np.indices(self.sizes).reshape(self.dimensions, -1).T
        return th.from_numpy(indices).to(device).unsqueeze(0)

    def _log_prob(self, policy: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return MultiCategorical(policy.unsqueeze(1), self.sizes).log_prob(actions)
