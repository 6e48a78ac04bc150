// How decode's warps fill their stages: decode.cuh has the picture of one, and says what the speed
// of this hangs on.
#pragma once

#include "decode_stage.cuh"
#include "ptx_sm90.cuh"

namespace w4a16 {

// Whether registers are left to hold addresses.
__host__ __device__ constexpr bool HoldsAddresses(int tile_n, int tile_m, bool zeros, int parts) {
  const int outputs = tile_n * tile_m;
  if (parts == 1) return !zeros || outputs <= 64 * 16;
  if (parts == 2 && tile_m == 8) return outputs <= 64 * 8;
  return !zeros && (kTensorCopies || outputs <= 64 * 16);
}

// Fills a warp's stages, each with one unit of K (kBlocks blocks), in order: the units `first`,
// first + step, ...
template <typename T, int kTileN, int kTileM, int kBlocks, bool kZeros, int kParts, bool kGeneral>
class StageLoader {
 public:
  __device__ __forceinline__ StageLoader(const DecodeParams& p, const CUtensorMap& x_map, int n0,
                                         int m0, int lane, int first, int step)
      : p_(p),
        x_map_(x_map),
        lane_(lane),
        n0_(n0),
        m0_(m0),
        rows_(min(kTileM, p.m - m0)),
        row_blocks_(p.blocks_n - n0 / kBlockN),
        policy_(EvictFirstPolicy()),
        k0_(first * kUnitK),
        step_(step * kUnitK),
        row_bytes_(static_cast<int64_t>(p.k) * 2),
        block_row_bytes_(static_cast<int64_t>(p.blocks_n) * kBlockBytes),
        step_bytes_(step * kBlocks * block_row_bytes_),
        weights_(reinterpret_cast<const char*>(p.qweight) + first * kBlocks * block_row_bytes_ +
                 static_cast<int64_t>(n0 / kBlockN) * kBlockBytes + 16 * lane) {
    const bool aligned = !kGeneral || (p.x_aligned && p.n_aligned);
    whole_k_ = aligned && row_blocks_ >= kTileBlocks ? p.k - kUnitK : -1;
    Hold<kHold>(k0_), Hold<kHold>(whole_k_), Hold<kHold>(weights_);
  }

  // Finds the addresses that LoadX and LoadScales need: LoadWeights of the first unit comes before
  // it.
  __device__ __forceinline__ void Prepare() {
    x_ = static_cast<const T*>(p_.x) + static_cast<int64_t>(m0_ + lane_ / kChunks) * p_.k + k0_ +
         lane_ % kChunks * 8;
    places_ = FindPlaces(lane_);
    Hold<kHold>(step_), Hold<kHold>(step_bytes_);
    Hold<kHold>(x_), Hold<kHold>(places_.x), Hold<kHold>(places_.rows_left);
    Hold<kHold>(places_.scales), Hold<kHold>(places_.has_scales);
    FindScales();
  }

  // Whether x comes by tensor copies, which count at the barriers of stages. Tiles of 16 tokens,
  // which are for more than a few, have code for no other way, unless x may be unaligned.
  __device__ __forceinline__ bool TensorX() const {
    return kTensorCopies && ((kTileM > 8 && !kGeneral) || p_.x_tensor);
  }

  // Makes the barriers of `stages`, before the first copy of x.
  __device__ __forceinline__ void InitBarriers(uint32_t ring, int stages) const {
#if __CUDA_ARCH__ >= 900
    if (ptx::ElectOne()) {
      for (int s = 0; s < stages; ++s)
        ptx::MbarrierInit(StageBarrier(p_, ring + s * p_.stage_bytes), 1);
      ptx::FenceMbarrierInit();
    }
    __syncwarp();  // for racecheck, which blames the warp's last lane for the initialisation
#endif
  }

  // Starts the copies of a unit: to be committed as one group.
  __device__ __forceinline__ void Load(uint32_t stage) const {
    const bool whole = IsWhole();
    LoadWeights(stage, whole);
    LoadX(stage, whole);
    LoadScales(stage);
  }

  // All of the unit's weights and K exist, and rows of x and scales are aligned: then copies have
  // held addresses and no branches, because a warp does nothing else meanwhile.
  __device__ __forceinline__ bool IsWhole() const { return k0_ <= whole_k_; }

  __device__ __forceinline__ void LoadWeights(uint32_t stage, bool whole) const {
    CopyWeights<kTileBlocks, kBlocks>(p_, stage + 16 * lane_, weights_, block_row_bytes_, policy_,
                                      whole, k0_, row_blocks_);
  }

  __device__ __forceinline__ void LoadX(uint32_t stage, bool whole) const {
    if (TensorX()) {
      CopyXTensor(stage);
    } else if (!kGeneral || p_.x_aligned) {
      CopyX(stage, PlacesNow(), kHold && whole);
    } else {
      LoadXUnaligned(stage + kWeightBytes);
    }
  }

  __device__ __forceinline__ void LoadScales(uint32_t stage) const {
    if (!kGeneral || p_.n_aligned) {
      CopyScales(stage, PlacesNow());
    } else {
      LoadScalesUnaligned(stage + kWeightBytes + XBytes(kTileM, kBlocks));
    }
  }

  // Goes on to the next unit: between products, which the copies would come after.
  __device__ __forceinline__ void Advance() {
    k0_ += step_;
    if constexpr (kHold) {
      weights_ += step_bytes_;
    } else {
      weights_ += step_ / kBlockK * block_row_bytes_;
    }
    x_ += step_;
    if constexpr (kHold && kParts == 1) {
      scales_ =
          reinterpret_cast<const T*>(reinterpret_cast<const char*>(scales_) + p_.scale_step_bytes);
    } else {
      FindScales();
    }
  }

