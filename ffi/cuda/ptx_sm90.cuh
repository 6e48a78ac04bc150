// Thin wrappers of the Hopper (sm_90a) instructions of gemm_wgmma.cuh, gemm_persistent.cuh and
// decode.cuh: mbarriers, bulk and tensor copies, clusters, wgmma. One instruction each; ordering
// rules are the caller's. Shared memory is named by its 32-bit address.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"

namespace w4a16::ptx {

using w4a16::LoadShared128;
using w4a16::SharedAddress;

__device__ inline void StoreShared(uint32_t shared, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
}

// To the shared memory of any CTA of the cluster, whose `barrier` counts the 16 bytes; both are
// named by MapShared.
__device__ inline void StoreAsync(uint32_t there, uint32_t barrier, float a, float b, float c,
                                  float d) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
      " [%0], {%2, %3, %4, %5}, [%1];" ::"r"(there),
      "r"(barrier), "f"(a), "f"(b), "f"(c), "f"(d)
      : "memory");
}

// Transposes the 8 x 8 matrix of 16-bit values of which lane l holds (l / 4, 2 * (l % 4) + {0, 1}).
__device__ inline uint32_t Transpose8x8(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// True in one thread of a converged warp; unlike a test of the lane, known to be so at compile
// time.
__device__ inline bool ElectOne() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// --- mbarrier ---

__device__ inline void MbarrierInit(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the async proxy and to the cluster.
__device__ inline void FenceMbarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void MbarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void MbarrierArriveExpectTx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Arrives at a barrier of any CTA of the cluster, named by MapShared.
__device__ inline void MbarrierArriveCluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits for the phase of the given parity to complete.
__device__ inline void MbarrierWait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra retry;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The same for a phase that other CTAs of the cluster complete.
__device__ inline void MbarrierWaitCluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra retry;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// --- copies through the async proxy ---

__device__ inline void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map));
}

// `bytes` and both addresses are multiples of 16.
__device__ inline void BulkLoad(uint32_t shared, const void* global, uint32_t bytes,
                                uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// The box of `map` whose origin is element (inner, outer).
__device__ inline void TensorLoad2d(uint32_t shared, const CUtensorMap* map, int inner, int outer,
                                    uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(map), "r"(inner), "r"(outer), "r"(barrier), "l"(policy)
      : "memory");
}

// The same, its data to stay in L2 as others do.
__device__ inline void TensorLoad2d(uint32_t shared, const CUtensorMap* map, int inner, int outer,
                                    uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
      "l"(map), "r"(inner), "r"(outer), "r"(barrier)
      : "memory");
}

// The same of a tensor of three dimensions.
__device__ inline void TensorLoad3d(uint32_t shared, const CUtensorMap* map, int inner, int middle,
                                    int outer, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared),
      "l"(map), "r"(inner), "r"(middle), "r"(outer), "r"(barrier), "l"(policy)
      : "memory");
}

// A box of two dimensions to the same place of every CTA whose bit is set in `ranks`, each of which
// counts the bytes at its own `barrier`.
__device__ inline void TensorLoad2dMulticast(uint32_t shared, const CUtensorMap* map, int inner,
                                             int outer, uint32_t barrier, uint16_t ranks,
                                             uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(shared),
      "l"(map), "r"(inner), "r"(outer), "r"(barrier), "h"(ranks), "l"(policy)
      : "memory");
}

// Shared memory to the box of `map` whose origin is (inner, outer), clipped to the tensor.
__device__ inline void TensorStore2d(const CUtensorMap* map, uint32_t shared, int inner,
                                     int outer) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
      "r"(inner), "r"(outer), "r"(shared)
      : "memory");
}

__device__ inline void BulkCommit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until the shared memory of all but `kPending` of this thread's committed groups of bulk
// stores has been read.
template <int kPending>
__device__ inline void BulkWaitRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Stores four 8x8 matrices of 16-bit values, each transposed: register i holds matrix i as mma does
// (lane l: row l / 4, columns 2 * (l % 4) and the next), and lane l gives the address of what was
// column l % 8 of matrix l / 8: eight values, 16 bytes.
__device__ inline void StoreMatrix4Transposed(uint32_t shared, uint32_t v0, uint32_t v1,
                                              uint32_t v2, uint32_t v3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
      "r"(v0), "r"(v1), "r"(v2), "r"(v3)
      : "memory");
}

