// The part of CUDA that our kernels use, to compile them as C++ and run them on the CPU, one thread block after the other.
//
// Every thread of a block is a fiber that runs until the next barrier. Fibers run in ascending order up to one
// barrier and in descending order up to the next, so that a missing barrier changes a result. LAUNCHABLE(kernel)
// defines launch_<kernel>(grid, block, args), where args points to the 64 bits of each argument; it returns 1 if threads
// of a block reach different numbers of barriers.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define CUDA_ON_CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }

template <class T> inline T __ldcs(const T *from) { return *from; }
template <class T> inline void __stcs(T *to, T value) { *to = value; }

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline float half_to_float(unsigned short half) {
    const unsigned exponent = half >> 10 & 31, mantissa = half & 1023;
    float value;
    if (exponent == 0) value = ldexpf((float)mantissa, -24);
    else if (exponent == 31) value = mantissa ? NAN : INFINITY;
    else value = ldexpf((float)(mantissa + 1024), (int)exponent - 25);
    return half >> 15 ? -value : value;
}
inline unsigned short float_to_half(float value) { // to nearest, ties to even
    const unsigned sign = __float_as_uint(value) >> 16 & 0x8000, bits = __float_as_uint(value) & 0x7fffffff;
    if (value != value) return sign | 0x7fff;
    if (fabsf(value) >= 65520.0f) return sign | 0x7c00;
    if (fabsf(value) < 0x1p-14f) return sign | (unsigned)nearbyintf(fabsf(value) * 0x1p24f);
    return sign | (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
}

namespace cuda_on_cpu {
struct Index {
    unsigned x;
};
enum { STACK = 1 << 17 };
static Index thread, block, grid;
static ucontext_t scheduler, *fibers;
static bool *done;
static void (*body)(void *);
static void *call;

inline void barrier() { swapcontext(&fibers[thread.x], &scheduler); }
static void fiber() {
    body(call);
    done[thread.x] = true;
}

static int run_block(unsigned threads, char *stacks) {
    for (unsigned n = 0; n < threads; ++n) {
        getcontext(&fibers[n]);
        fibers[n].uc_stack.ss_sp = stacks + (size_t)n * STACK;
        fibers[n].uc_stack.ss_size = STACK;
        fibers[n].uc_link = &scheduler;
        makecontext(&fibers[n], fiber, 0);
        done[n] = false;
    }
    for (bool descending = false;; descending = !descending) {
        unsigned finished = 0;
        for (unsigned n = 0; n < threads; ++n) {
            thread.x = descending ? threads - 1 - n : n;
            swapcontext(&scheduler, &fibers[thread.x]);
            finished += done[thread.x];
        }
        if (finished == threads) return 0;
        if (finished) return 1; // some threads wait at a barrier that other threads do not reach
    }
}

template <class... P> struct Call {
    void (*kernel)(P...);
    void **args;
    template <size_t n, size_t... rest> struct Count : Count<n - 1, n - 1, rest...> {};
    template <size_t... rest> struct Count<0, rest...> {
        static void go(const Call &call) { call.kernel(*(P *)call.args[rest]...); }
    };
    static void go(void *self) { Count<sizeof...(P)>::go(*(Call *)self); }
};

template <class... P> int launch(void (*kernel)(P...), unsigned blocks, unsigned threads, void **args) {
    Call<P...> parameters = {kernel, args};
    body = Call<P...>::go;
    call = &parameters;
    fibers = (ucontext_t *)calloc(threads, sizeof(ucontext_t));
    done = (bool *)calloc(threads, 1);
    char *stacks = (char *)malloc((size_t)threads * STACK);
    int wrong = 0;
    grid.x = blocks;
    for (block.x = 0; block.x < blocks && !wrong; ++block.x) wrong = run_block(threads, stacks);
    free(stacks);
    free(done);
    free(fibers);
    return wrong;
}
} // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread
#define blockIdx cuda_on_cpu::block
#define gridDim cuda_on_cpu::grid
#define __syncthreads cuda_on_cpu::barrier
#define LAUNCHABLE(kernel)                                                                     \
    extern "C" int launch_##kernel(unsigned grid, unsigned block, void **args) {                 \
        return cuda_on_cpu::launch(kernel, grid, block, args);                                   \
    }
