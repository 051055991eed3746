"""Supports and squashed Gaussians against their formulas, against torch's distributions and against known numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from sb3_ezv2.distributions import (
    MAX_ACTION,
    CategoricalSupport,
    SquashedGaussian,
    SupportSpec,
    h_inverse,
    h_transform,
    symexp,
    symlog,
)

SPECS = [
    SupportSpec(299.0, 51, "h"),  # the paper's values
    SupportSpec(2.0, 51, "h"),  # the paper's rewards
    SupportSpec(3e5, 601, "h"),
    SupportSpec(18_000.0, 301, "h"),  # the default of values
    SupportSpec(22025.0, 101, "symexp"),  # the default of rewards
    SupportSpec(1.0, 3, "symexp"),
]
LARGE_SPECS = [SPECS[0], SPECS[2], SPECS[3]]


def h(x: np.ndarray) -> np.ndarray:
    """The value scaling as it is printed."""
    return np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + 0.001 * x


def make(spec: SupportSpec, scale: float = 1.0) -> CategoricalSupport:
    support = CategoricalSupport(spec)
    support.scale.fill_(scale)
    return support


def signed_range(low: float, high: float, count: int) -> np.ndarray:
    """Numbers of both signs whose magnitudes are spread evenly over the orders of magnitude."""
    magnitudes = np.geomspace(low, high, count)
    return np.concatenate([-magnitudes, magnitudes])


# --------------------------------------------------------------------------------------------------------------------
# Transforms
# --------------------------------------------------------------------------------------------------------------------


def test_transforms_by_hand() -> None:
    x = th.tensor([0.0, 3.0, -8.0, 299.0], dtype=th.float64)
    expected = th.tensor([0.0, 1.003, -2.008, math.sqrt(300) - 1 + 0.299], dtype=th.float64)
    th.testing.assert_close(h_transform(x), expected, rtol=1e-14, atol=0)
    th.testing.assert_close(h_inverse(expected), x, rtol=1e-12, atol=0)
    x = th.tensor([0.0, math.e - 1, 1 - math.exp(10)], dtype=th.float64)
    th.testing.assert_close(symlog(x), th.tensor([0.0, 1.0, -10.0], dtype=th.float64), rtol=1e-14, atol=0)
    th.testing.assert_close(symexp(symlog(x)), x, rtol=1e-14, atol=0)


def test_transforms_over_fifteen_orders_of_magnitude() -> None:
    x = th.from_numpy(signed_range(1e-8, 1e7, 500))
    np.testing.assert_allclose(h_transform(x), h(x.numpy()), rtol=1e-6)
    for y in (x, x.float()):
        th.testing.assert_close(h_inverse(h_transform(y)), y, rtol=2e-6, atol=1e-12)
        th.testing.assert_close(symexp(symlog(y)), y, rtol=2e-5, atol=0)
        assert h_inverse(y).dtype == y.dtype


# --------------------------------------------------------------------------------------------------------------------
# Supports
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_bins_are_uniform_in_their_transform(spec: SupportSpec) -> None:
    limit = np.array(spec.limit)
    top = h(limit) if spec.transform == "h" else np.log1p(limit)
    uniform = np.linspace(-top, top, spec.bins)
    bins = uniform if spec.transform == "h" else np.sign(uniform) * np.expm1(np.abs(uniform))
    support = make(spec)
    assert support.size == spec.bins and support.bins.dtype == th.float32
    np.testing.assert_allclose(support.bins, bins, rtol=1e-6, atol=1e-12)
    assert (support.bins == -support.bins.flip(0)).all() and support.bins[spec.bins // 2] == 0


def test_two_hot_by_hand() -> None:
    # h(2) / 2 lies halfway between the bins 0 and h(2), whatever the transform's curve
    support = make(SupportSpec(2.0, 3, "h"))
    half = float(h_inverse(h_transform(th.tensor(2.0, dtype=th.float64)) / 2))
    x = th.tensor([2.0, 0.0, half, -half, -2.0])
    expected = th.tensor([[0, 0, 1], [0, 1, 0], [0, 0.5, 0.5], [0.5, 0.5, 0], [1, 0, 0]])
    th.testing.assert_close(support.encode(x), expected, rtol=0, atol=1e-6)
    # symexp: the bins themselves are weighed: 1 is a quarter of the way from 0 to 4
    support = make(SupportSpec(4.0, 3, "symexp"))
    x = th.tensor([4.0, 1.0, 0.0, -3.0])
    expected = th.tensor([[0, 0, 1], [0, 0.75, 0.25], [0, 1, 0], [0.75, 0.25, 0]])
    th.testing.assert_close(support.encode(x), expected, rtol=0, atol=1e-6)
    # in units of the scale
    support.scale.fill_(10.0)
    th.testing.assert_close(support.encode(10 * x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("spec", LARGE_SPECS, ids=str)
def test_decode_inverts_encode_over_twelve_orders_of_magnitude(spec: SupportSpec, scale: float) -> None:
    x = scale * signed_range(spec.limit * 1e-12, spec.limit * (1 - 1e-6), 1000)
    support = make(spec, scale)
    decoded = support.decode_probs(support.encode(th.from_numpy(x).float()))
    # Weights are float32: next to the bin at 0, a negative number is what is left of the weight of the one below
    lost = 2.0**-22 * float(support.bins[support.size // 2 + 1])
    np.testing.assert_allclose(decoded, x, rtol=1e-4, atol=scale * lost)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@hypothesis_settings(max_examples=50, deadline=None)
@given(fractions=st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=8), scale=st.sampled_from([1e-3, 1.0, 50.0]))
def test_two_hot_is_linear_interpolation(spec: SupportSpec, fractions: list[float], scale: float) -> None:
    support = make(spec, scale)
    x = scale * spec.limit * np.array(fractions)
    weights = support.encode(th.from_numpy(x).float()).numpy()
    inner = h(x / scale) if spec.transform == "h" else x / scale
    # weight j is the hat function around bin j; np.interp clips as a support does
    expected = np.stack([np.interp(inner, support.bins, hat) for hat in np.eye(spec.bins)], axis=-1)
    np.testing.assert_allclose(weights, expected, atol=3e-4 if spec.bins > 101 else 3e-5)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    assert (weights >= 0).all() and ((weights > 0).sum(-1) <= 2).all()


@pytest.mark.parametrize("scale", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_scalars_beyond_the_limit_are_clipped(spec: SupportSpec, scale: float) -> None:
    support = make(spec, scale)
    limit = scale * spec.limit
    assert support.limit.item() == pytest.approx(limit)
    x = th.tensor([1.0, 1.001, 10.0, 1e9]) * limit
    for sign in (1, -1):
        weights = support.encode(sign * x)
        assert (weights[:, -1 if sign > 0 else 0] > 1 - 1e-4).all()
        th.testing.assert_close(support.decode_probs(weights), th.full((4,), sign * limit), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1.0, 123.4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_symmetric_distributions_are_exactly_zero(spec: SupportSpec, scale: float) -> None:
    support = make(spec, scale)
    generator = th.Generator().manual_seed(0)
    half = 5 * th.randn(100, spec.bins // 2, generator=generator)
    logits = th.cat([half, th.randn(100, 1, generator=generator), half.flip(-1)], dim=-1)
    assert (support.decode(logits) == 0).all()
    assert (support.decode(th.zeros(3, 2, spec.bins)) == 0).all()
    assert (support.decode_probs(support.encode(th.zeros(4))) == 0).all()


def test_a_mean_of_two_hots_is_a_mean_of_scalars_or_of_their_transforms() -> None:
    """What a head learns from random targets: DreamerV3's bins meet the mean itself, MuZero's the mean in h."""
    x = th.tensor([-20.0, 0.5, 150.0, 3.0], dtype=th.float64)
    support = make(SupportSpec(22025.0, 101, "symexp"))
    assert support.decode_probs(support.encode(x.float()).mean(0)).item() == pytest.approx(x.mean().item(), rel=1e-5)
    support = make(SupportSpec(299.0, 51, "h"))
    expected = h_inverse(h_transform(x).mean()).item()
    assert support.decode_probs(support.encode(x.float()).mean(0)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_decode_is_the_mean_bin_of_the_softmax(spec: SupportSpec) -> None:
    support = make(spec, 2.5)
    logits = 3 * th.randn(7, 5, spec.bins, generator=th.Generator().manual_seed(1))
    mean = (th.softmax(logits.double(), -1) * support.bins.double()).sum(-1)
    expected = 2.5 * (h_inverse(mean) if spec.transform == "h" else mean)
    th.testing.assert_close(support.decode(logits).double(), expected, rtol=1e-4, atol=1e-5 * spec.limit)


def test_cross_entropy() -> None:
    support = make(SupportSpec(299.0, 51, "h"), 3.0)
    x = th.tensor([[-500.0, 0.0, 0.1], [7.0, 900.0, 899.0]])
    logits = th.randn(2, 3, 51, generator=th.Generator().manual_seed(0), requires_grad=True)
    loss = support.cross_entropy(logits, x)
    assert loss.shape == (2, 3)
    weights = support.encode(x)
    expected = th.nn.functional.cross_entropy(logits.reshape(6, 51), weights.reshape(6, 51), reduction="none")
    th.testing.assert_close(loss.flatten(), expected)
    (gradient,) = th.autograd.grad(loss.sum(), logits)
    th.testing.assert_close(gradient, th.softmax(logits, -1) - weights, rtol=1e-4, atol=1e-6)


def test_the_scale_travels_with_the_weights() -> None:
    support, other = make(SPECS[0], 7.0), make(SPECS[0])
    other.load_state_dict(support.state_dict())
    assert other.scale == 7 and not list(support.parameters())


@pytest.mark.parametrize(
    "spec",
    [
        (0.0, 51, "h"),
        (-299.0, 51, "h"),
        (math.inf, 51, "h"),
        (math.nan, 51, "h"),
        ("299", 51, "h"),
        (None, 51, "h"),
        (299.0, 50, "h"),
        (299.0, 1, "h"),
        (299.0, -3, "h"),
        (299.0, 51.0, "h"),
        (299.0, "51", "h"),
        (299.0, 51, "log"),
        (299.0, 51, None),
        (299.0, 51),
        (299.0, 51, "h", 1),
        299.0,
        None,
        "h",
        (),
    ],
    ids=str,
)
def test_bad_supports_are_refused(spec: Any) -> None:
    with pytest.raises(ValueError, match=r"^a support.* not .+"):
        CategoricalSupport(spec)


def test_any_sequence_is_a_spec() -> None:
    """As it comes out of a YAML file."""
    support = CategoricalSupport([299, 51, "h"])  # type: ignore[arg-type]
    assert support.spec == SPECS[0]
    assert support.decode_probs(support.encode(th.tensor(-100.0))).item() == pytest.approx(-100, rel=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Squashed Gaussians
# --------------------------------------------------------------------------------------------------------------------


def random_params(*shape: int, seed: int = 0) -> th.Tensor:
    return 2 * th.randn(*shape, generator=th.Generator().manual_seed(seed), dtype=th.float64)


def squashed(distribution: SquashedGaussian) -> TransformedDistribution:
    """The same as torch's distribution over single dimensions."""
    return TransformedDistribution(Normal(distribution.mean, distribution.std), [TanhTransform()])


