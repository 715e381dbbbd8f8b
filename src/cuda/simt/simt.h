// What the kernels' bodies use of CUDA. emulation.h defines the same names for the host, where tests run the kernels'
// own source without a GPU. Kernels include this header; tests define THIMBLE_SIMT_HOST before they include a kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef THIMBLE_SIMT_HOST
#include "cuda/simt/emulation.h"
#else
#include <cuda_fp16.h>

#define SIMT __device__ __forceinline__
#define SIMT_CALL __device__ __noinline__  // once in the kernel's code, which has to be fetched before it runs
#define SIMT_UNROLL _Pragma("unroll")
#define SIMT_PRAGMA(x) _Pragma(#x)
#define SIMT_UNROLL_BY(n) SIMT_PRAGMA(unroll n)
#define SIMT_NO_UNROLL _Pragma("unroll 1")

namespace thimble::cuda::simt {

SIMT int thread() {
  const int r = int(threadIdx.x);
  __builtin_assume(r >= 0 && r < 1024);  // divisions by powers of two are then shifts
  return r;
}
/// The thread's number, read from its register again. The compiler cannot keep what is computed from it from one call
/// to the next, so that it occupies no register meanwhile.
SIMT int thread_again() {
  int r;
  asm volatile("mov.u32 %0,%%tid.x;" : "=r"(r));
  __builtin_assume(r >= 0 && r < 1024);
  return r;
}
/// Keeps x in a register: the compiler cannot compute it again in each round of a loop.
template <typename T>
SIMT void keep(T& x) {
  static_assert(sizeof(T) == 4);
  asm("" : "+r"(x));
}
SIMT int block_x() {
  return blockIdx.x;
}
SIMT int block_y() {
  return blockIdx.y;
}
SIMT int block_z() {
  return blockIdx.z;
}
SIMT int blocks_x() {
  return gridDim.x;
}

/// The block's dynamic shared memory, 1024-byte aligned.
SIMT uint8_t* shared() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}
/// What lies there from byte `Offset` on.
template <typename T, int Offset>
SIMT T* shared_at() {
  return reinterpret_cast<T*>(shared() + Offset);
}

/// The address of shared() in 32 bits, for load_shared. One instruction can compute an address in 32 bits.
SIMT uint32_t shared_address() {
  return uint32_t(__cvta_generic_to_shared(shared()));
}
template <typename T>
SIMT T load_shared(uint32_t address) {
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}

SIMT void sync() {
  __syncthreads();
}
SIMT void sync_warp() {
  __syncwarp();
}
/// Whether x holds for any thread of the block. All threads call it; it is a barrier.
SIMT bool any_in_block(bool x) {
  return __syncthreads_or(x);
}
/// Of how many threads of the block x holds. All threads call it; it is a barrier.
SIMT int count_in_block(bool x) {
  return __syncthreads_count(x);
}
SIMT bool any(bool x) {
  return __any_sync(~0u, x);
}
SIMT uint32_t ballot(bool x) {
  return __ballot_sync(~0u, x);
}
SIMT int popcount(uint32_t x) {
  return __popc(x);
}
template <typename T>
SIMT T shuffle(T x, int lane) {
  return __shfl_sync(~0u, x, lane);
}
template <typename T>
SIMT T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(~0u, x, mask);
}
/// The greatest x of a warp's 32 lanes, in all of them.
SIMT uint32_t max_of_warp(uint32_t x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(~0u, x);
#else
  for (int mask = 1; mask < 32; mask *= 2) x = max(x, shuffle_xor(x, mask));
  return x;
#endif
}

/// Adds x to *p, which thread blocks count with, and returns what *p was before. It orders memory for the whole device
/// (acquire and release): the thread that counts last reads what every thread before it had written when it counted,
/// and what other threads of that one's block had written before their last barrier. A __threadfence() in every thread
/// would do the same in several times the time.
SIMT int atomic_add_ordered(int* p, int x) {
  int r;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0,[%1],%2;" : "=r"(r) : "l"(p), "r"(x) : "memory");
  return r;
}
SIMT int atomic_add(int* p, int x) {
  return atomicAdd(p, x);
}
SIMT void atomic_or(uint32_t* p, uint32_t x) {
  atomicOr(p, x);
}
SIMT void atomic_and(uint32_t* p, uint32_t x) {
  atomicAnd(p, x);
}
SIMT void atomic_max(uint32_t* p, uint32_t x) {
  atomicMax(p, x);
}

