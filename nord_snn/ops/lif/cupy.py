"""The associative LIF neuron in CUDA C, launched through CuPy.

A thread block walks whole rows through all time steps with the state of their neurons in registers. The forward pass
stores spikes (and membranes where asked for); the backward pass stores nothing else beforehand but recomputes the
membranes from ``x``: it walks there again, leaves 8 bytes an element and step in a scratch that each block of a grid no
larger than the device uses for one group of rows after the other, and walks back. Without membranes that moves 8 + 12
bytes an element and step through device memory in float32 and 4 + 6 in 16 bits, as long as the scratch, 8 T bytes for
each neuron at work, stays in the second-level cache.
"""

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nord_snn.ops.dispatch import Call, Support
from nord_snn.ops.lif.support import knows_surrogate

__all__ = ["SURROGATE_IDS", "accepts", "backward", "fits", "forward"]

#: The rows of :data:`nord_snn.ops.SURROGATES` that ``slope`` knows.
SURROGATE_IDS = {"nord_atan": 0, "atan": 1, "sigmoid": 2, "fast_sigmoid": 3}

#: The dtypes of sequences that the kernels read and write; ``SCALAR`` in the source.
_SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# What both kernels share. It needs no header, so that NVRTC alone compiles it. The build says by macros
#   SCALAR                      the dtype of x, spikes and their gradients: 0 float, 1 half, 2 bfloat16
#   N_FEATURES, N_CLUSTERS      D and C; without a cascade (CASCADE 0) every neuron is a cluster of its own
#   LANES, GROUPS, ROWS         how threads share the rows, see _Plan
#   COUPLING_SHARED             whether the coupling fits into shared memory
#   UNROLL                      how many neurons of a thread are written out, so that their state stays in registers
#   BLOCKS_PER_SM               how many thread blocks must fit on a multiprocessor, which bounds the registers
_COMMON = r"""
constexpr int D = N_FEATURES, C = N_CLUSTERS, MEMBERS = D / C;
constexpr int WIDTH = LANES * GROUPS;                      // threads of a row
constexpr int THREADS = WIDTH * ROWS;
constexpr int SHARES = (C + LANES - 1) / LANES;            // clusters of a thread
constexpr int PER_SHARE = (MEMBERS + GROUPS - 1) / GROUPS; // neurons of a thread in each of them
constexpr int OWN = SHARES * PER_SHARE;                    // neurons of a thread
static_assert(D % C == 0, "every cluster has equally many members");
static_assert(GROUPS == 1 || LANES == C, "threads that split a cluster have just one");

#if SCALAR == 0
typedef float scalar;
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float narrow(float value) { return value; }
#else
typedef unsigned short scalar;
#if SCALAR == 1
#ifdef CUDA_ON_CPU
__device__ __forceinline__ float widen(scalar bits) { return half_to_float(bits); }
__device__ __forceinline__ scalar narrow(float value) { return float_to_half(value); }
#else
__device__ __forceinline__ float widen(scalar bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ scalar narrow(float value) {
    scalar bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif
#else
__device__ __forceinline__ float widen(scalar bits) { return __uint_as_float((unsigned)bits << 16); }
__device__ __forceinline__ scalar narrow(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) return 0x7fc0;
    return (scalar)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); // to nearest, ties to even
}
#endif
#endif

// Sequences pass by once: marked as streaming, they leave the cache to the scratch of the backward pass.
__device__ __forceinline__ float load(const scalar *from) { return widen(__ldcs(from)); }
__device__ __forceinline__ void store(scalar *to, float value) { __stcs(to, narrow(value)); }

struct Constants {
    float beta_mem, beta_syn, v_reset;
    int refractory_steps;
};

struct Neuron {
    float v, i;
    int refractory;
};

// Where a thread stands: its row in the block, its place there, and its neurons place + OFFSET(share, member).
// Neuron d belongs to cluster d % C; all neurons of a share are members of the same cluster, lane + share * LANES.
struct Place {
    int row, place, lane, group;
    __device__ __forceinline__ Place()
        : row(threadIdx.x / WIDTH), place(threadIdx.x % WIDTH), lane(place % LANES), group(place / LANES) {}
    __device__ __forceinline__ int cluster(int share) const { return lane + share * LANES; }
    __device__ __forceinline__ int neuron(int share, int member) const {
        return place + share * LANES + member * GROUPS * C;
    }
    __device__ __forceinline__ bool owns(int share, int member) const {
        return (C % LANES == 0 || cluster(share) < C) && (MEMBERS % GROUPS == 0 || group + member * GROUPS < MEMBERS);
    }
};

#define FOR_EACH_SHARE _Pragma("unroll") for (int share = 0; share < SHARES; ++share)
#define FOR_EACH_NEURON                                                                              \
    _Pragma("unroll UNROLL") for (int n = 0, share = 0, member = 0; n < OWN;                         \
                                  ++n, share = n / PER_SHARE, member = n % PER_SHARE)                \
        if (at.owns(share, member))

// u - threshold >= 0, also where denormal numbers count as zero.
__device__ __forceinline__ bool fires(float u, float threshold) { return u >= threshold; }

// One time step of one neuron; returns the membrane before firing. The cascade of the step is added to i by the caller.
__device__ __forceinline__ float advance(
    Neuron &neuron, float x, float threshold, const Constants &constants, float &spike
) {
    neuron.i = constants.beta_syn * neuron.i + x;
    const float free = constants.beta_mem * neuron.v + (1.0f - constants.beta_mem) * neuron.i;
    const float u = neuron.refractory > 0 ? constants.v_reset : free;
    const bool fired = fires(u, threshold);
    spike = fired ? 1.0f : 0.0f;
    neuron.v = u - spike * threshold;
    neuron.refractory = fired ? constants.refractory_steps : neuron.refractory > 0 ? neuron.refractory - 1 : 0;
    return u;
}

#if CASCADE
constexpr int PADDED = (C + 3) / 4 * 4; // clusters, so that four are read at once
constexpr int PITCH = C | 1;            // odd: a column then lies in 32 different banks

struct Shared {
    float totals[2][ROWS][PADDED];
    float parts[GROUPS > 1 ? THREADS : 1];
    float coupling[COUPLING_SHARED ? C * PITCH : 1]; // transposed
};

__device__ __forceinline__ void load_coupling(Shared &shared, const float *coupling) {
#if COUPLING_SHARED
    for (int n = threadIdx.x; n < C * C; n += THREADS) shared.coupling[n % C * PITCH + n / C] = coupling[n];
    __syncthreads();
#endif
}

// Sums over the members of each cluster of a row: every thread brings the sums over its own neurons. The order is
// fixed. Two buffers take turns, so that one barrier does: who is here again has passed the barrier of the turn before.
__device__ __forceinline__ const float *sum_members(
    Shared &shared, const Place &at, const float (&own)[SHARES], int &turn
) {
    turn ^= 1;
    float *totals = shared.totals[turn][at.row];
    if (GROUPS == 1) {
        FOR_EACH_SHARE if (at.cluster(share) < C) totals[at.cluster(share)] = own[share];
    } else {
        shared.parts[threadIdx.x] = own[0];
        __syncthreads();
        if (at.group == 0) {
            float total = own[0];
            for (int group = 1; group < GROUPS; ++group) total += shared.parts[threadIdx.x + group * LANES];
            totals[at.lane] = total;
        }
    }
    __syncthreads();
    return totals;
}

// sum over k of weights[k * step] * totals[k]
__device__ __forceinline__ float couple(const float *weights, int step, const float *totals) {
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f; // four sums do not wait for one another
    int k = 0;
#pragma unroll 4
    for (; k + 4 <= C; k += 4) {
        const float4 four = *(const float4 *)(totals + k);
        a = fmaf(weights[k * step], four.x, a);
        b = fmaf(weights[(k + 1) * step], four.y, b);
        c = fmaf(weights[(k + 2) * step], four.z, c);
        d = fmaf(weights[(k + 3) * step], four.w, d);
    }
    for (; k < C; ++k) a = fmaf(weights[k * step], totals[k], a);
    return (a + b) + (c + d);
}

// The current that each cluster of this thread receives from the spikes of all.
__device__ __forceinline__ void cascade(
    const Shared &shared, const float *coupling_t, const Place &at, const float *totals, float (&current)[SHARES]
) {
    FOR_EACH_SHARE {
        const int c = at.cluster(share);
        if (c >= C) continue;
        current[share] =
            COUPLING_SHARED ? couple(shared.coupling + c, PITCH, totals) : couple(coupling_t + c, C, totals);
    }
}

// The same backwards: what each cluster's spikes are worth, from what its current is worth to all.
__device__ __forceinline__ void cascade_back(
    const Shared &shared, const float *coupling, const Place &at, const float *totals, float (&grad_fired)[SHARES]
) {
    FOR_EACH_SHARE {
        const int c = at.cluster(share);
        if (c >= C) continue;
        grad_fired[share] =
            COUPLING_SHARED ? couple(shared.coupling + c * PITCH, 1, totals) : couple(coupling + c, C, totals);
    }
}
#endif
"""