def test_mean_and_standard_deviation_by_hand() -> None:
    distribution = SquashedGaussian(th.tensor([[0.0, 100.0, -100.0, 1.0, -1.0, 0.0, 9.0, -100.0]]))
    th.testing.assert_close(distribution.mean, th.tensor([[0.0, 5.0, -5.0, 5 * math.tanh(0.2)]]))
    expected = [math.log(2) + 0.1, math.log1p(math.e) + 0.1, 10 + math.log1p(math.exp(-10)) + 0.1, 0.1]
    th.testing.assert_close(distribution.std, th.tensor([expected]))


def test_log_prob_is_that_of_torch() -> None:
    distribution = SquashedGaussian(random_params(6, 1, 2 * 3))  # 6 distributions, 3 dimensions
    actions = th.tanh(random_params(6, 20, 3, seed=1)).clamp(-0.998, 0.998)
    expected = squashed(distribution).log_prob(actions).sum(-1)
    log_prob = distribution.log_prob(actions)
    assert log_prob.shape == (6, 20)
    th.testing.assert_close(log_prob, expected, rtol=1e-9, atol=1e-9)


def test_density_integrates_to_one() -> None:
    distribution = SquashedGaussian(th.tensor([[0.7, -3.0], [-1.0, -0.5]], dtype=th.float64).unsqueeze(1))
    grid = th.linspace(-0.99899, 0.99899, 40_001, dtype=th.float64).reshape(1, -1, 1)
    mass = th.trapezoid(distribution.log_prob(grid).exp(), grid[..., 0])
    normal = Normal(distribution.mean[..., 0], distribution.std[..., 0])
    end = math.atanh(0.99899)
    inside = normal.cdf(th.tensor(end)) - normal.cdf(th.tensor(-end))  # [2, 1]
    th.testing.assert_close(mass, inside[:, 0].expand_as(mass), rtol=1e-4, atol=0)


