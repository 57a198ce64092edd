"""The associative LIF neuron in CUDA C, launched through CuPy.

A thread block computes whole rows for all time steps, with the state of the neurons in registers. The forward pass
stores spikes, and membrane potentials on request, and saves nothing for the backward pass. The backward pass recomputes
the membrane potentials from ``x`` in a forward sweep, which writes 8 bytes per neuron and step to scratch memory, and
then goes through the steps in reverse. The grid has no more blocks than the device runs at once, and each block reuses
its scratch memory for one group of rows after the other. Without ``v_seq``, 8 + 12 bytes per neuron and step (forward +
backward) go through device memory in float32, and 4 + 6 in 16 bits, as long as the scratch memory, 8 T bytes for each
neuron being computed, stays in the L2 cache.
"""

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nord_snn.ops.dispatch import CallSignature, Support
from nord_snn.ops.lif.support import Arguments, OutputGradients, has_published_dynamics, supports_surrogate

__all__ = ["SURROGATE_IDS", "accepts", "backward", "fits", "forward"]

#: Surrogates that ``slope`` implements; names as in :data:`nord_snn.ops.SURROGATES`.
SURROGATE_IDS = {"nord_atan": 0, "atan": 1, "sigmoid": 2, "fast_sigmoid": 3}

#: Supported dtypes of sequences; the values of ``SCALAR`` in the source.
_SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Code shared by both kernels, without headers, so that NVRTC can compile it. Macros that the build sets:
#   SCALAR                      dtype of x, spikes and their gradients: 0 float, 1 half, 2 bfloat16
#   N_FEATURES, N_CLUSTERS      D and C; without a cascade (CASCADE 0) every neuron is its own cluster
#   LANES, GROUPS, ROWS         distribution of the rows over threads, see _Plan
#   COUPLING_SHARED             whether the coupling fits into shared memory
#   UNROLL                      unrolling of the loop over the neurons of a thread, which keeps their state in registers
#   BLOCKS_PER_SM               thread blocks that must fit on a multiprocessor, which limits the registers
_COMMON = r"""
constexpr int D = N_FEATURES, C = N_CLUSTERS, MEMBERS = D / C;
constexpr int WIDTH = LANES * GROUPS;                      // threads per row
constexpr int THREADS = WIDTH * ROWS;
constexpr int SHARES = (C + LANES - 1) / LANES;            // clusters per thread
constexpr int PER_SHARE = (MEMBERS + GROUPS - 1) / GROUPS; // neurons per thread and cluster
constexpr int PER_THREAD = SHARES * PER_SHARE;             // neurons per thread
static_assert(D % C == 0, "all clusters have the same number of members");
static_assert(GROUPS == 1 || LANES == C, "threads that split a cluster have one cluster each");

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

// Sequences are used once: streaming access keeps the cache free for the scratch memory of the backward pass.
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

// Position of a thread: its row in the block, its index in the row, and its neurons, see neuron(share, member).
// Neuron d belongs to cluster d % C; all neurons of a share are members of the same cluster, lane + share * LANES.
struct ThreadPosition {
    int row, index, lane, group;
    __device__ __forceinline__ ThreadPosition()
        : row(threadIdx.x / WIDTH), index(threadIdx.x % WIDTH), lane(index % LANES), group(index / LANES) {}
    __device__ __forceinline__ int cluster(int share) const { return lane + share * LANES; }
    __device__ __forceinline__ int neuron(int share, int member) const {
        return index + share * LANES + member * GROUPS * C;
    }
    __device__ __forceinline__ bool owns(int share, int member) const {
        return (C % LANES == 0 || cluster(share) < C) && (MEMBERS % GROUPS == 0 || group + member * GROUPS < MEMBERS);
    }
};

#define FOR_EACH_SHARE _Pragma("unroll") for (int share = 0; share < SHARES; ++share)
#define FOR_EACH_NEURON                                                               \
    _Pragma("unroll UNROLL") for (int n = 0, share = 0, member = 0; n < PER_THREAD;   \
                                  ++n, share = n / PER_SHARE, member = n % PER_SHARE) \
        if (thread.owns(share, member))

// u - threshold >= 0, also if denormal numbers are flushed to zero.
__device__ __forceinline__ bool fires(float u, float threshold) { return u >= threshold; }

// Compute one time step of one neuron; return the membrane potential before the reset. The caller adds the cascade to i.
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
constexpr int PADDED = (C + 3) / 4 * 4; // clusters, padded for reads of four at once
constexpr int PITCH = C | 1;            // odd, so that a column lies in 32 different banks

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

// Sum over the members of each cluster of a row, from the sums of each thread over its own neurons. The order is fixed.
// Two alternating buffers need only one barrier: a thread in the next call has passed the barrier of this one.
__device__ __forceinline__ const float *sum_members(
    Shared &shared, const ThreadPosition &thread, const float (&thread_sums)[SHARES], int &turn
) {
    turn ^= 1;
    float *totals = shared.totals[turn][thread.row];
    if (GROUPS == 1) {
        FOR_EACH_SHARE if (thread.cluster(share) < C) totals[thread.cluster(share)] = thread_sums[share];
    } else {
        shared.parts[threadIdx.x] = thread_sums[0];
        __syncthreads();
        if (thread.group == 0) {
            float total = thread_sums[0];
            for (int group = 1; group < GROUPS; ++group) total += shared.parts[threadIdx.x + group * LANES];
            totals[thread.lane] = total;
        }
    }
    __syncthreads();
    return totals;
}

// Return the sum over k of weights[k * step] * totals[k].
__device__ __forceinline__ float couple(const float *weights, int step, const float *totals) {
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f; // four accumulators hide the latency of the FMA
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

// Compute the current that each cluster of this thread receives from the spikes of all clusters.
__device__ __forceinline__ void cascade(
    const Shared &shared, const float *coupling_t, const ThreadPosition &thread, const float *totals,
    float (&current)[SHARES]
) {
    FOR_EACH_SHARE {
        const int c = thread.cluster(share);
        if (c >= C) continue;
        current[share] =
            COUPLING_SHARED ? couple(shared.coupling + c, PITCH, totals) : couple(coupling_t + c, C, totals);
    }
}

// Backward of cascade: the gradient of the spikes of each cluster, from the gradients of the currents of all clusters.
__device__ __forceinline__ void cascade_back(
    const Shared &shared, const float *coupling, const ThreadPosition &thread, const float *totals,
    float (&grad_spike_sums)[SHARES]
) {
    FOR_EACH_SHARE {
        const int c = thread.cluster(share);
        if (c >= C) continue;
        grad_spike_sums[share] =
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
    const ThreadPosition thread;
    const Constants constants = {*beta_mem, *beta_syn, (float)v_reset, (int)refractory_steps};
    float threshold[PER_THREAD];
    FOR_EACH_NEURON threshold[n] = threshold_in[thread.neuron(share, member)];
#if CASCADE
    __shared__ __align__(16) Shared shared;
    load_coupling(shared, coupling);
    int turn = 0;
#endif
    for (long long first = (long long)blockIdx.x * ROWS; first < N; first += (long long)gridDim.x * ROWS) {
        // Threads without a row must reach every barrier too: they repeat the last row and store nothing.
        const bool active = first + thread.row < N;
        const long long start = (active ? first + thread.row : N - 1) * D;
        Neuron neurons[PER_THREAD];
        float x_next[PER_THREAD];
        FOR_EACH_NEURON {
            const long long d = start + thread.neuron(share, member);
            neurons[n].v = v ? v[d] : 0.0f;
            neurons[n].i = i_syn ? i_syn[d] : 0.0f;
            neurons[n].refractory = refractory ? refractory[d] : 0;
            x_next[n] = load(x + d);
        }
        for (long long t = 0; t < T; ++t) {
            const long long base = t * N * D + start;
            float spike_sums[SHARES] = {};
            float now[PER_THREAD];
            FOR_EACH_NEURON {
                now[n] = x_next[n]; // load the next x before the barrier
                if (t + 1 < T) x_next[n] = load(x + base + N * D + thread.neuron(share, member));
            }
            FOR_EACH_NEURON {
                const long long d = base + thread.neuron(share, member);
                float spike;
                advance(neurons[n], now[n], threshold[n], constants, spike);
                spike_sums[share] += spike;
                if (active) store(spikes + d, spike);
                if (active && v_seq) store(v_seq + d, neurons[n].v);
            }
#if CASCADE
            float current[SHARES] = {};
            cascade(shared, coupling_t, thread, sum_members(shared, thread, spike_sums, turn), current);
            FOR_EACH_NEURON neurons[n].i += current[share];
#endif
        }
        if (!active) continue;
        FOR_EACH_NEURON {
            const long long d = start + thread.neuron(share, member);
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
// Surrogate derivative at x = u - threshold, as in surrogate.py. SURROGATE is the id of the name.
#define PI 3.14159265358979f
__device__ __forceinline__ float slope(float x, float alpha) {
#if SURROGATE == 0
    const float z = alpha * x;
    return alpha / (2.0f * PI * (1.0f + z * z));
#elif SURROGATE == 1
    const float z = PI / 2.0f * alpha * x;
    return alpha / (2.0f * (1.0f + z * z));
#elif SURROGATE == 2
    const float z = expf(-fabsf(alpha * x)); // even function: use the side that cannot overflow
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
                if (c + i >= C || k + j >= C) continue; // entries past the last cluster were never written
                float *to = grad_coupling + (c + i) * C + k + j;
                *to = (add ? *to : 0.0f) + total[i][j];
            }
        }
    }
}
#endif

// record [block, T, ROWS, D] stores u and i (before the cascade) of every step; the backward sweep derives v and i
// before a step from the record of the step before. The lowest bit of i, which affects the gradients of the betas only,
// marks refractory neurons. history [block, 3, T, ROWS, PADDED] stores spikes summed over clusters, the currents they
// cause, and the gradients of these currents. Gradients that are sums over rows have a partial sum for every thread or
// block.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) associative_lif_backward(
    const scalar *grad_spikes, const scalar *grad_v_seq, const float *grad_v_last, const float *grad_i_last,
    const scalar *x, const float *v, const float *i_syn, const int *refractory, const float *threshold_in,
    const float *beta_mem, const float *beta_syn, const float *coupling, const float *coupling_t, double v_reset,
    long long refractory_steps, double alpha_in, long long T, long long N, float2 *record, float *history,
    scalar *grad_x, float *grad_v_first, float *grad_i_first, float *grad_threshold, float2 *grad_betas,
    float *grad_coupling
) {
    const ThreadPosition thread;
    const Constants constants = {*beta_mem, *beta_syn, (float)v_reset, (int)refractory_steps};
    const float alpha = (float)alpha_in;
    float threshold[PER_THREAD], threshold_sum[PER_THREAD];
    FOR_EACH_NEURON {
        threshold[n] = threshold_in[thread.neuron(share, member)];
        threshold_sum[n] = 0.0f;
    }
    float beta_mem_sum = 0.0f, beta_syn_sum = 0.0f;
    record += ((long long)blockIdx.x * T * ROWS + thread.row) * D;
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
        const bool active = first + thread.row < N; // as in the forward pass; adds nothing to sums otherwise
        const long long start = (active ? first + thread.row : N - 1) * D;
        {
            Neuron neurons[PER_THREAD];
            float x_next[PER_THREAD];
            FOR_EACH_NEURON {
                const long long d = start + thread.neuron(share, member);
                neurons[n].v = v ? v[d] : 0.0f;
                neurons[n].i = i_syn ? i_syn[d] : 0.0f;
                neurons[n].refractory = refractory ? refractory[d] : 0;
                x_next[n] = load(x + d);
            }
            for (long long t = 0; t < T; ++t) {
                const long long next = (t + 1) * N * D + start;
                float spike_sums[SHARES] = {};
                float now[PER_THREAD];
                FOR_EACH_NEURON {
                    now[n] = x_next[n];
                    if (t + 1 < T) x_next[n] = load(x + next + thread.neuron(share, member));
                }
                FOR_EACH_NEURON {
                    const unsigned is_refractory = neurons[n].refractory > 0;
                    float spike;
                    const float u = advance(neurons[n], now[n], threshold[n], constants, spike);
                    spike_sums[share] += spike;
                    const float marked = __uint_as_float((__float_as_uint(neurons[n].i) & ~1u) | is_refractory);
                    record[t * ROWS * D + thread.neuron(share, member)] = make_float2(u, marked);
                }
#if CASCADE
                const float *totals = sum_members(shared, thread, spike_sums, turn);
                float current[SHARES] = {};
                if (t + 1 < T) cascade(shared, coupling_t, thread, totals, current);
                if (thread.group == 0) {
                    FOR_EACH_SHARE {
                        const int c = thread.cluster(share);
                        if (c >= C) continue;
                        sums[(t * ROWS + thread.row) * PADDED + c] = totals[c];
                        currents[(t * ROWS + thread.row) * PADDED + c] = current[share];
                    }
                }
                FOR_EACH_NEURON neurons[n].i += current[share];
#endif
            }
        }
        float grad_v[PER_THREAD], grad_i[PER_THREAD];
        float2 now[PER_THREAD];
        FOR_EACH_NEURON {
            const long long d = start + thread.neuron(share, member);
            grad_v[n] = grad_v_last ? grad_v_last[d] : 0.0f;
            grad_i[n] = grad_i_last ? grad_i_last[d] : 0.0f;
            now[n] = record[(T - 1) * ROWS * D + thread.neuron(share, member)];
        }
        float beta_mem_row = 0.0f, beta_syn_row = 0.0f; // partial sums lose fewer digits
        for (long long t = T - 1; t >= 0; --t) {
            const long long base = t * N * D + start;
            float grad_spike[PER_THREAD];
            float2 before[PER_THREAD];
            float cascade_in[SHARES] = {}, grad_spike_sums[SHARES] = {};
            FOR_EACH_NEURON { // load first, so that the latency overlaps the wait at the barrier
                const int d = thread.neuron(share, member);
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
                if (t > 0 && thread.cluster(share) < C)
                    cascade_in[share] = currents[((t - 1) * ROWS + thread.row) * PADDED + thread.cluster(share)];
            }
            float thread_sums[SHARES] = {};
            FOR_EACH_NEURON thread_sums[share] += active ? grad_i[n] : 0.0f;
            const float *totals = sum_members(shared, thread, thread_sums, turn);
            cascade_back(shared, coupling, thread, totals, grad_spike_sums);
            if (thread.group == 0) {
                FOR_EACH_SHARE {
                    const int c = thread.cluster(share);
                    if (c < C) grad_sums[(t * ROWS + thread.row) * PADDED + c] = totals[c];
                }
            }
#endif
            FOR_EACH_NEURON {
                const float distance = now[n].x - threshold[n];
                const bool is_refractory = __float_as_uint(now[n].y) & 1u;
                const float grad_distance =
                    (grad_spike[n] + grad_spike_sums[share] - threshold[n] * grad_v[n]) * slope(distance, alpha);
                const float grad_u = is_refractory ? 0.0f : grad_v[n] + grad_distance;
                const float grad_current = grad_i[n] + (1.0f - constants.beta_mem) * grad_u;
                float v_before = before[n].x;
                if (t > 0 && fires(v_before, threshold[n])) v_before -= threshold[n];
                if (active) threshold_sum[n] -= grad_distance;
                beta_mem_row = fmaf(grad_u, v_before - now[n].y, beta_mem_row);
                beta_syn_row = fmaf(grad_current, before[n].y + cascade_in[share], beta_syn_row);
                grad_v[n] = constants.beta_mem * grad_u;
                grad_i[n] = constants.beta_syn * grad_current;
                now[n] = before[n];
                if (active) store(grad_x + base + thread.neuron(share, member), grad_current);
            }
        }
        beta_mem_sum += active ? beta_mem_row : 0.0f;
        beta_syn_sum += active ? beta_syn_row : 0.0f;
        if (active && grad_v_first) {
            FOR_EACH_NEURON {
                grad_v_first[start + thread.neuron(share, member)] = grad_v[n];
                grad_i_first[start + thread.neuron(share, member)] = grad_i[n];
            }
        }
#if CASCADE
        __syncthreads(); // the history is complete; the next write to it is after the next barrier, in sum_members
        add_outer_products(grad_sums, sums, T * ROWS, first >= (long long)gridDim.x * ROWS, grad_coupling);
#endif
    }
    FOR_EACH_NEURON
        grad_threshold[((long long)blockIdx.x * ROWS + thread.row) * D + thread.neuron(share, member)] =
            threshold_sum[n];
    grad_betas[(long long)blockIdx.x * THREADS + threadIdx.x] = make_float2(beta_mem_sum, beta_syn_sum);
}
"""
)