_FORWARD = (
    _COMMON
    + r"""
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) associative_lif_forward(
    const scalar *x, const float *v, const float *i_syn, const int *refractory, const float *threshold_in,
    const float *beta_mem, const float *beta_syn, const float *coupling, const float *coupling_t, double v_reset,
    long long refractory_steps, long long T, long long N, scalar *spikes, scalar *v_seq, float *v_last, float *i_last,
    int *refractory_last
) {
    const Place at;
    const Constants constants = {*beta_mem, *beta_syn, (float)v_reset, (int)refractory_steps};
    float threshold[OWN];
    FOR_EACH_NEURON threshold[n] = threshold_in[at.neuron(share, member)];
#if CASCADE
    __shared__ __align__(16) Shared shared;
    load_coupling(shared, coupling);
    int turn = 0;
#endif
    for (long long first = (long long)blockIdx.x * ROWS; first < N; first += (long long)gridDim.x * ROWS) {
        // Threads that no row is left for come to every barrier as well: they repeat the last row and store nothing.
        const bool active = first + at.row < N;
        const long long start = (active ? first + at.row : N - 1) * D;
        Neuron neurons[OWN];
        float ahead[OWN];
        FOR_EACH_NEURON {
            const long long d = start + at.neuron(share, member);
            neurons[n].v = v ? v[d] : 0.0f;
            neurons[n].i = i_syn ? i_syn[d] : 0.0f;
            neurons[n].refractory = refractory ? refractory[d] : 0;
            ahead[n] = load(x + d);
        }
        for (long long t = 0; t < T; ++t) {
            const long long base = t * N * D + start;
            float fired[SHARES] = {};
            float now[OWN];
            FOR_EACH_NEURON {
                now[n] = ahead[n];
                if (t + 1 < T) ahead[n] = load(x + base + N * D + at.neuron(share, member)); // before the barrier
            }
            FOR_EACH_NEURON {
                const long long d = base + at.neuron(share, member);
                float spike;
                advance(neurons[n], now[n], threshold[n], constants, spike);
                fired[share] += spike;
                if (active) store(spikes + d, spike);
                if (active && v_seq) store(v_seq + d, neurons[n].v);
            }
#if CASCADE
            float current[SHARES] = {};
            cascade(shared, coupling_t, at, sum_members(shared, at, fired, turn), current);
            FOR_EACH_NEURON neurons[n].i += current[share];
#endif
        }
        if (!active) continue;
        FOR_EACH_NEURON {
            const long long d = start + at.neuron(share, member);
            v_last[d] = neurons[n].v;
            i_last[d] = neurons[n].i;
            refractory_last[d] = neurons[n].refractory;
        }
    }
}
"""
)

