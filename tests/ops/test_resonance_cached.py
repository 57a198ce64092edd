"""``resonance_cached``, for new positions with cached keys as bits, equals the reference for each sequence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nord_snn.ops import pack_spikes, resonance, resonance_cached
from nord_snn.ops.cached_resonance.packing import unpack_spikes
from nord_snn.ops.topk_resonance.reference import reference


@pytest.fixture(params=["torch", "numba"])
def backend(request):
    if request.param == "numba":
        pytest.importorskip("numba", reason="the CPU kernels need Numba")
    return request.param


def split_heads(v, n_heads):
    """Return values ``[B, S, V]`` as ``[B, H, S, V / H]``."""
    return v.unflatten(-1, (n_heads, -1)).transpose(1, 2)


@pytest.mark.quick
@settings(deadline=None, max_examples=60)
@given(
    T=st.integers(1, 11),
    B=st.integers(0, 2),
    S=st.integers(1, 5),
    n_heads=st.integers(1, 3),
    width=st.sampled_from([1, 2, 15, 16, 17, 33, 64]),
    dtype=st.sampled_from([torch.float32, torch.bool, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_packing_is_lossless(T, B, S, n_heads, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    k = torch.rand(T, B, S, n_heads * width, generator=generator) < 0.3
    keys = pack_spikes(k.to(dtype), n_heads)
    assert keys.dtype == torch.uint8
    assert keys.shape[-1] % 8 == 0
    unpacked = unpack_spikes(keys, T, width)
    assert torch.equal(unpacked, k.unflatten(-1, (n_heads, width)).permute(1, 3, 2, 0, 4).flatten(-2))


@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_each_query_equals_the_reference_on_its_visible_positions(data):
    """Scores may be equal; calls have padding, windows, several new positions and temperatures of both signs."""
    pytest.importorskip("numba", reason="the CPU kernels need Numba")
    T, B, n_heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 3]))
    width, n_all = data.draw(st.sampled_from([1, 2, 5, 16, 20])), data.draw(st.integers(1, 40))
    n_new, top_k = data.draw(st.integers(1, n_all)), data.draw(st.integers(1, 12))
    window = data.draw(st.one_of(st.none(), st.integers(1, 45)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    q, k = ((torch.rand(T, B, n_all, n_heads * width, generator=generator) < 0.4).to(dtype) for _ in range(2))
    value_width = data.draw(st.sampled_from([width, 1, 3, 33]))
    v = torch.randn(B, n_all, n_heads * value_width, generator=generator).to(dtype)
    temperature = data.draw(st.sampled_from([0.5, -0.5, 1.0]))
    recency = torch.rand(n_heads, generator=generator).to(dtype) if data.draw(st.booleans()) else None
    lengths = torch.randint(0, n_all + 1, (B,), generator=generator) if data.draw(st.booleans()) else None
    expected = torch.zeros(B, n_new, n_heads * value_width, dtype=dtype)
    for b in range(B):
        for row in range(n_new):
            i = n_all - n_new + row
            oldest = max(0, 0 if window is None else i - window + 1, 0 if lengths is None else n_all - int(lengths[b]))
            if oldest <= i:
                part = slice(oldest, i + 1)
                visible = q[:, b : b + 1, part], k[:, b : b + 1, part], v[b : b + 1, part]
                expected[b, row] = reference(*visible, n_heads, top_k, temperature, recency, True)[0, -1]
    for backend in ("torch", "numba"):
        got = resonance_cached(
            q[:, :, n_all - n_new :], pack_spikes(k, n_heads), split_heads(v, n_heads), top_k=top_k, temperature=temperature,
            recency=recency, lengths=lengths, window=window, backend=backend,
        )  # fmt: skip
        assert got.dtype == dtype
        assert torch.allclose(got, expected, atol=1e-5), backend


def test_single_new_positions_of_a_long_sequence_equal_the_whole_sequence(backend):
    generator = torch.Generator().manual_seed(0)
    q, k = ((torch.rand(10, 2, 150, 64, generator=generator) < 0.1).float() for _ in range(2))
    v = torch.randn(2, 150, 64, generator=generator)
    arguments = {"top_k": 16, "temperature": torch.tensor([0.3]), "recency": torch.tensor([0.5, 0.0, 0.01, 0.1])}
    whole = resonance(q, k, v, n_heads=4, **arguments)
    keys, values = pack_spikes(k, 4), split_heads(v, 4)
    for end in (1, 2, 17, 149, 150):
        one = resonance_cached(
            q[:, :, end - 1 : end], keys[:, :, :end], values[:, :, :end], **arguments, backend=backend
        )
        assert torch.allclose(one[:, 0], whole[:, end - 1], atol=1e-6), end


@pytest.mark.quick
def test_bfloat16_values_equal_the_op_and_all_memory_is_written(backend, memory_full_of_nan):
    k = (torch.rand(3, 1, 9, 6) < 0.5).float()
    v = torch.randn(1, 9, 6)
    keys, values = pack_spikes(k, 2), split_heads(v, 2).bfloat16()
    got = resonance_cached(k[:, :, -2:], keys, values, top_k=4, temperature=1.0, backend=backend)
    assert got.dtype == torch.bfloat16
    expected = resonance(k, k, v.bfloat16(), n_heads=2, top_k=4, temperature=1.0)[:, -2:]
    assert torch.allclose(got.float(), expected.float(), atol=1e-2)


VALID = {
    "q": torch.zeros(2, 1, 1, 6),
    "keys": torch.zeros(1, 2, 5, 8, dtype=torch.uint8),
    "values": torch.zeros(1, 2, 5, 3),
    "top_k": 4,
    "temperature": 1.0,
}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(1, 2, 5, 8)}, r"= \[1, 2, at least 1, 6\]"),
        ({"keys": torch.zeros(1, 2, 5, 8, dtype=torch.int64)}, "uint8 or floating keys"),
        ({"keys": torch.zeros(1, 2, 5, 16, dtype=torch.uint8)}, r"= \[1, 2, at least 1, 8\]"),
        ({"q": torch.zeros(2, 1, 6, 6)}, r"at least 6, 8\] for these queries, got \[1, 2, 5, 8\]"),
        ({"values": torch.zeros(1, 2, 4, 3)}, r"\[1, 2, 5, any\], got \[1, 2, 4, 3\]"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"recency": torch.zeros(3)}, r"\[H\] = \[2\]"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, r"lengths must have the shape \[B\] = \[1\]"),
        ({"temperature": torch.zeros(2)}, "temperature must have one element"),
    ],
)
def test_bad_input_raises(change, message):
    with pytest.raises(ValueError, match=message):
        resonance_cached(**{**VALID, **change})


def test_keys_and_queries_other_than_spikes_and_gradients_raise():
    with pytest.raises(ValueError, match="zeros and ones"):
        pack_spikes(torch.full((1, 1, 1, 4), 0.5), 2)
    with pytest.raises(ValueError, match="zeros and ones"):
        pack_spikes(torch.full((1, 1, 1, 4), torch.nan), 2)
    with pytest.raises(ValueError, match="D = 4 and H = 3"):
        pack_spikes(torch.zeros(1, 1, 1, 4), 3)
    with pytest.raises(RuntimeError, match="no gradient"):
        resonance_cached(**{**VALID, "q": torch.zeros(2, 1, 1, 6, requires_grad=True)})
    with pytest.raises(ValueError, match="zeros and ones"):
        resonance_cached(**{**VALID, "q": torch.full((2, 1, 1, 6), 2.0)})