 private:
  static constexpr int kUnitK = kBlocks * kBlockK;
  static constexpr int kTileBlocks = kTileN / kBlockN;
  static constexpr int kChunks = kBlockK / 8;  // of 16 bytes, in a block of a row of x
  static constexpr int kScaleRows = kParts * (kZeros ? 2 : 1);
  static constexpr int kRowChunks = kTileN / 8;  // of 16 bytes, in a row of scales
  static constexpr int kScaleChunks = kScaleRows * kRowChunks;
  static constexpr int kWeightBytes = kBlocks * kTileBlocks * kBlockBytes;
  static_assert(kWeightBytes % 1024 == 0);  // behind it the swizzle of x begins
  static constexpr bool kHold = HoldsAddresses(kTileN, kTileM, kZeros, kParts);
  static constexpr int kPass = 32 / kChunks;  // rows of x copied at a time
  static_assert(kFewRows == kPass);

  // What a lane copies first of x and of scales, and where in a stage.
  struct Places {
    uint32_t x, scales;
    int rows_left;  // rows of x from its first on
    int has_scales;
  };

  __device__ __forceinline__ Places FindPlaces(int lane) const {
    const int row = lane / kChunks, chunk = lane % kChunks;
    return {
        .x = kWeightBytes + XChunk(row, chunk),
        .scales = static_cast<uint32_t>(kWeightBytes + XBytes(kTileM, kBlocks) + 16 * lane),
        .rows_left = rows_ - row,
        .has_scales = HasScaleChunk(lane),
    };
  }

  __device__ __forceinline__ Places PlacesNow() const {
    if constexpr (kHold) return places_;
    int lane = lane_;
    Hold<true>(lane);  // else the compiler holds what follows from it
    return FindPlaces(lane);
  }

  // What does not exist reads as zero.
  __device__ __forceinline__ void CopyXTensor(uint32_t stage) const {
#if __CUDA_ARCH__ >= 900
    if (!ptx::ElectOne()) return;
    const uint32_t barrier = StageBarrier(p_, stage);
    ptx::MbarrierArriveExpectTx(barrier, XBytes(p_.x_rows, kBlocks));
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
      ptx::TensorLoad2d(stage + kWeightBytes + b * XBytes(kTileM, 1), &x_map_, k0_ + b * kBlockK,
                        m0_, barrier);
#endif
  }

  // Zeros beyond K. Where there are tensor copies it takes few rows.
  __device__ __forceinline__ void CopyX(uint32_t stage, const Places& at, bool whole) const {
    const char* x = reinterpret_cast<const char*>(x_);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const bool exists = whole || k0_ + b * kBlockK + lane_ % kChunks * 8 < p_.k;
#pragma unroll
      for (int i = 0; i < (kTensorCopies ? kFewRows : kTileM); i += kPass)
        CopyAsyncShared(((stage + at.x) ^ (i % 8 * 16)) + b * XBytes(kTileM, 1) + i * (kBlockK * 2),
                        x + b * (kBlockK * 2) + i * row_bytes_, i < at.rows_left, exists);
    }
  }

  __device__ __forceinline__ void LoadXUnaligned(uint32_t dst) const {
    // From the first of the rows, where aligned copies begin at this lane's chunk.
    const T* x = x_ - static_cast<int64_t>(lane_ / kChunks) * p_.k - lane_ % kChunks * 8;
    CopyUnaligned<kTileM, kUnitK>(p_, dst, x, lane_, k0_, rows_);
  }

  __device__ __forceinline__ const T* ScalesOf(int row) const {
    return ScaleSource<T, kUnitK, kZeros, kParts>(p_, k0_, n0_, row);
  }

  __device__ __forceinline__ const T* ScaleChunk(int idx) const {
    return ScalesOf(idx / kRowChunks) + idx % kRowChunks * 8;
  }

  __device__ __forceinline__ bool HasScaleChunk(int idx) const {
    return idx < kScaleChunks && n0_ + idx % kRowChunks * 8 < p_.n;
  }

  // This lane's first chunk of scales, early.
  __device__ __forceinline__ void FindScales() {
    if constexpr (kHold) scales_ = ScaleChunk(lane_);
  }

  __device__ __forceinline__ void CopyScales(uint32_t stage, const Places& at) const {
    const uint32_t dst = stage + at.scales;
    if constexpr (kHold) CopyAsync(dst, scales_, at.has_scales != 0);
#pragma unroll
    for (int i = kHold ? 32 : 0; i < kScaleChunks; i += 32) {
      CopyAsync(dst + 16 * i, ScaleChunk(lane_ + i), HasScaleChunk(lane_ + i));
    }
  }

  __device__ __forceinline__ void LoadScalesUnaligned(uint32_t dst) const {
    for (int idx = lane_; idx < kScaleRows * kTileN; idx += 32) {
      const int row = idx / kTileN, n = idx % kTileN;
      if (n0_ + n < p_.n)
        StoreShared16(dst + 2 * idx, reinterpret_cast<const uint16_t*>(ScalesOf(row))[n]);
    }
  }

  const DecodeParams& p_;
  const CUtensorMap& x_map_;
  const int lane_, n0_, m0_, rows_, row_blocks_;
  const uint64_t policy_;
  int k0_, step_;
  int whole_k_;  // the last k0_ of a whole unit
  const int64_t row_bytes_, block_row_bytes_;
  int64_t step_bytes_;
  const char* weights_;
  const T* x_;
  Places places_;
  const T* scales_;
};

}  // namespace w4a16