_BACKWARD = (
    _COMMON
    + r"""
// Derivative of the spike by u at x = u - threshold, as in surrogate.py. SURROGATE is the name's number.
#define PI 3.14159265358979f
__device__ __forceinline__ float slope(float x, float alpha) {
#if SURROGATE == 0
    const float z = alpha * x;
    return alpha / (2.0f * PI * (1.0f + z * z));
#elif SURROGATE == 1
    const float z = PI / 2.0f * alpha * x;
    return alpha / (2.0f * (1.0f + z * z));
#elif SURROGATE == 2
    const float z = expf(-fabsf(alpha * x)); // an even function: the side that cannot overflow
    return alpha * z / ((1.0f + z) * (1.0f + z));
#else
    const float z = 1.0f + alpha * fabsf(x);
    return 1.0f / (z * z);
#endif
}

#if CASCADE
// grad_coupling[c][k] (+)= sum over steps of grad_sums[step][c] * sums[step][k], in tiles of four by four.
__device__ __forceinline__ void add_outer_products(
    const float *grad_sums, const float *sums, long long steps, bool add, float *grad_coupling
) {
    constexpr int TILES = PADDED / 4;
    for (int tile = threadIdx.x; tile < TILES * TILES; tile += THREADS) {
        const int c = tile / TILES * 4, k = tile % TILES * 4;
        float total[4][4] = {};
#pragma unroll 2
        for (long long step = 0; step < steps; ++step) {
            const float4 left = *(const float4 *)(grad_sums + step * PADDED + c);
            const float4 right = *(const float4 *)(sums + step * PADDED + k);
            const float lefts[4] = {left.x, left.y, left.z, left.w};
            const float rights[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) total[i][j] = fmaf(lefts[i], rights[j], total[i][j]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (c + i >= C || k + j >= C) continue; // what lies behind the last cluster was never written
                float *to = grad_coupling + (c + i) * C + k + j;
                *to = (add ? *to : 0.0f) + total[i][j];
            }
        }
    }
}
#endif

// record [block, T, ROWS, D] holds of every step u and i (before the cascade), from which the way back has the rest: it
// knows v and i before the step from the step before. The lowest bit of i, which only gradients of the betas see, says
// whether the neuron was held. history [block, 3, T, ROWS, PADDED] holds spikes summed over clusters, the currents that
// came of them, and gradients of those. Where gradients are summed over rows, every thread or block has a sum of its own.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) associative_lif_backward(
    const scalar *grad_spikes, const scalar *grad_v_seq, const float *grad_v_last, const float *grad_i_last,
    const scalar *x, const float *v, const float *i_syn, const int *refractory, const float *threshold_in,
    const float *beta_mem, const float *beta_syn, const float *coupling, const float *coupling_t, double v_reset,
    long long refractory_steps, double alpha_in, long long T, long long N, float2 *record, float *history,
    scalar *grad_x, float *grad_v_first, float *grad_i_first, float *grad_threshold, float2 *grad_betas,
    float *grad_coupling
) {
    const Place at;
    const Constants constants = {*beta_mem, *beta_syn, (float)v_reset, (int)refractory_steps};
    const float alpha = (float)alpha_in;
    float threshold[OWN], threshold_sum[OWN];
    FOR_EACH_NEURON {
        threshold[n] = threshold_in[at.neuron(share, member)];
        threshold_sum[n] = 0.0f;
    }
    float beta_mem_sum = 0.0f, beta_syn_sum = 0.0f;
    record += ((long long)blockIdx.x * T * ROWS + at.row) * D;
#if CASCADE
    __shared__ __align__(16) Shared shared;
    load_coupling(shared, coupling);
    int turn = 0;
    const long long size = T * ROWS * PADDED;
    float *const sums = history + (long long)blockIdx.x * 3 * size, *const currents = sums + size;
    float *const grad_sums = currents + size;
    grad_coupling += (long long)blockIdx.x * C * C;
#endif
    for (long long first = (long long)blockIdx.x * ROWS; first < N; first += (long long)gridDim.x * ROWS) {
        const bool active = first + at.row < N; // as in the forward pass; and what is not stored is not summed either
        const long long start = (active ? first + at.row : N - 1) * D;
        {
            Neuron neurons[OWN];
            float ahead[OWN];
            FOR_EACH_NEURON {
                const long long d = start + at.neuron(share, member);
                neurons[n].v = v ? v[d] : 0.0f;
                neurons[n].i = i_syn ? i_syn[d] : 0.0f;
                neurons[n].refractory = refractory ? refractory[d] : 0;
                ahead[n] = load(x + d);
            }
            for (long long t = 0; t < T; ++t) {
                const long long next = (t + 1) * N * D + start;
                float fired[SHARES] = {};
                float now[OWN];
                FOR_EACH_NEURON {
                    now[n] = ahead[n];
                    if (t + 1 < T) ahead[n] = load(x + next + at.neuron(share, member));
                }
                FOR_EACH_NEURON {
                    const unsigned held = neurons[n].refractory > 0;
                    float spike;
                    const float u = advance(neurons[n], now[n], threshold[n], constants, spike);
                    fired[share] += spike;
                    const float marked = __uint_as_float((__float_as_uint(neurons[n].i) & ~1u) | held);
                    record[t * ROWS * D + at.neuron(share, member)] = make_float2(u, marked);
                }
#if CASCADE
                const float *totals = sum_members(shared, at, fired, turn);
                float current[SHARES] = {};
                if (t + 1 < T) cascade(shared, coupling_t, at, totals, current);
                if (at.group == 0) {
                    FOR_EACH_SHARE {
                        const int c = at.cluster(share);
                        if (c >= C) continue;
                        sums[(t * ROWS + at.row) * PADDED + c] = totals[c];
                        currents[(t * ROWS + at.row) * PADDED + c] = current[share];
                    }
                }
                FOR_EACH_NEURON neurons[n].i += current[share];
#endif
            }
        }
        float grad_v[OWN], grad_i[OWN];
        float2 now[OWN];
        FOR_EACH_NEURON {
            const long long d = start + at.neuron(share, member);
            grad_v[n] = grad_v_last ? grad_v_last[d] : 0.0f;
            grad_i[n] = grad_i_last ? grad_i_last[d] : 0.0f;
            now[n] = record[(T - 1) * ROWS * D + at.neuron(share, member)];
        }
        float beta_mem_row = 0.0f, beta_syn_row = 0.0f; // sums of sums lose fewer digits
        for (long long t = T - 1; t >= 0; --t) {
            const long long base = t * N * D + start;
            float grad_spike[OWN];
            float2 before[OWN];
            float felt[SHARES] = {}, grad_fired[SHARES] = {};
            FOR_EACH_NEURON { // all loads first: they are on their way while the block waits at the barrier
                const int d = at.neuron(share, member);
                grad_spike[n] = load(grad_spikes + base + d);
                if (grad_v_seq) grad_v[n] += load(grad_v_seq + base + d);
                if (t > 0) {
                    before[n] = record[(t - 1) * ROWS * D + d];
                } else {
                    before[n].x = v ? v[start + d] : 0.0f;
                    before[n].y = i_syn ? i_syn[start + d] : 0.0f;
                }
            }
#if CASCADE
            FOR_EACH_SHARE { // written at least one barrier ago: the current of the last step is never read
                if (t > 0 && at.cluster(share) < C)
                    felt[share] = currents[((t - 1) * ROWS + at.row) * PADDED + at.cluster(share)];
            }
            float own[SHARES] = {};
            FOR_EACH_NEURON own[share] += active ? grad_i[n] : 0.0f;
            const float *totals = sum_members(shared, at, own, turn);
            cascade_back(shared, coupling, at, totals, grad_fired);
            if (at.group == 0) {
                FOR_EACH_SHARE {
                    const int c = at.cluster(share);
                    if (c < C) grad_sums[(t * ROWS + at.row) * PADDED + c] = totals[c];
                }
            }
#endif
            FOR_EACH_NEURON {
                const float over = now[n].x - threshold[n];
                const bool held = __float_as_uint(now[n].y) & 1u;
                const float through =
                    (grad_spike[n] + grad_fired[share] - threshold[n] * grad_v[n]) * slope(over, alpha);
                const float grad_u = held ? 0.0f : grad_v[n] + through;
                const float grad_current = grad_i[n] + (1.0f - constants.beta_mem) * grad_u;
                float v_before = before[n].x;
                if (t > 0 && fires(v_before, threshold[n])) v_before -= threshold[n];
                if (active) threshold_sum[n] -= through;
                beta_mem_row = fmaf(grad_u, v_before - now[n].y, beta_mem_row);
                beta_syn_row = fmaf(grad_current, before[n].y + felt[share], beta_syn_row);
                grad_v[n] = constants.beta_mem * grad_u;
                grad_i[n] = constants.beta_syn * grad_current;
                now[n] = before[n];
                if (active) store(grad_x + base + at.neuron(share, member), grad_current);
            }
        }
        beta_mem_sum += active ? beta_mem_row : 0.0f;
        beta_syn_sum += active ? beta_syn_row : 0.0f;
        if (active && grad_v_first) {
            FOR_EACH_NEURON {
                grad_v_first[start + at.neuron(share, member)] = grad_v[n];
                grad_i_first[start + at.neuron(share, member)] = grad_i[n];
            }
        }
#if CASCADE
        __syncthreads(); // the history is complete; it is not written again before the next barrier, in sum_members
        add_outer_products(grad_sums, sums, T * ROWS, first >= (long long)gridDim.x * ROWS, grad_coupling);
#endif
    }
    FOR_EACH_NEURON
        grad_threshold[((long long)blockIdx.x * ROWS + at.row) * D + at.neuron(share, member)] = threshold_sum[n];
    grad_betas[(long long)blockIdx.x * THREADS + threadIdx.x] = make_float2(beta_mem_sum, beta_syn_sum);
}
"""
)

