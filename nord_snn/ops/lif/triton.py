"""The associative LIF neuron on a GPU: Triton kernels that pass over memory once.

A program computes whole rows of neurons, because the cascade couples all neurons of a row, and keeps their state in
registers over all time steps. The forward pass saves nothing for the backward pass, which recomputes it in segments of
up to 12 time steps: forward, with v and i_syn before each step and one bit (refractory or not) in registers, then
backward.

Memory traffic of the backward pass: a sequence of one segment reads x and grad_spikes and writes grad_x, the minimum,
which is 12 bytes per neuron and step in float32 and 6 in bfloat16; x is loaded twice, the second time from the cache.
For longer sequences a first pass saves the state at the start of each segment in scratch memory, which each program of
the bounded grid reuses for all its rows: it reads x once more, plus 24 bytes per neuron and segment that mostly stay in
the L2 cache. With a cascade the sums per cluster also go to memory, because their product is the gradient of the
coupling: 16 / members bytes per neuron and step, including reading them.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nord_snn.ops.dispatch import CallSignature, Support
from nord_snn.ops.lif.support import Arguments, OutputGradients, has_published_dynamics, supports_surrogate

__all__ = ["SURROGATE_IDS", "accepts", "backward", "fits", "forward"]

#: Surrogates that ``_surrogate`` implements; names as in :data:`nord_snn.ops.SURROGATES`.
SURROGATE_IDS = {"nord_atan": 0, "atan": 1, "sigmoid": 2, "fast_sigmoid": 3}

_TILE = 512  # neurons per program: four per thread, so that the values of a segment fit into the registers
_LARGEST_TILE = 16384  # with a cascade, whose rows cannot be split; larger tiles spill registers
_LONGEST_SEGMENT = 12
_WIDEST_MATRIX = 64  # largest number of clusters with the coupling in registers

_PADDING_THRESHOLD = tl.constexpr(1e15)  # threshold of padding; finite, because zero times infinity is NaN
_PI = tl.constexpr(math.pi)


@triton.jit
def _neuron_indices(D: tl.constexpr, C: tl.constexpr, M_PAD: tl.constexpr, C_PAD: tl.constexpr):
    """Return the neurons of a tile, ``[1, M_PAD, C_PAD]``, and a mask; member m of cluster c is ``m * C + c``."""
    member = tl.arange(0, M_PAD)[None, :, None]
    cluster = tl.program_id(1) * C_PAD + tl.arange(0, C_PAD)[None, None, :]
    return member * C + cluster, (member < D // C) & (cluster < C)


@triton.jit
def _load(ptr, at, here, mask, dtype: tl.constexpr):
    """Load from ``ptr``; zero outside ``mask``, and everywhere if ``ptr`` is None."""
    if ptr is None:
        out = tl.zeros(mask.shape, dtype)
    else:
        out = tl.load(ptr + at + here, mask=mask, other=0).to(dtype)
    return out


@triton.jit
def _load_matrix(ptr, C: tl.constexpr, C_PAD: tl.constexpr, WIDE: tl.constexpr):
    """Return the matrix for ``_couple``: ``[C_PAD, C_PAD]`` in registers, or its pointer if WIDE."""
    if ptr is None or WIDE:
        out = ptr
    else:
        k, c = tl.arange(0, C_PAD)[:, None], tl.arange(0, C_PAD)[None, :]
        out = tl.load(ptr + k * C + c, mask=(k < C) & (c < C), other=0.0)
    return out


@triton.jit
def _couple(sums, matrix, exchange_ptr, C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, WIDE: tl.constexpr):
    """Return ``out[r, 0, c] = sum over k of sums[r, k] * matrix[k, c]``.

    Each thread has its clusters c, so the sum over k mostly stays within a thread. A wide matrix is read in tiles of K
    rows, together with the matching columns of ``sums``. These go through memory, because registers cannot be indexed.
    """
    if WIDE:
        K: tl.constexpr = max(1, min(16, C_PAD, 8192 // (R * C_PAD)))
        c = tl.arange(0, C_PAD)[None, :]
        row = (tl.program_id(0) * R + tl.arange(0, R)[:, None]) * C_PAD
        tl.debug_barrier()  # wait for the readers of the previous call
        tl.store(exchange_ptr + row + c, sums)
        tl.debug_barrier()
        out = tl.zeros([R, C_PAD], tl.float32)
        first = 0
        while first < C:
            k = first + tl.arange(0, K)
            part = tl.load(exchange_ptr + row + k[None, :])
            rows = tl.load(matrix + k[:, None] * C + c, mask=(k[:, None] < C) & (c < C), other=0.0)
            out += tl.sum(part[:, :, None] * rows[None, :, :], 1)
            first += K
    else:
        out = tl.sum(sums[:, :, None] * matrix[None, :, :], 1)
    return out[:, None, :]


@triton.jit
def _surrogate(x, alpha, SURROGATE: tl.constexpr):
    """Return the surrogate derivative at ``x``, membrane potential minus threshold."""
    if SURROGATE == 0:
        z = alpha * x
        out = tl.div_rn(alpha, (1 + z * z) * (2 * _PI))
    elif SURROGATE == 1:
        z = alpha * x * (_PI / 2)
        out = tl.div_rn(alpha, (1 + z * z) * 2)
    elif SURROGATE == 2:
        z = tl.exp(-tl.abs(alpha * x))  # even function: use the side that cannot overflow
        out = tl.div_rn(alpha * z, (1 + z) * (1 + z))
    else:
        z = 1 + alpha * tl.abs(x)
        out = tl.div_rn(1.0, z * z)
    return out


@triton.jit
def _load_steps(ptr, here, inside, stride, first, T, LENGTH: tl.constexpr):
    """Load steps ``first`` to ``first + LENGTH``; zero from T on.

    The compiler does not move loads before stores, so loading all steps first costs one memory latency instead of LENGTH.
    """
    out = ()
    for k in tl.static_range(LENGTH):
        out += (tl.load(ptr + k * stride + here, mask=inside & (first + k < T), other=0),)  # type: ignore[assignment]
    return out


@triton.jit
def _step(v, i, refractory, x, threshold, beta_mem, beta_syn, v_reset, refractory_steps):
    """Compute one time step of ``reference.py`` up to the cascade; return the next state and the spikes."""
    i = beta_syn * i + x.to(tl.float32)
    u = tl.where(refractory > 0, v_reset, beta_mem * v + (1 - beta_mem) * i)
    fires = u - threshold >= 0
    s = fires.to(tl.float32)
    return u - s * threshold, i, tl.where(fires, refractory_steps, tl.maximum(refractory - 1, 0)), s


@triton.jit
def _slope(v, current, active, threshold, beta_mem, v_reset, alpha, SURROGATE: tl.constexpr):
    """Return the surrogate derivative of a step, from the membrane potential before it and its synaptic current."""
    u = tl.where(active, beta_mem * v + (1 - beta_mem) * current, v_reset)
    return _surrogate(u - threshold, alpha, SURROGATE)


@triton.jit
def _step_back(grad_v, grad_i, grad_s, slope, v, i, current, active, threshold, beta_mem, beta_syn):
    """Backward of ``_step``, from the gradients of its outputs, the state before it and its synaptic current.

    Return the gradients of v and i before the step and of x, and the contributions to the gradients of threshold,
    beta_mem and beta_syn.
    """
    grad_distance = (grad_s - threshold * grad_v) * slope
    grad_u = tl.where(active, grad_v + grad_distance, 0.0)
    grad_x = grad_i + (1 - beta_mem) * grad_u
    return beta_mem * grad_u, beta_syn * grad_x, grad_x, -grad_distance, grad_u * (v - current), grad_x * i


@triton.jit
def _forward(
    x_ptr, v_ptr, i_ptr, refractory_ptr, threshold_ptr, beta_mem_ptr, beta_syn_ptr, coupling_t_ptr, exchange_ptr,
    spikes_ptr, v_seq_ptr, v_last_ptr, i_last_ptr, refractory_last_ptr, T, N, blocks, v_reset, refractory_steps,
    D: tl.constexpr, C: tl.constexpr, R: tl.constexpr, M_PAD: tl.constexpr, C_PAD: tl.constexpr, WIDE: tl.constexpr,
    LENGTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Compute all time steps of blocks of R rows: block ``program_id(0)`` and every ``num_programs(0)``-th after it.

    Segments have LENGTH steps; the last segment has fewer if PADDED.
    """
    neuron, exists = _neuron_indices(D, C, M_PAD, C_PAD)
    row = tl.arange(0, R)[:, None, None]
    here = row * D + neuron
    stride = tl.cast(N, tl.int64) * D
    v_reset = tl.cast(v_reset, tl.float32)
    beta_mem, beta_syn = tl.load(beta_mem_ptr), tl.load(beta_syn_ptr)
    threshold = tl.load(threshold_ptr + neuron, mask=exists, other=_PADDING_THRESHOLD)
    matrix = _load_matrix(coupling_t_ptr, C, C_PAD, WIDE)
    block = tl.program_id(0).to(tl.int64)
    while block < blocks:
        at = block * R * D
        inside = exists & (block * R + row < N)
        v = _load(v_ptr, at, here, inside, tl.float32)
        i = _load(i_ptr, at, here, inside, tl.float32)
        refractory = _load(refractory_ptr, at, here, inside, tl.int32)
        first = 0
        while first < T:
            now = at + first * stride
            inputs = _load_steps(x_ptr + now, here, inside, stride, first, T, LENGTH)
            for k in tl.static_range(LENGTH):
                if PADDED:
                    in_sequence = first + k < T
                else:
                    in_sequence = True
                if in_sequence:
                    v, i, refractory, s = _step(
                        v, i, refractory, inputs[k], threshold, beta_mem, beta_syn, v_reset, refractory_steps
                    )
                    tl.store(spikes_ptr + now + k * stride + here, s, mask=inside)
                    if v_seq_ptr is not None:
                        tl.store(v_seq_ptr + now + k * stride + here, v, mask=inside)
                    if matrix is not None:
                        i += _couple(tl.sum(s, 1), matrix, exchange_ptr, C, R, C_PAD, WIDE)
            first += LENGTH
        tl.store(v_last_ptr + at + here, v, mask=inside)
        tl.store(i_last_ptr + at + here, i, mask=inside)
        tl.store(refractory_last_ptr + at + here, refractory, mask=inside)
        block += tl.num_programs(0)