def test_actions_at_the_bounds_are_harmless() -> None:
    params = random_params(1, 4).requires_grad_()
    actions = th.tensor([[1.0, -1.0], [0.9999, 0.0]], dtype=th.float64)
    log_prob = SquashedGaussian(params).log_prob(actions)
    assert log_prob.isfinite().all()
    # like the largest actions that there are
    th.testing.assert_close(log_prob, SquashedGaussian(params).log_prob(actions.clamp(-MAX_ACTION, MAX_ACTION)))
    (gradient,) = th.autograd.grad(log_prob.sum(), params)
    assert gradient.isfinite().all()


def test_samples() -> None:
    distribution = SquashedGaussian(random_params(5, 1, 2 * 2))
    noise = random_params(5, 7, 2, seed=3)
    actions = distribution.sample(noise)
    th.testing.assert_close(actions, th.tanh(distribution.mean + distribution.std * noise).clamp(-0.999, 0.999))
    th.testing.assert_close(distribution.sample(th.zeros(5, 7, 2)), th.tanh(distribution.mean).expand(5, 7, 2))
    scales = th.tensor([1.0, 3.0, 1, 1, 1, 1, 1]).reshape(7, 1)
    wide = distribution.sample(noise, scales)
    th.testing.assert_close(wide[:, 0], actions[:, 0])
    expected = th.tanh(distribution.mean + 3 * distribution.std * noise)[:, 1].clamp(-0.999, 0.999)
    th.testing.assert_close(wide[:, 1], expected)
    assert distribution.sample(1e6 * noise).abs().max() == MAX_ACTION


