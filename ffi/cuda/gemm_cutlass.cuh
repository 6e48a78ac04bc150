// out^T[N, M] = alpha * w^T[N, K] . x^T[K, M] + bias[N] through CUTLASS's SM90 mixed-input
// collective: TMA loads, one producer warpgroup, consumer warpgroups that dequantise into the
// register operand of wgmma. CUTLASS's problem is (M, N, K) = our (N, M, K).
//
// The collective reads the packed weight of layout.h as it is: `PackedLayout` below spells that
// layout as a CuTe layout of (n, k), and `Code` with its converters gives codes their zero point.
// w = round((code - 8) * scale) in x's type, then products are summed in float32.
//
// Preconditions, from CanImplement: K and N are multiples of 8 (TMA strides), the group size is a
// multiple of 64 or at least K, no zeros, out has x's type. Tails need no care here: TMA fills x
// with zeros beyond M and K, so padding codes multiply zeros, and clips the store beyond N and M.
#pragma once

// Only the SM90 halves of CUTLASS's umbrella headers, which cost several times the compile time.
// clang-format off
#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/numeric_types.h>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_mma_decl.hpp>
#include <cutlass/gemm/collective/sm90_mma_tma_gmma_rs_warpspecialized_mixed_input.hpp>
#include <cutlass/gemm/collective/builders/sm90_gmma_builder.inl>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal_decl.h>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>
#include <cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp>
#include <cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_pingpong.hpp>
#include <cutlass/device_kernel.h>
// clang-format on

#include <algorithm>
#include <string>

#include "cuda_status.h"
#include "gemm_cutlass.h"

namespace w4a16 {

// A 4-bit code in offset binary: it stands for the integer code - 8.
struct Code : cutlass::integer_subbyte<4, false> {
  using integer_subbyte::integer_subbyte;
};

// The order of codes in a word (layout.h): value v of the A fragment is nibble v / 2 + 4 * (v % 2).
using PackedWord = cute::Layout<cute::Shape<cute::_2, cute::_4>, cute::Stride<cute::_4, cute::_1>>;

}  // namespace w4a16

namespace cutlass {

template <>
struct sizeof_bits<w4a16::Code> {
  static constexpr int value = 4;
};

// 1024 + c in fp16 is 0x6400 | c, and 1024 + 16 * c is 0x6400 | c << 4; both are exact.
template <>
struct LayoutAwareConvertImpl<w4a16::Code, half_t, w4a16::PackedWord, cute::Layout<cute::_8>> {
  template <class EngineIn, class EngineOut>
  CUTLASS_DEVICE static void convert(cute::Tensor<EngineIn, w4a16::PackedWord> const& src,
                                     cute::Tensor<EngineOut, cute::Layout<cute::_8>>& dst) {
    const uint32_t word = cute::recast<uint32_t>(src)(0);
    auto&& pairs = cute::recast<__half2>(dst);
    const __half2 bias = __half2half2(__ushort_as_half(0x6408));       // 1024 + 8
    const __half2 sixteenth = __half2half2(__ushort_as_half(0x2c00));  // 1 / 16
    const __half2 high_bias = __half2half2(__ushort_as_half(0xd480));  // -(1024 / 16 + 8)
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; i += 2) {
      const uint32_t low = (word >> 4 * i & 0x000f000f) | 0x64006400;
      const uint32_t high = (word >> 4 * i & 0x00f000f0) | 0x64006400;
      pairs(i) = __hsub2(reinterpret_cast<const __half2&>(low), bias);
      pairs(i + 1) = __hfma2(reinterpret_cast<const __half2&>(high), sixteenth, high_bias);
    }
  }
};

// 128 + c in bf16 is 0x4300 | c, exact.
template <>
struct LayoutAwareConvertImpl<w4a16::Code, bfloat16_t, w4a16::PackedWord, cute::Layout<cute::_8>> {
  template <class EngineIn, class EngineOut>
  CUTLASS_DEVICE static void convert(cute::Tensor<EngineIn, w4a16::PackedWord> const& src,
                                     cute::Tensor<EngineOut, cute::Layout<cute::_8>>& dst) {
    const uint32_t word = cute::recast<uint32_t>(src)(0);
    auto&& pairs = cute::recast<__nv_bfloat162>(dst);
    const __nv_bfloat162 bias = __bfloat162bfloat162(__ushort_as_bfloat16(0x4308));  // 128 + 8
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = (word >> 4 * i & 0x000f000f) | 0x43004300;
      pairs(i) = __hsub2(reinterpret_cast<const __nv_bfloat162&>(pair), bias);
    }
  }
};

}  // namespace cutlass

namespace w4a16 {

// Offset in codes of weight (n, k, 0): the block's place (layout.h, PlaceOf) as one stride for each
// factor of n and k, then N's blocks, then K's.
using PackedLayout = cute::Layout<
    cute::Shape<cute::Shape<cute::Shape<cute::_8, cute::_2>, int>,
                cute::Shape<cute::Shape<cute::_2, cute::_4, cute::_2, cute::_4>, int>, cute::_1>,
    cute::Stride<cute::Stride<cute::Stride<cute::_128, cute::_1>, cute::_1024>,
                 cute::Stride<cute::Stride<cute::_4, cute::_32, cute::_2, cute::_8>, int64_t>,
                 cute::_0>>;

inline PackedLayout MakePackedLayout(int64_t n, int64_t k) {
  const int blocks_n = static_cast<int>(BlocksN(n)), blocks_k = static_cast<int>(BlocksK(k));
  return cute::make_layout(
      cute::make_shape(
          cute::make_shape(cute::Shape<cute::_8, cute::_2>{}, blocks_n),
          cute::make_shape(cute::Shape<cute::_2, cute::_4, cute::_2, cute::_4>{}, blocks_k),
          cute::_1{}),
      cute::make_stride(cute::make_stride(cute::Stride<cute::_128, cute::_1>{}, cute::_1024{}),
                        cute::make_stride(cute::Stride<cute::_4, cute::_32, cute::_2, cute::_8>{},
                                          int64_t{1024} * blocks_n),
                        cute::_0{}));
}

template <DType kDType, int kTileN, int kTileM, int kClusterN, int kClusterM, Schedule kSchedule,
          Scheduler kScheduler>
struct CutlassGemm {
  using Element = cute::conditional_t<kDType == W4A16_F16, cutlass::half_t, cutlass::bfloat16_t>;
  using Tile = cute::Shape<cute::Int<kTileN>, cute::Int<kTileM>, cute::_64>;
  using Cluster = cute::Shape<cute::Int<kClusterN>, cute::Int<kClusterM>, cute::_1>;
  static constexpr bool kCooperative = kSchedule == Schedule::kCooperative;