// Programmatic dependent launch: launch_dependents() lets the next grid of the stream start before this one has ended;
// a grid calls wait_for_previous_grid() before it reads or writes what the previous grid may write.
SIMT void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
SIMT void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// The upper 32 bits of a product.
SIMT uint32_t multiply_high(uint32_t a, uint32_t b) {
  return __umulhi(a, b);
}
/// Bytes of (b:a) picked by the four nibbles of `selector`.
SIMT uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
/// base + stride * byte i of `bytes`, for strides to 2^16. It is a dot product, so that it does not occupy the
/// execution unit that permute() needs.
SIMT uint32_t scale_byte(uint32_t bytes, int i, uint32_t stride, uint32_t base) {
  const uint32_t factors = stride << (i % 2 * 16);
  return i < 2 ? __dp2a_lo(factors, bytes, base) : __dp2a_hi(factors, bytes, base);
}
SIMT float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}
SIMT float reciprocal_fast(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}
/// The greater of a and b; NaN if either is NaN.
SIMT float max_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float r;
  asm("max.NaN.f32 %0,%1,%2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return a != a ? a : b != b ? b : fmaxf(a, b);
#endif
}
// The compiler does not contract these into fused multiply-adds, as codes must equal the CPU's bit for bit.
SIMT float add_rn(float a, float b) {
  return __fadd_rn(a, b);
}
SIMT float sub_rn(float a, float b) {
  return __fsub_rn(a, b);
}
SIMT float mul_rn(float a, float b) {
  return __fmul_rn(a, b);
}
SIMT float fma_rn(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
SIMT float div_rn(float a, float b) {
  return __fdiv_rn(a, b);
}
SIMT float sqrt_rn(float a) {
  return __fsqrt_rn(a);
}

SIMT float bits_to_float(uint32_t x) {
  return __uint_as_float(x);
}
SIMT uint32_t float_to_bits(float x) {
  return __float_as_uint(x);
}
SIMT float half_to_float(uint16_t x) {
  return __half2float(__ushort_as_half(x));
}
SIMT uint16_t float_to_half(float x) {
  return __half_as_ushort(__float2half_rn(x));
}
SIMT float2 unpack_half2(uint32_t x) {
  return make_float2(half_to_float(uint16_t(x)), half_to_float(uint16_t(x >> 16)));
}
SIMT uint32_t pack_half2(float low, float high) {
#if __CUDA_ARCH__ < 800
  return uint32_t(float_to_half(high)) << 16 | float_to_half(low);
#else
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#endif
}
/// The differences of two pairs of halves.
SIMT uint32_t subtract_halves(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
/// The products of two pairs of halves.
SIMT uint32_t multiply_halves(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

/// Returns 0, as addresses in shared memory are below 2^31; the compiler does not know that. A load from
/// p + after(address) therefore waits until `address` has been computed. This keeps the compiler from moving the load
/// ahead of those that `address` is computed from.
SIMT uint32_t after(uint32_t address) {
  return address >> 31;
}

/// Loads 16 bytes that are read once, without a copy in L1.
SIMT uint4 load_stream(const uint8_t* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}
/// The same of 8 bytes.
SIMT uint2 load_stream_8(const uint8_t* p) {
  uint2 r;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1},[%2];" : "=r"(r.x), "=r"(r.y) : "l"(p));
  return r;
}
/// Loads 16 bytes.
SIMT uint4 load_vector(const void* p) {
  uint4 r;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
  return r;
}
/// The same of 8 bytes.
SIMT uint2 load_8(const void* p) {
  uint2 r;
  asm volatile("ld.global.nc.v2.u32 {%0,%1},[%2];" : "=r"(r.x), "=r"(r.y) : "l"(p));
  return r;
}
/// Prefetches the line of 128 bytes at `p` into L2.
SIMT void prefetch_line(const uint8_t* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
/// Prefetches `Bytes` bytes from p + offset on into L2, a line a lane. All lanes of a warp call it.
template <int Bytes>
SIMT void prefetch_l2(const uint8_t* p, uint32_t offset, int lane) {
  SIMT_UNROLL
  for (int first = 0; first < Bytes; first += 32 * 128) {
    if (first + lane * 128 < Bytes) prefetch_line(p + uint32_t(offset + first + lane * 128));
  }
}
/// Starts a copy of 4 or 16 bytes from global to shared memory that passes through no register. A thread may read what
/// it copied after wait_for_copies(), other threads after a barrier that follows it. Copies of 16 bytes bypass L1,
/// which may hold what was there before an overlapping grid wrote.
template <int Bytes>
SIMT void copy_async(void* shared_to, const void* from) {
  static_assert(Bytes == 4 || Bytes == 16);
#if __CUDA_ARCH__ >= 800
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared_to));
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0],[%1],4;" ::"r"(to), "l"(from) : "memory");
  }
#else
  if constexpr (Bytes == 16) {
    *static_cast<uint4*>(shared_to) = __ldcg(static_cast<const uint4*>(from));
  } else {
    *static_cast<uint32_t*>(shared_to) = *static_cast<const uint32_t*>(from);
  }
#endif
}
SIMT void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

/// Loads what nobody writes while the grid runs; the compiler may move the load ahead of stores.
template <typename T>
SIMT T load_constant(const T* p) {
  return __ldg(p);
}
/// Loads from L2, where another thread block's stores are seen.
template <typename T>
SIMT T load_l2(const T* p) {
  return __ldcg(p);
}

// Tensor cores, D += A B, in the fragment layouts of the PTX manual. Products of bytes are for sm_80 and later.
SIMT void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%8},{%0,%1,%2,%3};"
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%6,%7},{%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}
SIMT void mma_s8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
/// As mma_s8, with B of unsigned bytes.
SIMT void mma_s8u8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace thimble::cuda::simt
#endif