def test_entropy_is_that_of_monte_carlo() -> None:
    """Its estimate, and the gradient of it, against the mean of -log p over torch's own samples."""
    params = th.tensor([[0.5, -1.0, -2.0, 0.0], [4.0, 0.0, 1.0, -9.0]], dtype=th.float64, requires_grad=True)
    noise = th.randn(200_000, 2, 2, generator=th.Generator().manual_seed(0), dtype=th.float64)
    entropy = SquashedGaussian(params).entropy(noise)
    assert entropy.shape == (2,)
    # other noise, and torch's formulas all the way; both standard errors are below 0.005
    other = th.randn(200_000, 2, 2, generator=th.Generator().manual_seed(1), dtype=th.float64)
    reference = squashed(SquashedGaussian(params))
    base = reference.base_dist
    expected = -reference.log_prob(th.tanh(base.mean + base.stddev * other)).sum(-1).mean(0)
    th.testing.assert_close(entropy, expected, rtol=0, atol=0.03)
    gradients = [th.autograd.grad(x.sum(), params, retain_graph=True)[0] for x in (entropy, expected)]
    th.testing.assert_close(*gradients, rtol=0, atol=0.03)


def test_entropy_of_a_narrow_distribution_by_hand() -> None:
    """tanh adds the log of its slope at the mean: 0 at 0, log(1 - tanh(m)^2) at m. Far out nothing is lost."""
    params = th.tensor([[0.0, -100.0], [100.0, -100.0]], dtype=th.float64)  # std 0.1, mean 0 and 5
    noise = th.linspace(-3, 3, 601, dtype=th.float64)
    density = th.exp(-0.5 * noise**2)
    noise = noise.repeat_interleave((1000 * density).round().long()).reshape(-1, 1, 1)
    gaussian = 0.5 * math.log(2 * math.pi * math.e * 0.01)
    entropy = SquashedGaussian(params).entropy(noise)
    assert entropy[0].item() == pytest.approx(gaussian - 0.01, abs=1e-3)  # log(1 - tanh(u)^2) is about -u^2
    assert entropy[1].item() == pytest.approx(gaussian + math.log1p(-(math.tanh(5.0) ** 2)), abs=1e-3)