  // alpha * acc + bias[n], in float32.
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  using Bias = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, Element, float>;
  using Fusion = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Element, float,
                                             kRound>,
      cutlass::epilogue::fusion::Sm90ScalarBroadcast<float>,
      cutlass::epilogue::fusion::Sm90AccFetch, Bias>;

  // Row-major out[M, N] is column-major out^T[N, M].
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      cutlass::layout::ColumnMajor, 8, Element, cutlass::layout::ColumnMajor, 8,
      cute::conditional_t<kCooperative, cutlass::epilogue::TmaWarpSpecializedCooperative,
                          cutlass::epilogue::TmaWarpSpecialized>,
      Fusion>::CollectiveOp;

  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cute::tuple<Code, Element>, PackedLayout,
      32, Element, cutlass::layout::ColumnMajor, 8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cute::conditional_t<kCooperative, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                          cutlass::gemm::KernelTmaWarpSpecializedPingpong>>::CollectiveOp;

  using Kernel = cutlass::gemm::kernel::GemmUniversal<
      cute::Shape<int, int, int, int>, Mainloop, Epilogue,
      cute::conditional_t<kScheduler == Scheduler::kStreamK, cutlass::gemm::StreamKScheduler,
                          cutlass::gemm::PersistentScheduler>>;
  using StreamKParams = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamKParams;
};

template <DType kDType, int kTileN, int kTileM, int kClusterN, int kClusterM, Schedule kSchedule,
          Scheduler kScheduler>
Status LaunchCutlass(const Problem& p, const Operands& o, const char* name, int num_sms,
                     cudaStream_t stream) {
  using Gemm = CutlassGemm<kDType, kTileN, kTileM, kClusterN, kClusterM, kSchedule, kScheduler>;
  using Kernel = typename Gemm::Kernel;
  using Element = typename Gemm::Element;

  typename Kernel::Arguments args{};
  args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  args.problem_shape = {static_cast<int>(p.n), static_cast<int>(p.m), static_cast<int>(p.k), 1};
  args.mainloop.ptr_A = reinterpret_cast<const Code*>(o.qweight);
  args.mainloop.dA = MakePackedLayout(p.n, p.k);
  args.mainloop.ptr_B = static_cast<const Element*>(o.x);
  args.mainloop.dB = {p.k, cute::_1{}, 0};
  args.mainloop.ptr_S = static_cast<const Element*>(o.scales);
  args.mainloop.dS = {cute::_1{}, p.n, 0};
  // The one group of a column must also be a multiple of the tile's K, whatever it is called by.
  args.mainloop.group_size =
      static_cast<int>(p.group_size < p.k ? p.group_size : BlocksK(p.k) * kBlockK);
  args.epilogue.ptr_D = static_cast<Element*>(o.out);
  args.epilogue.dD = {cute::_1{}, p.n, 0};
  args.epilogue.thread = {{{o.alpha}}, {}, {static_cast<const Element*>(o.bias)}, {}};
  args.hw_info.sm_count = num_sms;
  if constexpr (kScheduler == Scheduler::kStreamK) {
    // WorkspaceBytes (config.cc) counts on both. Sums are added in the order of K.
    static_assert(kClusterN * kClusterM == 1);
    args.scheduler.decomposition_mode = Gemm::StreamKParams::DecompositionMode::StreamK;
    args.scheduler.reduction_mode = Gemm::StreamKParams::ReductionMode::Deterministic;
  }

  if (!Kernel::can_implement(args))
    return Status::Internal(std::string(name) + ": CUTLASS refuses the problem");
  if (static_cast<int64_t>(Kernel::get_workspace_size(args)) > o.workspace_bytes)
    return Status::Internal(std::string(name) + ": the workspace is too small");
  // Clears stream-K's barriers.
  if (auto s = Kernel::initialize_workspace(args, o.workspace, stream);
      s != cutlass::Status::kSuccess)
    return Status::Internal(std::string(name) + ": " + cutlassGetStatusString(s));

  // The attribute belongs to the current device's copy of the kernel, so each launch sets it.
  const auto kernel = cutlass::device_kernel<Kernel>;
  if (Status s = ToStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               Kernel::SharedStorageSize),
                          name);
      !s.ok())
    return s;

  auto params = Kernel::to_underlying_arguments(args, o.workspace);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kClusterN, kClusterM, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = Kernel::get_grid_shape(params);
  launch.blockDim = Kernel::get_block_shape();
  launch.dynamicSmemBytes = Kernel::SharedStorageSize;
  launch.stream = stream;
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  return ToStatus(cudaLaunchKernelEx(&launch, kernel, params), name);
}

}  // namespace w4a16
