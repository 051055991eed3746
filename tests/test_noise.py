"""Standard normal noise from keys: the bits against published ones, the distribution, and what it must not depend on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sb3_ezv2.ctree import fill_normal

N = 1_000_000


def normal(key: int, count: int = N, level: int = 2) -> np.ndarray:
    out = np.full(count, np.nan, np.float32)
    fill_normal(key, out, level)
    return out


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 in whole numbers."""
    a, b, c, d = counter
    x, y = key
    for _ in range(10):
        from_a, from_c = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = from_c >> 32 ^ b ^ x, from_c % 2**32, from_a >> 32 ^ d ^ y, from_a % 2**32
        x, y = (x + 0x9E3779B9) % 2**32, (y + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def exact(key: int, index: int) -> float:
    """Number ``index`` of a key in double precision."""
    counter = index // 64 * 16 + index % 16
    word = philox((counter % 2**32, counter >> 32, 0, 0), (key % 2**32, key >> 32))[index // 16 % 4]
    tail = ((word & 0x7FFFFFFF) + 0.5) / 2**31
    low, high = 0.0, 7.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(middle / math.sqrt(2)) > tail else (low, middle)
    return -low if word >> 31 else low


def test_the_reference_is_philox() -> None:
    """The known answers of Salmon et al. (2011)."""
    assert philox((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    assert pi == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("key", [0, 1, 2**32, 2**64 - 1, 0x0123456789ABCDEF])
def test_numbers_are_those_of_the_reference(key: int) -> None:
    found = normal(key, 2000)
    for index in (0, 1, 15, 16, 63, 64, 100, 1023, 1984, 1999, *np.abs(found).argsort()[-20:].tolist()):
        assert found[index] == pytest.approx(exact(key, index), rel=1e-6, abs=2e-7)


@pytest.mark.parametrize("key", [0, 7, 2**63 + 1])
def test_the_distribution_is_standard_normal(key: int) -> None:
    """Each bound is passed by chance about once in a million keys; the keys are fixed."""
    x = np.sort(normal(key).astype(np.float64))
    assert np.isfinite(x).all() and 4.0 < x[-1] < 6.35 and -6.35 < x[0] < -4.0
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        deviation = math.sqrt((math.prod(range(1, 2 * power, 2)) - moment**2) / N)
        assert abs((x**power).mean() - moment) < 5 * deviation
    cdf = np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in x])
    ranks = np.arange(N + 1) / N
    kolmogorov = max((ranks[1:] - cdf).max(), (cdf - ranks[:-1]).max())
    assert kolmogorov * math.sqrt(N) < 2.69  # 2 exp(-2 * 2.69^2) = 1e-6
    for limit in (1.0, 2.0, 3.0, 4.0):  # either tail
        p = math.erfc(limit / math.sqrt(2)) / 2
        for count in ((x > limit).sum(), (x < -limit).sum()):
            assert abs(count - N * p) < 5 * math.sqrt(N * p) + 1


def test_the_tails_are_as_long_as_they_should_be() -> None:
    """Of sixteen million numbers 9 are expected beyond 5, and 109 beyond 4.5."""
    x = np.abs(np.concatenate([normal(key, 16 * N // 4) for key in range(4)]))
    assert x.max() < 6.35 and 1 <= (x > 5.0).sum() <= 25
    assert abs((x > 4.5).sum() - 108.7) < 5 * math.sqrt(108.7)


def test_neighbouring_keys_and_indices_are_independent() -> None:
    bound = 5 / math.sqrt(N)
    x = normal(5)
    for other in map(normal, (4, 6, 7, 5 + 2**32, 5 + 2**63)):
        assert not np.array_equal(x, other)
        for a, b in ((x, other), (x**2 - 1, (other**2 - 1) / 2)):
            assert abs(float(np.mean(a * b))) < bound
    for lag in (1, 2, 3, 4, 6, 12, 15, 16, 17, 32, 48, 63, 64, 65, 128, 4096):
        for a, b in ((x[lag:], x[:-lag]), (x[lag:] ** 2 - 1, (x[:-lag] ** 2 - 1) / 2)):
            assert abs(float(np.mean(a * b))) < 1.01 * bound
    # The first numbers of many keys, as small searches use them
    first = np.stack([normal(key, 8) for key in range(20_000)])
    assert np.abs(np.corrcoef(first.T) - np.eye(8)).max() < 5 / math.sqrt(20_000)
    assert np.abs(first.mean(0)).max() < 5 / math.sqrt(20_000) and len(np.unique(first[:, 0])) > 19_900


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    key=st.integers(0, 2**64 - 1),
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=4) | st.tuples(st.integers(0, 700)),
    level=st.integers(0, 2),
)
def test_every_shape_from_every_instruction_set_is_the_beginning_of_the_same_numbers(key: int, shape: Any, level: int) -> None:
    count = math.prod(shape)
    room = np.full(count + 16, np.nan, np.float32)  # nothing behind the array is written
    out = room[5 : 5 + count].reshape(shape)
    fill_normal(key, out, level)
    np.testing.assert_array_equal(out.reshape(-1), normal(key, 8000, level=0)[:count])
    assert np.isnan(room[:5]).all() and np.isnan(room[5 + count :]).all()


def test_every_instruction_set_gives_the_same_bits() -> None:
    found = [normal(11, N + 37, level).view(np.uint32) for level in range(3)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_keys_of_numpy_are_keys() -> None:
    key = np.random.default_rng(0).integers(2**64, dtype=np.uint64)
    out = np.zeros(9, np.float32)
    fill_normal(key, out)
    np.testing.assert_array_equal(out, normal(int(key), 9))


@pytest.mark.parametrize(
    ("key", "error"), [(-1, ValueError), (2**64, ValueError), (1.0, TypeError), ("1", TypeError), (None, TypeError)]
)
def test_bad_keys_are_refused(key: Any, error: type[Exception]) -> None:
    out = np.zeros(3, np.float32)
    with pytest.raises(error):
        fill_normal(key, out)
    assert not out.any()


def read_only() -> np.ndarray:
    array = np.zeros(8, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "out",
    [
        np.zeros(8),
        np.zeros(8, np.int32),
        np.zeros(8, ">f4"),
        np.zeros(16, np.float32)[::2],
        np.zeros((4, 4), np.float32).T[:, :2],
        np.zeros(37, np.uint8)[1:33].view(np.float32),
        read_only(),
        [0.0, 0.0],
        None,
        memoryview(bytearray(8)),
    ],
    ids=["double", "integer", "byte order", "strided", "transposed", "unaligned", "read-only", "list", "none", "bytes"],
)
def test_bad_arrays_are_refused(out: Any) -> None:
    with pytest.raises(ValueError, match="C-contiguous float32"):
        fill_normal(0, out)
