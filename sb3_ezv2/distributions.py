"""Distributions of the model's outputs: scalars as categories over bins, actions as squashed Gaussians."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

MAX_ACTION = 0.999
"""Scaled Box actions are kept within +-MAX_ACTION, where the inverse of tanh is harmless."""


class SupportSpec(NamedTuple):
    """
    What a scalar head can express.

    :param limit: largest absolute value, in the units of the rewards (times the reward scale, if there is one)
    :param bins: number of bins, odd, so that one of them is 0
    :param transform: ``"h"``: bins uniform in h(x) = sign(x)(sqrt(|x| + 1) - 1) + 0.001x, a scalar is the inverse of the
        mean bin (MuZero, EfficientZero); ``"symexp"``: bins uniform in symlog(x) = sign(x) log(|x| + 1), a scalar is
        the mean of the bins themselves (DreamerV3), so that the mean of a random target is met without bias
    """

    limit: float
    bins: int
    transform: str


DEFAULT_VALUE_SUPPORT = SupportSpec(18_000.0, 301, "h")
"""Bins at about the integers of h from -150 to 150, in units of the reward scale."""

DEFAULT_REWARD_SUPPORT = SupportSpec(22025.0, 101, "symexp")
"""symlog +-10 in bins of 0.2, in units of the reward scale: random rewards are learned without bias."""


def symlog(x: th.Tensor) -> th.Tensor:
    """sign(x) log(|x| + 1), of any shape."""
    return th.sign(x) * th.log1p(th.abs(x))


def symexp(x: th.Tensor) -> th.Tensor:
    """Inverse of :func:`symlog`."""
    return th.sign(x) * th.expm1(th.abs(x))


def h_transform(x: th.Tensor) -> th.Tensor:
    """h(x) = sign(x)(sqrt(|x| + 1) - 1) + 0.001x, of any shape (EfficientZero's value and reward scaling)."""
    # sqrt(y) - 1 = (y - 1) / (sqrt(y) + 1): exact for small x, where the difference would lose its digits
    return x / (th.sqrt(th.abs(x) + 1) + 1) + 0.001 * x


def h_inverse(x: th.Tensor) -> th.Tensor:
    """Inverse of :func:`h_transform`, of any shape."""
    eps = 0.001
    # The root of eps*r^2 + r - (|x| + 1 + eps) with r = sqrt(|y| + 1), in float64: it cancels near 0
    y = th.abs(x).double()
    root = (th.sqrt(1 + 4 * eps * (y + 1 + eps)) - 1) / (2 * eps)
    return (th.sign(x) * (root * root - 1)).to(x.dtype)


class CategoricalSupport(nn.Module):
    """
    Scalars as two-hot categories over fixed bins (EfficientZero V2 App. G; DreamerV3 for ``"symexp"``).

    The bins are symmetric around 0, and :meth:`decode` sums them in pairs, so that equal logits are exactly 0. All scalars
    are divided by :attr:`scale`, a buffer that is 1 until it is set: what the bins mean travels with the weights.

    :param spec: see :class:`SupportSpec`; any sequence of its three fields
    :raises ValueError: a limit that is not positive, a number of bins that is not odd or below 3, an unknown transform
    """

    bins: th.Tensor
    scale: th.Tensor

    def __init__(self, spec: SupportSpec):
        super().__init__()
        try:
            limit, bins, transform = spec
        except (TypeError, ValueError):
            raise ValueError(f"a support is (limit, bins, transform), for instance (299.0, 51, 'h'), not {spec!r}") from None
        if not isinstance(limit, (int, float)) or not 1e-30 <= limit <= 1e30:
            raise ValueError(f"a support's limit must be a positive number (1e-30 to 1e30), not {limit!r}")
        if not isinstance(bins, int) or bins < 3 or bins % 2 == 0:
            raise ValueError(f"a support needs an odd number of bins, at least 3, not {bins!r}")
        if transform not in ("h", "symexp"):
            raise ValueError(f"a support's transform must be 'h' or 'symexp', not {transform!r}")
        self.spec = SupportSpec(float(limit), bins, transform)
        forward = h_transform if transform == "h" else symlog
        top = forward(th.tensor(limit, dtype=th.float64))
        half = th.linspace(0, float(top), bins // 2 + 1, dtype=th.float64)[1:]
        if transform == "symexp":
            half = symexp(half)
        self.register_buffer("bins", th.cat([-half.flip(0), half.new_zeros(1), half]).float())
        self.register_buffer("scale", th.ones(()))

    @property
    def size(self) -> int:
        """Number of bins."""
        return self.spec.bins

    @property
    def limit(self) -> th.Tensor:
        """Largest absolute value that can be expressed, in the units of the rewards; scalar tensor."""
        return self.spec.limit * self.scale

    def encode(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: [...] scalars in the units of the rewards; beyond the limit they are clipped
        :return: [..., bins] two-hot weights that sum to one, with :meth:`decode_probs` as inverse
        """
        x = x / self.scale
        if self.spec.transform == "h":
            x = h_transform(x)
        x = x.clamp(self.bins[0], self.bins[-1])
        upper = th.searchsorted(self.bins, x.contiguous(), right=True).clamp(1, self.size - 1)
        lower = upper - 1
        low, high = self.bins[lower], self.bins[upper]
        weight = (x - low) / (high - low)
        out = th.zeros(*x.shape, self.size, dtype=x.dtype, device=x.device)
        out.scatter_(-1, lower.unsqueeze(-1), (1 - weight).unsqueeze(-1))
        out.scatter_(-1, upper.unsqueeze(-1), weight.unsqueeze(-1))
        return out

    def decode_probs(self, probs: th.Tensor) -> th.Tensor:
        """
        :param probs: [..., bins] weights that sum to one
        :return: [...] scalars in the units of the rewards
        """
        half = self.size // 2
        # Pairs of bins first: weights that are symmetric give exactly 0, whatever the rounding of a long sum
        x = ((probs[..., half + 1 :] - probs[..., :half].flip(-1)) * self.bins[half + 1 :]).sum(-1)
        if self.spec.transform == "h":
            x = h_inverse(x)
        return x * self.scale

    def decode(self, logits: th.Tensor) -> th.Tensor:
        """
        :param logits: [..., bins]
        :return: [...] scalars in the units of the rewards
        """
        return self.decode_probs(F.softmax(logits, dim=-1))

    def cross_entropy(self, logits: th.Tensor, target: th.Tensor) -> th.Tensor:
        """
        :param logits: [..., bins]
        :param target: [...] scalars in the units of the rewards
        :return: [...] cross-entropies of the two-hot targets
        """
        return -(self.encode(target) * F.log_softmax(logits, dim=-1)).sum(-1)


class SquashedGaussian:
    """
    tanh of a diagonal Gaussian (EfficientZero V2 App. G): mu = 5 tanh(x / 5), sigma = softplus(y + 1) + 0.1.

    :param params: [..., 2 * A] output (x, y) of the policy head
    """

    def __init__(self, params: th.Tensor):
        x, y = params.chunk(2, dim=-1)
        self.mean = 5 * th.tanh(x / 5)
        self.std = F.softplus(y + 1) + 0.1

    def sample(self, noise: th.Tensor, std_scale: float | th.Tensor = 1.0) -> th.Tensor:
        """
        :param noise: standard normal, broadcastable to [..., A]
        :param std_scale: factor of the standard deviation (above 1: the flattened p' of EfficientZero V2 4.2.1)
        :return: actions in (-1, 1), clipped to +-:data:`MAX_ACTION`
        """
        return th.tanh(self.mean + self.std * std_scale * noise).clamp(-MAX_ACTION, MAX_ACTION)

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: [..., A] in [-1, 1]
        :return: [...] log densities of the squashed actions
        """
        u = th.atanh(actions.clamp(-MAX_ACTION, MAX_ACTION))
        z = (u - self.mean) / self.std
        log_normal = -0.5 * z * z - th.log(self.std) - 0.5 * math.log(2 * math.pi)
        return (log_normal - _log_tanh_slope(u)).sum(-1)

    def entropy(self, noise: th.Tensor) -> th.Tensor:
        """
        Entropy, with the part that tanh adds estimated from reparametrised samples.

        :param noise: standard normal [N, ..., A], N samples for each distribution
        :return: [...]
        """
        gaussian = (0.5 + 0.5 * math.log(2 * math.pi) + th.log(self.std)).sum(-1)
        return gaussian + _log_tanh_slope(self.mean + self.std * noise).sum(-1).mean(0)


def _log_tanh_slope(u: th.Tensor) -> th.Tensor:
    """log(1 - tanh(u)^2) without cancellation, of any shape."""
    return 2 * (math.log(2) - u - F.softplus(-2 * u))