_SOURCES = {"associative_lif_forward": _FORWARD, "associative_lif_backward": _BACKWARD}

#: No fused multiply-adds: they change the last bit of u, which can flip a spike. CuPy appends -ftz=true to the options,
#: and the last option applies: denormal numbers are flushed to zero, which does not change ``fires``.
_FLAGS = ("-std=c++17", "-fmad=false", "-prec-div=true")

_BLOCK_THREADS = 256  # threads per block, unless a row has more
_MAX_ROW_THREADS = 512  # maximum number of threads per row
_NEURONS_PER_THREAD = 8  # neurons per thread, if the row is wide enough
_MAX_UNROLLED = 16  # more neurons per thread than this are stored in local memory instead of registers
# Threads per multiprocessor, with 64 and 128 registers each.
_RESIDENT_THREADS = {"associative_lif_forward": 1024, "associative_lif_backward": 512}
_SHARED_COUPLING_BYTES = 24 * 1024  # bytes of shared memory per block that the coupling may take
_MAX_CLUSTERS = 4096  # their sums take 2 * 16 KiB of the 48 KiB of shared memory that every device has
_PARTIAL_SUM_BYTES = 1 << 28  # bytes of partial sums for the gradient of the coupling


class _Plan(NamedTuple):
    """Distribution of the rows of a block over its threads.

    A row has ``lanes * groups`` threads. A thread has one cluster, or several at a distance of ``lanes``. If clusters
    have too many members for one thread, ``groups`` threads split each cluster.
    """

    clusters: int
    lanes: int
    groups: int
    rows: int
    per_thread: int

    @property
    def threads(self) -> int:
        return self.lanes * self.groups * self.rows


