// What the kernels' bodies use of CUDA, under names that also exist in an emulation: emulation.h runs the same source
// on the host, block by block, so that its logic is tested where there is no GPU. Include this one from .cu files;
// tests define THIMBLE_SIMT_HOST.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef THIMBLE_SIMT_HOST
#include "cuda/simt/emulation.h"
#else
#include <cuda_fp16.h>

#define SIMT __device__ __forceinline__
#define SIMT_UNROLL _Pragma("unroll")
#define SIMT_PRAGMA(x) _Pragma(#x)
#define SIMT_UNROLL_BY(n) SIMT_PRAGMA(unroll n)
#define SIMT_NO_UNROLL _Pragma("unroll 1")

namespace thimble::cuda::simt {

SIMT int thread() {
  const int r = int(threadIdx.x);
  __builtin_assume(r >= 0 && r < 1024);  // or each division by a power of two minds negative numbers
  return r;
}
/// The same, read anew: what is worked out from it once for each of many items takes no register in between.
SIMT int thread_again() {
  int r;
  asm volatile("mov.u32 %0,%%tid.x;" : "=r"(r));
  __builtin_assume(r >= 0 && r < 1024);
  return r;
}
/// Holds the compiler to a value that it would rather work out again in each round of a loop.
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

/// The same as a number of 32 bits that load_shared takes: an address is then worked out in one instruction.
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
/// A barrier, too.
SIMT bool any_in_block(bool x) {
  return __syncthreads_or(x);
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
/// The greatest of a warp's.
SIMT uint32_t max_of_warp(uint32_t x) {
  return __reduce_max_sync(~0u, x);
}

/// What this thread has seen written, and by barriers the rest of its block, is seen by who finds the sum later, and
/// the reverse. A fence for all threads takes several times as long.
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

// Programmatic dependent launch: a grid may start while the one before it ends; what reads that one's results waits.
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

/// The upper half of a product.
SIMT uint32_t multiply_high(uint32_t a, uint32_t b) {
  return __umulhi(a, b);
}
/// Bytes of (b:a) picked by the four nibbles of `selector`.
SIMT uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
/// base + stride * byte i of `bytes`, for strides to 2^16: a product, which takes no time from the pipe that permutes.
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
/// The greater one; NaN if either is.
SIMT float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0,%1,%2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
// Never contracted into fused multiply-adds: codes must equal the CPU's bit for bit.
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
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

/// 0, but not before an address in shared memory is known: a load from p + that is asked for after it.
SIMT uint32_t after(uint32_t address) {
  return address >> 31;
}

/// 16 bytes that are read once: they leave no trace in L1.
SIMT uint4 load_stream(const uint8_t* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}
/// 16 bytes.
SIMT uint4 load_vector(const void* p) {
  uint4 r;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
  return r;
}
/// Asks for the line of 128 bytes at `p` to come to L2.
SIMT void prefetch_line(const uint8_t* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
/// The same for more memory, from p + offset on, a line a lane. All lanes of a warp call it.
template <int Bytes>
SIMT void prefetch_l2(const uint8_t* p, uint32_t offset, int lane) {
  SIMT_UNROLL
  for (int first = 0; first < Bytes; first += 32 * 128) {
    if (first + lane * 128 < Bytes) prefetch_line(p + uint32_t(offset + first + lane * 128));
  }
}
/// 4 or 16 bytes from global to shared memory, without a register in between; there after wait_for_copies and a
/// barrier. 16 bytes come straight from L2: L1 may hold what was there before an overlapping grid wrote.
template <int Bytes>
SIMT void copy_async(void* shared_to, const void* from) {
  static_assert(Bytes == 4 || Bytes == 16);
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared_to));
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0],[%1],4;" ::"r"(to), "l"(from) : "memory");
  }
}
SIMT void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

/// Constant for the grid's whole life: loads may move ahead of stores.
template <typename T>
SIMT T load_constant(const T* p) {
  return __ldg(p);
}
/// From L2: what another block of this grid wrote.
template <typename T>
SIMT T load_l2(const T* p) {
  return __ldcg(p);
}

// Tensor cores, D += A B, in the fragment layouts of the PTX manual.
SIMT void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
SIMT void mma_s8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
/// The same with a B of unsigned bytes.
SIMT void mma_s8u8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace thimble::cuda::simt
#endif
