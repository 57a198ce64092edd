"""Vectors in Numba kernels: every function in float32 and float64, and no access beyond the given elements."""

import numpy as np
import pytest
from numba import njit

from nord_snn.ops._numba import simd
from nord_snn.ops._numba.simd import WIDTH

pytestmark = [pytest.mark.quick, pytest.mark.parametrize("dtype", [np.float32, np.float64])]


@njit
def _copy(source, target, loaded, index, count):
    x, y = simd.pointer(source), simd.pointer(target)
    simd.prefetch(x, index)
    simd.store(simd.pointer(loaded), 0, simd.masked_load(x, index, count))
    simd.masked_store(y, index, count, simd.load(x, index) + simd.broadcast(x, 1))


@pytest.mark.parametrize("count", [0, 1, 7, WIDTH - 1, WIDTH, WIDTH + 3])
def test_masked_loads_and_stores_use_only_the_first_elements(dtype, count):
    source, target, loaded = np.arange(40, dtype=dtype), np.full(40, -1, dtype), np.full(WIDTH, -1, dtype)
    _copy(source, target, loaded, 3, count)
    written = min(count, WIDTH)
    assert (loaded == np.where(np.arange(WIDTH) < count, source[3 : 3 + WIDTH], 0)).all()
    assert (target[3 : 3 + written] == source[3 : 3 + written] + 1).all()
    assert (np.delete(target, slice(3, 3 + written)) == -1).all()


@njit
def _arithmetic(a, b, result):
    x, y, out = simd.pointer(a), simd.pointer(b), simd.pointer(result)
    p, q = simd.load(x, 0), simd.load(simd.advance(y, WIDTH), -WIDTH)
    simd.store(out, 0, p + q)
    simd.store(out, WIDTH, p - q)
    simd.store(out, 2 * WIDTH, p * q)
    simd.store(out, 3 * WIDTH, p / q)
    simd.store(out, 4 * WIDTH, simd.maximum(p, q))
    greater_or_equal = simd.ge_mask(p, q)
    simd.store(out, 5 * WIDTH, simd.where(greater_or_equal, p, simd.broadcast(x, 7)))
    simd.store(out, 6 * WIDTH, simd.fused(p, q, simd.iota(x)))
    differing = simd.ne_mask(p, q)
    return simd.reduce_sum(p), greater_or_equal, differing, simd.count_bits(differing), simd.as_integers(x)[0]


def test_every_vector_element_is_computed_independently(dtype):
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(WIDTH).astype(dtype) for _ in range(2))
    a[3], a[5] = b[3], np.nan  # one pair of equal elements, one with NaN
    result = np.empty(7 * WIDTH, dtype)
    total, greater_or_equal, differing, count, bits = _arithmetic(a, b, result)
    rows = result.reshape(7, WIDTH)
    for row, expected in zip(rows, (a + b, a - b, a * b, a / b), strict=False):
        assert np.array_equal(row, expected, equal_nan=True)
    assert np.array_equal(rows[4], np.where(a > b, a, b), equal_nan=True)
    assert np.array_equal(rows[5], np.where(a >= b, a, dtype(7)), equal_nan=True)
    assert np.allclose(rows[6], a * b + np.arange(WIDTH), rtol=1e-6, equal_nan=True)
    assert np.isnan(total)
    assert greater_or_equal == sum(1 << lane for lane in range(WIDTH) if a[lane] >= b[lane])
    assert differing == sum(1 << lane for lane in range(WIDTH) if a[lane] != b[lane])
    assert count == WIDTH - 1
    assert bits == a.view(np.int32 if dtype == np.float32 else np.int64)[0]
    a[5] = 0
    assert np.isclose(_arithmetic(a, b, result)[0], a.sum(), rtol=1e-5)


@njit
def _write_by_address(address, like, n):
    simd.masked_store(simd.as_pointer(address, like), 1, n - 1, simd.broadcast(simd.as_pointer(address, like), 7))


def test_memory_can_be_written_by_its_address(dtype):
    x = np.zeros(5, dtype)
    _write_by_address(x.ctypes.data, dtype(0), 5)
    assert x.tolist() == [0, 7, 7, 7, 7]