def _plan(n_features: int, n_clusters: int) -> _Plan:
    """Return the plan for D neurons in C clusters; C = 0 for no cascade."""
    clusters = n_clusters or n_features
    members = n_features // clusters
    # Without a cascade any split is possible: enough threads per row to fill a warp.
    max_threads = (
        _MAX_ROW_THREADS
        if n_clusters
        else min(_MAX_ROW_THREADS, -(-n_features // max(1, min(_NEURONS_PER_THREAD, n_features // 32))))
    )
    shares = -(-clusters // max_threads)
    lanes = -(-clusters // shares)
    groups = 1 if shares > 1 else max(1, min(-(-members // _NEURONS_PER_THREAD), max_threads // lanes))
    rows = max(1, _BLOCK_THREADS // (lanes * groups))
    return _Plan(clusters, lanes, groups, rows, shares * -(-members // groups))


def accepts(call: CallSignature) -> Support:
    """Return whether the kernels can run a call."""
    support = supports_surrogate(call, SURROGATE_IDS)
    support = has_published_dynamics(call) if support.runs else support
    return fits(call.n_features, dict(call.options)["n_clusters"]) if support.runs else support


def fits(n_features: int, n_clusters: int) -> Support:
    """Return whether the kernels can run D neurons in C clusters (0: no cascade), or the reason why not."""
    if n_clusters > _MAX_CLUSTERS:
        return Support(
            False,
            f"the CUDA kernel stores sums over clusters in shared memory, for at most {_MAX_CLUSTERS} clusters, "
            f"got {n_clusters}",
        )
    return Support(True, "runs")


def _coupling_is_shared(n_clusters: int) -> bool:
    return 4 * n_clusters * (n_clusters | 1) <= _SHARED_COUPLING_BYTES


def _options(kernel: str, dtype: torch.dtype, n_features: int, n_clusters: int, surrogate: int = 0) -> tuple[str, ...]:
    """Return the macro definitions of a build; they are explained above ``_COMMON``."""
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
        "UNROLL": plan.per_thread if plan.per_thread <= _MAX_UNROLLED else 1,
        "BLOCKS_PER_SM": _blocks_per_multiprocessor(kernel, plan),
        "SURROGATE": surrogate,
    }
    return tuple(f"-D{name}={value}" for name, value in macros.items())


def _blocks_per_multiprocessor(kernel: str, plan: _Plan) -> int:
    return max(1, _RESIDENT_THREADS[kernel] // plan.threads)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _compile(kernel: str, options: tuple[str, ...], device: int) -> Any:
    """Return the kernel compiled with these options; CuPy also caches it on disk."""
    cupy = importlib.import_module("cupy")
    return cupy.RawModule(code=_SOURCES[kernel], options=_FLAGS + options).get_function(kernel)


def _launch(
    kernel: str, options: tuple[str, ...], device: torch.device, grid: int, block: int, args: list[Any]
) -> None:
    """Run a kernel on torch's current stream of ``device``, instead of CuPy's device and stream.

    All parameters have 64 bits: tensors are passed as addresses, None as a null pointer, Python numbers as they are.
    Tensors may be freed after the launch, because torch reuses their memory on the same stream only.
    """
    cupy = importlib.import_module("cupy")
    values = tuple(0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in args)
    index = torch.cuda.current_device() if device.index is None else device.index
    with cupy.cuda.Device(index), cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, index):
        _compile(kernel, options, index)((grid,), (block,), values)


def _prepare(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(dtype).contiguous()


def _couplings(coupling: Tensor | None) -> tuple[int, Tensor | None, Tensor | None]:
    """Return C, the coupling, and its transpose if the kernels read both from device memory."""
    if coupling is None:
        return 0, None, None
    coupling = coupling.detach().float().contiguous()
    C = coupling.shape[0]
    return C, coupling, None if _coupling_is_shared(C) else coupling.T.contiguous()


def forward(arguments: Arguments, keep_v: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return spikes, membrane potentials (empty unless ``keep_v``) and the last state."""
    x, v, i_syn, refractory, threshold, beta_mem, beta_syn, coupling, v_reset, refractory_steps, *_ = arguments
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
    grads: OutputGradients, arguments: Arguments, surrogate: str, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, v and i_syn (empty without a state), threshold, both betas, coupling (or empty)."""
    x, v, i_syn, refractory, threshold, beta_mem, beta_syn, coupling, v_reset, refractory_steps, *_ = arguments
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
            blocks = min(blocks, max(1, _PARTIAL_SUM_BYTES // (4 * C * C)))
    # One partial sum per block, or per row or thread of a block; without blocks the sums are zero.
    grad_threshold = torch.empty(blocks * plan.rows, D, device=x.device)
    grad_betas = torch.empty(blocks * plan.threads, 2, device=x.device)
    grad_coupling = torch.empty(blocks, C, C, device=x.device)
    if blocks:
        record = torch.empty(blocks, T, plan.rows, D, 2, device=x.device)
        history = torch.empty(blocks, 3, T, plan.rows, -(-C // 4) * 4, device=x.device)
        args = [
            _prepare(grads.spikes, x.dtype),
            _prepare(grads.v_seq, x.dtype),
            _prepare(grads.v_last, torch.float32),
            _prepare(grads.i_last, torch.float32),
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
    # Two separate sums: outputs of an op must not share memory.
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