@triton.jit
def _save_start(ptr, segment, tile, v, i, refractory, SIZE: tl.constexpr):
    """Save the state at the start of a segment for ``_load_start``."""
    ptr += segment * (3 * SIZE)
    tl.store(ptr + tile, v)
    tl.store(ptr + SIZE + tile, i)
    tl.store(ptr + 2 * SIZE + tile, refractory.to(tl.float32, bitcast=True))


@triton.jit
def _load_start(ptr, segment, tile, SIZE: tl.constexpr):
    ptr += segment * (3 * SIZE)
    return tl.load(ptr + tile), tl.load(ptr + SIZE + tile), tl.load(ptr + 2 * SIZE + tile).to(tl.int32, bitcast=True)


@triton.jit
def _backward(
    grad_spikes_ptr, grad_v_seq_ptr, grad_v_last_ptr, grad_i_last_ptr, x_ptr, v_ptr, i_ptr, refractory_ptr,
    threshold_ptr, beta_mem_ptr, beta_syn_ptr, coupling_ptr, coupling_t_ptr, exchange_ptr, segment_starts_ptr,
    grad_x_ptr, grad_v_ptr, grad_i_ptr, grad_threshold_ptr, grad_betas_ptr, sums_ptr, grad_sums_ptr,
    T, N, blocks, segments, v_reset, refractory_steps, alpha,
    D: tl.constexpr, C: tl.constexpr, R: tl.constexpr, M_PAD: tl.constexpr, C_PAD: tl.constexpr, WIDE: tl.constexpr,
    LENGTH: tl.constexpr, PADDED: tl.constexpr, SURROGATE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of blocks and segments as in ``_forward``.

    Gradients of the parameters are summed over the blocks of this program and written once per program.
    """
    SIZE: tl.constexpr = R * M_PAD * C_PAD
    neuron, exists = _neuron_indices(D, C, M_PAD, C_PAD)
    row = tl.arange(0, R)[:, None, None]
    here = row * D + neuron
    stride = tl.cast(N, tl.int64) * D
    v_reset, alpha = tl.cast(v_reset, tl.float32), tl.cast(alpha, tl.float32)
    beta_mem, beta_syn = tl.load(beta_mem_ptr), tl.load(beta_syn_ptr)
    threshold = tl.load(threshold_ptr + neuron, mask=exists, other=_PADDING_THRESHOLD)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if segment_starts_ptr is not None:
        segment_starts_ptr += program * segments * (3 * SIZE)
    member, cluster = tl.arange(0, M_PAD)[None, :, None], tl.arange(0, C_PAD)[None, None, :]
    tile = (row * M_PAD + member) * C_PAD + cluster
    # Indices for sums over clusters, [R, C_PAD].
    row_of_sums, cluster_of_sums = tl.arange(0, R)[:, None], tl.arange(0, C_PAD)[None, :]
    here_sums = row_of_sums * C + cluster_of_sums
    stride_sums = tl.cast(N, tl.int64) * C
    total_threshold = tl.zeros([R, M_PAD, C_PAD], tl.float32)
    total_beta_mem = tl.zeros([R, M_PAD, C_PAD], tl.float32)
    total_beta_syn = tl.zeros([R, M_PAD, C_PAD], tl.float32)
    block = tl.program_id(0).to(tl.int64)
    while block < blocks:
        at = block * R * D
        inside = exists & (block * R + row < N)
        at_sums = block * R * C
        inside_sums = (block * R + row_of_sums < N) & (cluster_of_sums < C)
        v = _load(v_ptr, at, here, inside, tl.float32)
        i = _load(i_ptr, at, here, inside, tl.float32)
        refractory = _load(refractory_ptr, at, here, inside, tl.int32)
        grad_v = _load(grad_v_last_ptr, at, here, inside, tl.float32)
        grad_i = _load(grad_i_last_ptr, at, here, inside, tl.float32)
        segment = 0
        if segment_starts_ptr is not None:
            matrix = _load_matrix(coupling_t_ptr, C, C_PAD, WIDE)
            tl.debug_barrier()  # wait for the readers of the previous block
            while segment < segments - 1:
                _save_start(segment_starts_ptr, segment, tile, v, i, refractory, SIZE)
                first = segment * LENGTH
                inputs = _load_steps(x_ptr + at + first * stride, here, inside, stride, first, T, LENGTH)
                for k in tl.static_range(LENGTH):
                    v, i, refractory, s = _step(
                        v, i, refractory, inputs[k], threshold, beta_mem, beta_syn, v_reset, refractory_steps
                    )
                    if matrix is not None:
                        i += _couple(tl.sum(s, 1), matrix, exchange_ptr, C, R, C_PAD, WIDE)
                segment += 1
            _save_start(segment_starts_ptr, segment, tile, v, i, refractory, SIZE)
            tl.debug_barrier()
        while segment >= 0:
            if segment_starts_ptr is not None:
                v, i, refractory = _load_start(segment_starts_ptr, segment, tile, SIZE)
            first = segment * LENGTH
            now, now_sums = at + first * stride, at_sums + first * stride_sums
            # Forward. Padding steps past T compute garbage that is never read.
            inputs = _load_steps(x_ptr + now, here, inside, stride, first, T, LENGTH)
            coupling_t = _load_matrix(coupling_t_ptr, C, C_PAD, WIDE)
            vs, currents = (), ()
            refractory_bits = tl.zeros([R, M_PAD, C_PAD], tl.int32)  # bit k: refractory in step k
            for k in tl.static_range(LENGTH):
                vs += (v,)  # type: ignore[assignment]
                currents += (i,)  # type: ignore[assignment]
                refractory_bits |= (refractory > 0).to(tl.int32) << k
                v, i, refractory, s = _step(
                    v, i, refractory, inputs[k], threshold, beta_mem, beta_syn, v_reset, refractory_steps
                )
                if coupling_t is not None:
                    sums = tl.sum(s, 1)
                    tl.store(
                        sums_ptr + now_sums + k * stride_sums + here_sums, sums, mask=inside_sums & (first + k < T)
                    )
                    i += _couple(sums, coupling_t, exchange_ptr, C, R, C_PAD, WIDE)
            # Backward. Reload the betas: otherwise the compiler keeps beta * v and beta * i of all steps in registers.
            beta_mem, beta_syn = tl.load(beta_mem_ptr), tl.load(beta_syn_ptr)
            gradients = _load_steps(grad_spikes_ptr + now, here, inside, stride, first, T, LENGTH)
            coupling_matrix = _load_matrix(coupling_ptr, C, C_PAD, WIDE)
            for k in tl.static_range(LENGTH - 1, -1, -1):
                if PADDED:
                    in_sequence = first + k < T
                else:
                    in_sequence = True
                if in_sequence:
                    x = tl.load(x_ptr + now + k * stride + here, mask=inside, other=0)
                    grad_s = gradients[k].to(tl.float32)
                    if grad_v_seq_ptr is not None:
                        grad_v += tl.load(grad_v_seq_ptr + now + k * stride + here, mask=inside, other=0).to(tl.float32)
                    if coupling_matrix is not None:
                        sums = tl.sum(grad_i, 1)
                        tl.store(grad_sums_ptr + now_sums + k * stride_sums + here_sums, sums, mask=inside_sums)
                        grad_s += _couple(sums, coupling_matrix, exchange_ptr, C, R, C_PAD, WIDE)
                    active = (refractory_bits >> k) & 1 == 0
                    current = beta_syn * currents[k] + x.to(tl.float32)
                    slope = _slope(vs[k], current, active, threshold, beta_mem, v_reset, alpha, SURROGATE)
                    grad_v, grad_i, grad_x, by_threshold, by_beta_mem, by_beta_syn = _step_back(
                        grad_v, grad_i, grad_s, slope, vs[k], currents[k], current, active, threshold, beta_mem,
                        beta_syn,
                    )  # fmt: skip
                    tl.store(grad_x_ptr + now + k * stride + here, grad_x, mask=inside)
                    total_threshold += by_threshold
                    total_beta_mem += by_beta_mem
                    total_beta_syn += by_beta_syn
            segment -= 1
        if grad_v_ptr is not None:
            tl.store(grad_v_ptr + at + here, grad_v, mask=inside)
            tl.store(grad_i_ptr + at + here, grad_i, mask=inside)
        block += tl.num_programs(0)
    grad_threshold_ptr += tl.program_id(0).to(tl.int64) * D
    tl.store(grad_threshold_ptr + neuron, tl.sum(total_threshold, 0)[None, :, :], mask=exists)
    tl.store(grad_betas_ptr + 2 * program, tl.sum(total_beta_mem))
    tl.store(grad_betas_ptr + 2 * program + 1, tl.sum(total_beta_syn))


class _Plan(NamedTuple):
    """Split of the rows into tiles ``[R, M_PAD, C_PAD]``; without a cascade, C_PAD of the D neurons of a row."""

    constants: dict[str, Any]
    blocks: int  # number of blocks of R rows
    columns: int  # number of tiles of a row
    tile: int  # neurons per program
    warps: int


def _plan(n_rows: int, n_features: int, n_clusters: int) -> _Plan:
    if n_clusters:
        members, clusters = n_features // n_clusters, n_clusters
        width = triton.next_power_of_2(clusters)
    else:
        members, clusters = 1, n_features
        width = min(triton.next_power_of_2(clusters), _TILE)
    wide = n_clusters > 0 and width > _WIDEST_MATRIX
    row = triton.next_power_of_2(members) * width
    rows = max(1, min(triton.next_power_of_2(n_rows), _TILE // row))
    threads = rows * row // 4
    if n_clusters and not wide:  # _couple multiplies the whole matrix at once
        rows = max(1, min(rows, 8192 // width**2))
        threads = max(rows * row // 4, width**2 // 32)
    constants = {
        "D": n_features,
        "C": clusters,
        "R": rows,
        "M_PAD": triton.next_power_of_2(members),
        "C_PAD": width,
        "WIDE": wide,
    }
    columns = 1 if n_clusters else triton.cdiv(clusters, width)
    return _Plan(constants, triton.cdiv(n_rows, rows), columns, rows * row, max(1, min(threads // 32, 16)))


def _programs(plan: _Plan, device: torch.device, warps: int) -> int:
    """Return the number of programs that share the blocks if ``warps`` fit on a multiprocessor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(plan.blocks, processors * warps // (plan.warps * plan.columns)))


def _segments(n_steps: int, plan: _Plan) -> tuple[int, int]:
    """Return length and number of segments: as long as registers allow, of equal length if that is not much shorter."""
    longest = max(4, min(_LONGEST_SEGMENT, 48 * 32 * plan.warps // plan.tile))
    segments = triton.cdiv(n_steps, longest)
    length = triton.cdiv(n_steps, segments)
    length = next((n for n in range(longest, longest // 2, -1) if n_steps % n == 0), length)
    return length, triton.cdiv(n_steps, length)


def accepts(call: CallSignature) -> Support:
    """Return whether the kernels can run a call."""
    support = supports_surrogate(call, SURROGATE_IDS)
    support = has_published_dynamics(call) if support.runs else support
    return fits(call.n_features, dict(call.options)["n_clusters"]) if support.runs else support


def fits(n_features: int, n_clusters: int) -> Support:
    """Return whether the kernels can run D neurons in C clusters (0: no cascade), or the reason why not."""
    if n_clusters:
        tile = triton.next_power_of_2(n_features // n_clusters) * triton.next_power_of_2(n_clusters)
        if tile > _LARGEST_TILE:
            return Support(
                False,
                f"a program computes a whole row of a cascade, at most {_LARGEST_TILE} neurons; D = {n_features} in "
                f"C = {n_clusters} clusters gives {tile} after padding members and clusters to powers of two",
            )
    return Support(True, "runs")


def _to_float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float32).contiguous()


def _exchange_buffer(plan: _Plan, programs: int, like: Tensor) -> Tensor | None:
    """Allocate the memory in which ``_couple`` exchanges sums if the matrix is wide."""
    if not plan.constants["WIDE"]:
        return None
    return like.new_empty(programs, plan.constants["R"], plan.constants["C_PAD"], dtype=torch.float32)


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context with the device of ``x`` as current device, on which Triton launches."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def forward(arguments: Arguments, keep_v: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return spikes, membrane potentials (empty unless ``keep_v``) and the last state."""
    x, v, i_syn, refractory, threshold, beta_mem, beta_syn, coupling, v_reset, refractory_steps, *_ = arguments
    T, N, D = x.shape
    x = x.contiguous()
    spikes, v_seq = torch.empty_like(x), x.new_empty(T if keep_v else 0, N, D)
    v_last, i_last = (x.new_empty(N, D, dtype=torch.float32) for _ in range(2))
    refractory_last = x.new_empty(N, D, dtype=torch.int32)
    if spikes.numel():
        plan = _plan(N, D, 0 if coupling is None else coupling.shape[0])
        programs = _programs(plan, x.device, 64)
        length, segments = _segments(T, plan)
        with _device_of(x):
            _forward[(programs, plan.columns)](
                x_ptr=x,
                v_ptr=_to_float32(v),
                i_ptr=_to_float32(i_syn),
                refractory_ptr=None if refractory is None else refractory.contiguous(),
                threshold_ptr=_to_float32(threshold),
                beta_mem_ptr=_to_float32(beta_mem),
                beta_syn_ptr=_to_float32(beta_syn),
                coupling_t_ptr=None if coupling is None else _to_float32(coupling.t()),
                exchange_ptr=_exchange_buffer(plan, programs, x),
                spikes_ptr=spikes,
                v_seq_ptr=v_seq if keep_v else None,
                v_last_ptr=v_last,
                i_last_ptr=i_last,
                refractory_last_ptr=refractory_last,
                T=T,
                N=N,
                blocks=plan.blocks,
                v_reset=float(v_reset),
                refractory_steps=refractory_steps,
                LENGTH=length,
                PADDED=length * segments > T,
                num_warps=plan.warps,
                maxnreg=128,
                enable_fp_fusion=False,
                **plan.constants,
            )
    return spikes, v_seq, v_last, i_last, refractory_last


def backward(
    grads: OutputGradients, arguments: Arguments, surrogate: str, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, v and i_syn (empty without a state), threshold, both betas, coupling (or empty)."""
    x, v, i_syn, refractory, threshold, beta_mem, beta_syn, coupling, v_reset, refractory_steps, *_ = arguments
    T, N, D = x.shape
    C = 0 if coupling is None else coupling.shape[0]
    x = x.contiguous()
    floats: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    grad_x = torch.empty_like(x)
    grad_v, grad_i = (torch.empty(0 if v is None else N, D, **floats) for _ in range(2))
    if not x.numel():
        grad_beta_mem, grad_beta_syn = torch.zeros_like(beta_mem), torch.zeros_like(beta_syn)
        return (
            grad_x,
            grad_v,
            grad_i,
            torch.zeros(D, **floats),
            grad_beta_mem,
            grad_beta_syn,
            torch.zeros(C, C, **floats),
        )
    plan = _plan(N, D, C)
    programs = _programs(plan, x.device, 12)
    length, segments = _segments(T, plan)
    segment_starts = None
    if segments > 1:
        segment_starts = torch.empty(programs * plan.columns, segments, 3, plan.tile, **floats)
    grad_threshold = torch.empty(programs, D, **floats)
    grad_betas = torch.empty(programs * plan.columns, 2, **floats)
    sums, grad_sums = torch.empty(T, N, C, **floats), torch.empty(T, N, C, **floats)
    with _device_of(x):
        _backward[(programs, plan.columns)](
            grad_spikes_ptr=grads.spikes.contiguous(),
            grad_v_seq_ptr=None if grads.v_seq is None else grads.v_seq.contiguous(),
            grad_v_last_ptr=_to_float32(grads.v_last),
            grad_i_last_ptr=_to_float32(grads.i_last),
            x_ptr=x,
            v_ptr=_to_float32(v),
            i_ptr=_to_float32(i_syn),
            refractory_ptr=None if refractory is None else refractory.contiguous(),
            threshold_ptr=_to_float32(threshold),
            beta_mem_ptr=_to_float32(beta_mem),
            beta_syn_ptr=_to_float32(beta_syn),
            coupling_ptr=_to_float32(coupling),
            coupling_t_ptr=None if coupling is None else _to_float32(coupling.t()),
            exchange_ptr=_exchange_buffer(plan, programs, x),
            segment_starts_ptr=segment_starts,
            grad_x_ptr=grad_x,
            grad_v_ptr=None if v is None else grad_v,
            grad_i_ptr=None if v is None else grad_i,
            grad_threshold_ptr=grad_threshold,
            grad_betas_ptr=grad_betas,
            sums_ptr=sums,
            grad_sums_ptr=grad_sums,
            T=T,
            N=N,
            blocks=plan.blocks,
            segments=segments,
            v_reset=float(v_reset),
            refractory_steps=refractory_steps,
            alpha=float(alpha),
            LENGTH=length,
            PADDED=length * segments > T,
            SURROGATE=SURROGATE_IDS[surrogate],
            num_warps=plan.warps,
            maxnreg=168 if plan.warps <= 4 else 128,
            enable_fp_fusion=False,
            **plan.constants,
        )
    # Two separate sums: outputs of an op must not share memory.
    grad_beta_mem, grad_beta_syn = grad_betas[:, 0].sum(), grad_betas[:, 1].sum()
    with torch.autocast(x.device.type, enabled=False):
        grad_coupling = grad_sums.flatten(0, 1).T @ sums.flatten(0, 1)
    return (
        grad_x,
        grad_v,
        grad_i,
        grad_threshold.sum(0),
        grad_beta_mem.view_as(beta_mem),
        grad_beta_syn.view_as(beta_syn),
        grad_coupling,
    )