_SOURCES = {"associative_lif_forward": _FORWARD, "associative_lif_backward": _BACKWARD}

#: A fused multiply-add changes the last bit of u and can flip a spike. CuPy appends -ftz=true to whatever it is given, and
#: the last word counts: denormal numbers become zero there, which ``fires`` allows for.
_FLAGS = ("-std=c++17", "-fmad=false", "-prec-div=true")

_BLOCK = 256  # threads of a block, unless a row has more
_WIDEST = 512  # threads of a row at most
_OWN = 8  # neurons of a thread, where the row is wide enough
_UNROLLED = 16  # more neurons a thread than this live in local memory instead of registers
_RESIDENT = {
    "associative_lif_forward": 1024,
    "associative_lif_backward": 512,
}  # threads of a multiprocessor: 64, 128 registers each
_SHARED = 24 * 1024  # bytes of shared memory that the coupling may take of a block
_MOST_CLUSTERS = 4096  # their sums take two times 16 of the 48 KiB of shared memory that every device has
_PARTIALS = 1 << 28  # bytes of partial sums for the gradient of the coupling


class _Plan(NamedTuple):
    """How the threads of a block share its rows.

    A row has ``lanes * groups`` threads. A thread has one cluster, or several at a distance of ``lanes``; where there are
    more members than a thread should have, ``groups`` threads split each cluster among them.
    """

    clusters: int
    lanes: int
    groups: int
    rows: int
    own: int

    @property
    def threads(self) -> int:
        return self.lanes * self.groups * self.rows