// Orders earlier ordinary accesses of shared memory before later ones of the async proxy.
__device__ inline void FenceProxyAsync() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- groups of threads ---

// Barrier `id` (1..15; 0 is __syncthreads) among `threads` threads of the CTA.
__device__ inline void NamedBarrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts for the barrier as NamedBarrier does, but does not wait.
__device__ inline void NamedBarrierArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Changes the registers of each thread of the executing warpgroup.
template <int kRegisters>
__device__ inline void ReleaseRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The address, for instructions on the cluster's shared memory, of this CTA's `shared` as it is in
// the CTA of rank `rank`.
__device__ inline uint32_t MapShared(uint32_t shared, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
  return there;
}

__device__ inline uint32_t ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Orders no memory: a release would wait for all that the thread has in flight.
__device__ inline void ClusterArriveRelaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ inline void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// --- wgmma ---

// Orders register accesses before the wgmmas that follow. Naming the registers pins the
// instructions that write them above it.
template <int kRegisters>
__device__ inline void WgmmaFence(uint32_t (&a)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+r"(a[i])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

template <int kBuffers, int kRegisters>
__device__ inline void WgmmaFence(uint32_t (&a)[kBuffers][kRegisters]) {
#pragma unroll
  for (int i = 0; i < kBuffers * kRegisters; ++i)
    asm volatile("" : "+r"(a[i / kRegisters][i % kRegisters])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` committed groups are in flight.
template <int kPending>
__device__ inline void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps register operands alive up to this point, hence their registers unused by anything else.
template <int kRegisters>
__device__ inline void KeepAlive(const uint32_t (&r)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" ::"r"(r[i]) : "memory");
}

template <int kBuffers, int kRegisters>
__device__ inline void KeepAlive(const uint32_t (&r)[kBuffers][kRegisters]) {
#pragma unroll
  for (int i = 0; i < kBuffers; ++i) KeepAlive(r[i]);
}

// The same value, of which the compiler knows nothing: what is computed of it is so here, by single
// instructions, and not kept in registers from somewhere before.
__device__ inline uint64_t Opaque(uint64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

// Declares registers whose values do not matter.
template <int kRegisters>
__device__ inline void Undefined(float (&r)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "=f"(r[i]));
}

// Pins later reads of accumulators below this point.
template <int kRegisters>
__device__ inline void Settle(float (&r)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

// Descriptor of a K-major operand in shared memory with the 128-byte swizzle: rows of 64 16-bit
// values, eight rows to a 1024-byte atom. `shared` is aligned to 1024 bytes. Adding 2 to a
// descriptor moves it by 16 values (32 bytes) along K.
__device__ inline uint64_t DescriptorSwizzle128(uint32_t shared) {
  constexpr uint64_t kStrideBytes = 1024, kSwizzle128 = 1;
  return ((shared & 0x3ffff) >> 4) | (uint64_t{1} << 16) | ((kStrideBytes >> 4) << 32) |
         (kSwizzle128 << 62);
}

#define W4A16_ACC4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define W4A16_ACC8(i) W4A16_ACC4(i), W4A16_ACC4(i + 4)
#define W4A16_ACC16(i) W4A16_ACC8(i), W4A16_ACC8(i + 8)
#define W4A16_ACC32(i) W4A16_ACC16(i), W4A16_ACC16(i + 16)
#define W4A16_ACC64(i) W4A16_ACC32(i), W4A16_ACC32(i + 32)
#define W4A16_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define W4A16_R12 \
  W4A16_R8        \
  ", %8, %9, %10, %11"
#define W4A16_R16 \
  W4A16_R12       \
  ", %12, %13, %14, %15"
#define W4A16_R24 \
  W4A16_R16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23"
#define W4A16_R32 \
  W4A16_R24       \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define W4A16_R48                            \
  W4A16_R32                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39" \
  ", %40, %41, %42, %43, %44, %45, %46, %47"
#define W4A16_R52 \
  W4A16_R48       \
  ", %48, %49, %50, %51"
#define W4A16_R64                            \
  W4A16_R48                                  \
  ", %48, %49, %50, %51, %52, %53, %54, %55" \
  ", %56, %57, %58, %59, %60, %61, %62, %63"
#define W4A16_R96                            \
  W4A16_R64                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71" \
  ", %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87" \
  ", %88, %89, %90, %91, %92, %93, %94, %95"
#define W4A16_R128                                   \
  W4A16_R96                                          \
  ", %96, %97, %98, %99, %100, %101, %102, %103"     \
  ", %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119" \
  ", %120, %121, %122, %123, %124, %125, %126, %127"
#define W4A16_WGMMA_ASM(TYPE, N, REGISTERS, A0, A1, A2, A3, B, P, ...)                           \
  asm volatile(                                                                                  \
      "{\n"                                                                                      \
      ".reg .pred accumulate;\n"                                                                 \
      "setp.ne.b32 accumulate, %" #P                                                             \
      ", 0;\n"                                                                                   \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {%" #A0 \
      ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B                                                    \
      ", accumulate, 1, 1, 0;\n"                                                                 \
      "}\n"                                                                                      \
      : __VA_ARGS__                                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
#define W4A16_WGMMA_CASE(N, REGISTERS, A0, A1, A2, A3, B, P, ...)            \
  if constexpr (kN == N && kHalf)                                            \
    W4A16_WGMMA_ASM("f16", N, REGISTERS, A0, A1, A2, A3, B, P, __VA_ARGS__); \
  else if constexpr (kN == N)                                                \
  W4A16_WGMMA_ASM("bf16", N, REGISTERS, A0, A1, A2, A3, B, P, __VA_ARGS__)
// d[64 x kN] += a[64 x 16] * b[16 x kN]: a in registers (four per thread), b in shared memory,
// K-major. accumulate = 0: d = instead of +=.
template <typename T, int kN>
__device__ inline void Wgmma(float (&d)[kN / 2], const uint32_t* a, uint64_t b,
                             int accumulate = 1) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kN == 16 || kN == 24 || kN == 32 || kN == 48 || kN == 64 || kN == 96 || kN == 104 ||
                kN == 128 || kN == 192 || kN == 256);
  W4A16_WGMMA_CASE(16, W4A16_R8, 8, 9, 10, 11, 12, 13, W4A16_ACC8(0));
  W4A16_WGMMA_CASE(24, W4A16_R12, 12, 13, 14, 15, 16, 17, W4A16_ACC8(0), W4A16_ACC4(8));
  W4A16_WGMMA_CASE(32, W4A16_R16, 16, 17, 18, 19, 20, 21, W4A16_ACC16(0));
  W4A16_WGMMA_CASE(48, W4A16_R24, 24, 25, 26, 27, 28, 29, W4A16_ACC16(0), W4A16_ACC8(16));
  W4A16_WGMMA_CASE(64, W4A16_R32, 32, 33, 34, 35, 36, 37, W4A16_ACC32(0));
  W4A16_WGMMA_CASE(96, W4A16_R48, 48, 49, 50, 51, 52, 53, W4A16_ACC32(0), W4A16_ACC16(32));
  W4A16_WGMMA_CASE(104, W4A16_R52, 52, 53, 54, 55, 56, 57, W4A16_ACC32(0), W4A16_ACC16(32),
                   W4A16_ACC4(48));
  W4A16_WGMMA_CASE(128, W4A16_R64, 64, 65, 66, 67, 68, 69, W4A16_ACC64(0));
  W4A16_WGMMA_CASE(192, W4A16_R96, 96, 97, 98, 99, 100, 101, W4A16_ACC64(0), W4A16_ACC32(64));
  W4A16_WGMMA_CASE(256, W4A16_R128, 128, 129, 130, 131, 132, 133, W4A16_ACC64(0), W4A16_ACC64(64));
}

#undef W4A16_ACC4
#undef W4A16_ACC8
#undef W4A16_ACC16
#undef W4A16_ACC32
#undef W4A16_ACC64
#undef W4A16_R8
#undef W4A16_R12
#undef W4A16_R16
#undef W4A16_R24
#undef W4A16_R32
#undef W4A16_R48
#undef W4A16_R52
#undef W4A16_R64
#undef W4A16_R96
#undef W4A16_R128
#undef W4A16_WGMMA_ASM
#undef W4A16_WGMMA_CASE

}  // namespace w4a16::ptx