def _plan(n_features: int, n_clusters: int) -> _Plan:
    """The plan for D neurons in C clusters; C = 0 for no cascade."""
    clusters = n_clusters or n_features
    members = n_features // clusters
    # Without a cascade a thread may take neurons as it likes: enough for a row's threads to fill a warp.
    widest = _WIDEST if n_clusters else min(_WIDEST, -(-n_features // max(1, min(_OWN, n_features // 32))))
    shares = -(-clusters // widest)
    lanes = -(-clusters // shares)
    groups = 1 if shares > 1 else max(1, min(-(-members // _OWN), widest // lanes))
    rows = max(1, _BLOCK // (lanes * groups))
    return _Plan(clusters, lanes, groups, rows, shares * -(-members // groups))


def accepts(call: Call) -> Support:
    """Return whether the kernels can run a call."""
    known = knows_surrogate(call, SURROGATE_IDS)
    return fits(call.n_features, dict(call.options)["n_clusters"]) if known.runs else known


def fits(n_features: int, n_clusters: int) -> Support:
    """Whether the kernels can run D neurons in C clusters (0: no cascade), and if not why."""
    if n_clusters > _MOST_CLUSTERS:
        return Support(
            False,
            f"the CUDA kernel keeps sums over clusters in shared memory, which has room for {_MOST_CLUSTERS} clusters, "
            f"not {n_clusters}",
        )
    return Support(True, "runs")


def _coupling_is_shared(n_clusters: int) -> bool:
    return 4 * n_clusters * (n_clusters | 1) <= _SHARED


def _options(kernel: str, dtype: torch.dtype, n_features: int, n_clusters: int, surrogate: int = 0) -> tuple[str, ...]:
    """What a build is made for; the names are explained above ``_COMMON``."""
    plan = _plan(n_features, n_clusters)
    macros = {
        "SCALAR": _SCALARS[dtype],
        "N_FEATURES": n_features,
        "N_CLUSTERS": plan.clusters,
        "CASCADE": int(n_clusters > 0),
        "LANES": plan.lanes,
        "GROUPS": plan.groups,
        "ROWS": plan.rows,
        "COUPLING_SHARED": int(_coupling_is_shared(n_clusters)),
        "UNROLL": plan.own if plan.own <= _UNROLLED else 1,
        "BLOCKS_PER_SM": _blocks_per_multiprocessor(kernel, plan),
        "SURROGATE": surrogate,
    }
    return tuple(f"-D{name}={value}" for name, value in macros.items())


def _blocks_per_multiprocessor(kernel: str, plan: _Plan) -> int:
    return max(1, _RESIDENT[kernel] // plan.threads)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _compile(kernel: str, options: tuple[str, ...], device: int) -> Any:
    """The kernel for one set of options; CuPy keeps what it compiles on disk as well."""
    cupy = importlib.import_module("cupy")
    return cupy.RawModule(code=_SOURCES[kernel], options=_FLAGS + options).get_function(kernel)


def _launch(
    kernel: str, options: tuple[str, ...], device: torch.device, grid: int, block: int, args: list[Any]
) -> None:
    """Run a kernel on torch's current stream of ``device``; CuPy would take its own device and stream.

    All parameters have 64 bits: a tensor is passed as its address, None as a null pointer, and Python's numbers as they are.
    Memory that is freed after the launch is safe, since torch hands it out again for this stream only.
    """
    cupy = importlib.import_module("cupy")
    values = tuple(0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in args)
    index = torch.cuda.current_device() if device.index is None else device.index
    with cupy.cuda.Device(index), cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, index):
        _compile(kernel, options, index)((grid,), (block,), values)


def _prepare(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(dtype).contiguous()


def _couplings(coupling: Tensor | None) -> tuple[int, Tensor | None, Tensor | None]:
    """C, the coupling, and its transpose where the kernels read both from device memory."""
    if coupling is None:
        return 0, None, None
    coupling = coupling.detach().float().contiguous()
    C = coupling.shape[0]
    return C, coupling, None if _coupling_is_shared(C) else coupling.T.contiguous()


def forward(
    x: Tensor,
    v: Tensor | None,
    i_syn: Tensor | None,
    refractory: Tensor | None,
    threshold: Tensor,
    beta_mem: Tensor,
    beta_syn: Tensor,
    coupling: Tensor | None,
    v_reset: float,
    refractory_steps: int,
    keep_v: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Spikes, membranes (empty unless ``keep_v``) and the last state; the arguments are those of the op in ``op.py``."""
    T, N, D = x.shape
    kernel = "associative_lif_forward"
    spikes = torch.empty(T, N, D, dtype=x.dtype, device=x.device)
    v_seq = torch.empty(T if keep_v else 0, N, D, dtype=x.dtype, device=x.device)
    v_last, i_last = (torch.empty(N, D, device=x.device) for _ in range(2))
    refractory_last = torch.empty(N, D, dtype=torch.int32, device=x.device)
    if N and D:
        C, coupling, coupling_t = _couplings(coupling)
        plan = _plan(D, C)
        blocks = min(-(-N // plan.rows), _multiprocessors(x.device) * _blocks_per_multiprocessor(kernel, plan))
        args = [
            _prepare(x, x.dtype),
            _prepare(v, torch.float32),
            _prepare(i_syn, torch.float32),
            _prepare(refractory, torch.int32),
            _prepare(threshold, torch.float32),
            _prepare(beta_mem, torch.float32),
            _prepare(beta_syn, torch.float32),
            coupling,
            coupling_t,
            float(v_reset),
            refractory_steps,
            T,
            N,
            spikes,
            v_seq if keep_v else None,
            v_last,
            i_last,
            refractory_last,
        ]
        _launch(kernel, _options(kernel, x.dtype, D, C), x.device, blocks, plan.threads, args)
    return spikes, v_seq, v_last, i_last, refractory_last


def backward(
    grad_spikes: Tensor,
    grad_v_seq: Tensor | None,
    grad_v_last: Tensor | None,
    grad_i_last: Tensor | None,
    x: Tensor,
    v: Tensor | None,
    i_syn: Tensor | None,
    refractory: Tensor | None,
    threshold: Tensor,
    beta_mem: Tensor,
    beta_syn: Tensor,
    coupling: Tensor | None,
    v_reset: float,
    refractory_steps: int,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, v, i_syn (empty without a state), threshold, both betas and coupling (empty without one)."""
    T, N, D = x.shape
    kernel = "associative_lif_backward"
    C, coupling, coupling_t = _couplings(coupling)
    grad_x = torch.empty(T, N, D, dtype=x.dtype, device=x.device)
    grad_v, grad_i = (torch.empty(0 if v is None else N, D, device=x.device) for _ in range(2))
    plan = _plan(D, C) if D else _Plan(0, 0, 0, 1, 0)
    blocks = 0
    if N and D:
        blocks = min(-(-N // plan.rows), _multiprocessors(x.device) * _blocks_per_multiprocessor(kernel, plan))
        if C:
            blocks = min(blocks, max(1, _PARTIALS // (4 * C * C)))
    # One part for each block, or row or thread of a block; without blocks their sums are the zeros that are due.
    grad_threshold = torch.empty(blocks * plan.rows, D, device=x.device)
    grad_betas = torch.empty(blocks * plan.threads, 2, device=x.device)
    grad_coupling = torch.empty(blocks, C, C, device=x.device)
    if blocks:
        record = torch.empty(blocks, T, plan.rows, D, 2, device=x.device)
        history = torch.empty(blocks, 3, T, plan.rows, -(-C // 4) * 4, device=x.device)
        args = [
            _prepare(grad_spikes, x.dtype),
            _prepare(grad_v_seq, x.dtype),
            _prepare(grad_v_last, torch.float32),
            _prepare(grad_i_last, torch.float32),
            _prepare(x, x.dtype),
            _prepare(v, torch.float32),
            _prepare(i_syn, torch.float32),
            _prepare(refractory, torch.int32),
            _prepare(threshold, torch.float32),
            _prepare(beta_mem, torch.float32),
            _prepare(beta_syn, torch.float32),
            coupling,
            coupling_t,
            float(v_reset),
            refractory_steps,
            float(alpha),
            T,
            N,
            record,
            history,
            grad_x,
            None if v is None else grad_v,
            None if v is None else grad_i,
            grad_threshold,
            grad_betas,
            grad_coupling,
        ]
        options = _options(kernel, x.dtype, D, C, SURROGATE_IDS[surrogate])
        _launch(kernel, options, x.device, blocks, plan.threads, args)
    # Two sums and not the halves of one: outputs of an op must not share memory.
    beta_mem_sum, beta_syn_sum = grad_betas[:, 0].sum(), grad_betas[:, 1].sum()
    return (
        grad_x,
        grad_v,
        grad_i,
        grad_threshold.sum(0),
        beta_mem_sum.view_as(beta_mem),
        beta_syn_sum.view_as(beta_syn),
        grad_coupling.sum(0),
    )
