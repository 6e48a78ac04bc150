// What becomes of the sums of a wgmma kernel (gemm_wgmma.cuh, which numbers the rules S4 to S6):
// added up over teams and over the cluster, scaled, and stored.
#pragma once

#include "dequant.cuh"
#include "ptx_sm90.cuh"
#include "wgmma_shape.cuh"

namespace w4a16 {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a consumer thread is of: its place in a team, and the CTA's tile.
struct Place {
  int thread;  // of its team
  int team;
  int n0, m0;
  // The first of its warp's 16.
  __device__ inline int Row() const { return n0 + thread / 32 * 16; }
};

// alpha * sum + bias of the lane's two rows.
template <typename T, typename Shape>
struct Scaler {
  float alpha, bias[2] = {};

  __device__ inline Scaler(const WgmmaParams& p, int n)
      : alpha(p.alpha * WeightMaker<T, Shape::kHasZeros, !Shape::kFolds>::kUnit) {
    if (p.bias == nullptr) return;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (n + 8 * r < p.n)
        bias[r] = static_cast<const T*>(p.bias)[n + 8 * r + threadIdx.x % 32 / 4];
  }

  __device__ inline void Keep() { Hold<true>(alpha), Hold<true>(bias[0]), Hold<true>(bias[1]); }

  // Of a fragment of accumulators.
  __device__ inline float Scale(float v, int i) const { return fmaf(alpha, v, bias[i / 2 % 2]); }
};

// Stores fragments of eight tokens by a warp's 16 rows, kTokens tokens apart and before `end`.
template <typename Out, int kTokens>
class FragmentStore {
 public:
  __device__ inline FragmentStore(const WgmmaParams& p, int m, int end, int n) {
    const int lane = threadIdx.x % 32;
    m += kPairs ? lane / 4 : lane % 4 * 2;
    n += kPairs ? lane % 2 * 8 + (lane & 2) * 2 : lane / 4;
    out_ = static_cast<Out*>(p.out) + static_cast<int64_t>(m) * p.n + n;
    token_bytes_ = static_cast<int64_t>(p.n) * sizeof(Out);
    rows_left_ = p.n - n;
    tokens_left_ = rows_left_ > 0 ? end - m : 0;
  }

  template <int kCount>
  __device__ inline void Store(const float (&v)[kCount][4]) {
    if constexpr (kPairs) {
      // Transposed, a lane holds two values of either eight rows, of token lane / 4. Neighbours
      // swap one, so that each has four of one eight.
      uint32_t half[kCount][2];
#pragma unroll
      for (int i = 0; i < 2 * kCount; ++i)
        half[i / 2][i % 2] =
            ptx::Transpose8x8(Pair<Out>::Round(v[i / 2][i % 2 * 2], v[i / 2][i % 2 * 2 + 1]));
      const bool odd = threadIdx.x % 2 == 1;
      uint2 four[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const uint32_t other = __shfl_xor_sync(0xffffffff, odd ? half[i][0] : half[i][1], 1);
        four[i] = odd ? make_uint2(other, half[i][1]) : make_uint2(half[i][0], other);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (i * kTokens < tokens_left_) *reinterpret_cast<uint2*>(At(i * kTokens)) = four[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4 * kCount; ++i) {
        const int token = i / 4 * kTokens + i % 2, row = i / 2 % 2 * 8;
        if (token < tokens_left_ && row < rows_left_) At(token)[row] = v[i / 4][i % 4];
      }
    }
    out_ = At(kCount * kTokens);
    tokens_left_ -= kCount * kTokens;
  }

  __device__ inline void Keep() {
    Hold<true>(out_), Hold<true>(token_bytes_), Hold<true>(tokens_left_);
  }

 private:
  static constexpr bool kPairs = sizeof(Out) == 2;

  __device__ inline Out* At(int token) const {
    return reinterpret_cast<Out*>(reinterpret_cast<char*>(out_) + token * token_bytes_);
  }

  Out* out_;
  int64_t token_bytes_;
  int tokens_left_, rows_left_;
};

// A thread's sums: of each owner's slice, the chunks that its team sums.
template <typename Shape>
using Sums = float[Shape::kOwners][Shape::kTeamChunks][4];

// Of two teams each gives the other what that one sums.
template <typename Shape>
__device__ inline void SumTeams(const float (&acc)[Shape::kTileM / 2], uint32_t shared,
                                const Place& place, Sums<Shape>& sums) {
  constexpr int kCount = Shape::kOwners * Shape::kTeamChunks;
  static_assert(Shape::kTeams == 2 && sizeof(sums) == kCount * 16);
  const bool second = place.team == 1;
  const uint32_t at = shared + place.thread * 16;
  const uint32_t mine = at + place.team * kCount * Shape::kChunkBytes;
  const uint32_t others = at + (1 - place.team) * kCount * Shape::kChunkBytes;
  ptx::NamedBarrier(2, Shape::kConsumers);  // S4
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int chunk = i / Shape::kTeamChunks * Shape::kSliceChunks + i % Shape::kTeamChunks * 2;
    const float* even = &acc[min(4 * chunk, Shape::kTileM / 2 - 4)];
    const float* odd = &acc[min(4 * chunk + 4, Shape::kTileM / 2 - 4)];
    float (&own)[4] = sums[i / Shape::kTeamChunks][i % Shape::kTeamChunks];
    float given[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      own[q] = second ? odd[q] : even[q];
      given[q] = second ? even[q] : odd[q];
    }
    ptx::StoreShared(others + i * Shape::kChunkBytes, given[0], given[1], given[2], given[3]);
  }
  ptx::NamedBarrier(2, Shape::kConsumers);  // S4
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint4 bits = ptx::LoadShared128(mine + i * Shape::kChunkBytes);
#pragma unroll
    for (int q = 0; q < 4; ++q)
      sums[i / Shape::kTeamChunks][i % Shape::kTeamChunks][q] +=
          reinterpret_cast<const float*>(&bits)[q];
  }
}

// Adds up what the cluster's CTAs have of this one's slice, in the order of ranks; false: it has
// none.
template <typename Shape>
__device__ inline bool SumRanks(const Sums<Shape>& sums, uint32_t shared, int rank,
                                const Place& place, float (&total)[Shape::kTeamChunks][4]) {
  constexpr int kSplitK = Shape::kSplitK, kStep = Shape::kTeams * Shape::kChunkBytes;
  const uint32_t inbox =
      shared + Shape::kInboxOffset + place.team * Shape::kChunkBytes + place.thread * 16;
  const uint32_t received = Shape::Received(shared);
#pragma unroll
  for (int owner = 0; owner < Shape::kOwners; ++owner) {
    if (owner == rank) continue;
    const uint32_t to = ptx::MapShared(inbox + (rank - (rank > owner)) * Shape::kRankBytes, owner);
    const uint32_t barrier = ptx::MapShared(received, owner);
#pragma unroll
    for (int i = 0; i < Shape::kTeamChunks; ++i) {
      // A slice's last chunks may be missing.
      const int chunk = i * Shape::kTeams + place.team, last = (i + 1) * Shape::kTeams - 1;
      const int left = min(Shape::kSliceChunks, Shape::kChunks - owner * Shape::kSliceChunks);
      const float* v = sums[owner][i];
      if (last < left || chunk < left)
        ptx::StoreAsync(to + i * kStep, barrier, v[0], v[1], v[2], v[3]);
    }
  }
  if (rank >= Shape::kOwners) return false;
  ptx::MbarrierWaitCluster(received, 0);  // S6
#pragma unroll
  for (int i = 0; i < Shape::kTeamChunks; ++i) {
    float terms[kSplitK][4];  // the inbox's, and room for one more
#pragma unroll
    for (int r = 0; r < kSplitK - 1; ++r) {
      const uint4 bits = ptx::LoadShared128(inbox + r * Shape::kRankBytes + i * kStep);
#pragma unroll
      for (int q = 0; q < 4; ++q) terms[r][q] = reinterpret_cast<const float*>(&bits)[q];
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      float own = sums[0][i][q];
#pragma unroll
      for (int owner = 1; owner < Shape::kOwners; ++owner)
        own = rank == owner ? sums[owner][i][q] : own;
      if constexpr (kSplitK == 2) {
        total[i][q] = own + terms[0][q];
      } else {
#pragma unroll
        for (int r = kSplitK - 1; r > 0; --r)
          terms[r][q] = r == rank ? own : r > rank ? terms[r - 1][q] : terms[r][q];
        total[i][q] = rank == 0 ? own : terms[0][q];
#pragma unroll
        for (int r = 1; r < kSplitK; ++r) total[i][q] += terms[r][q];
      }
    }
  }
  return true;
}

// What becomes of a consumer thread's sums: to `out`, by way of the inboxes if kSplitK > 1.
template <typename T, typename Shape>
class FinishFragments {
 public:
  __device__ inline FinishFragments(const WgmmaParams& p, uint32_t shared, int rank,
                                    const Place& place)
      : shared_(shared),
        rank_(rank),
        place_(place),
        first_(place.m0 + 8 * rank * Shape::kSliceChunks),
        end_(min(p.m, first_ + 8 * Shape::ChunksOf(rank))),
        scaler_(p, place.Row()),
        store_(p, first_ + 8 * place.team, end_, place.Row()) {}

  // Finds all that is found here at once.
  __device__ inline void Keep() {
    Hold<true>(place_.thread), Hold<true>(place_.n0), Hold<true>(first_), Hold<true>(end_);
    scaler_.Keep(), store_.Keep();
  }

  __device__ inline void operator()(const WgmmaParams& p, const float (&acc)[Shape::kTileM / 2]) {
    Sums<Shape> sums;
    if constexpr (Shape::kTeams > 1) {
      SumTeams<Shape>(acc, shared_, place_, sums);
    } else {
#pragma unroll
      for (int i = 0; i < Shape::kOwners * kCount * 4; ++i)
        sums[i / 4 / kCount][i / 4 % kCount][i % 4] = i < Shape::kTileM / 2 ? acc[i] : 0.0f;
    }
    float total[kCount][4];
    if constexpr (Shape::kSplitK > 1) {
      if (!SumRanks<Shape>(sums, shared_, rank_, place_, total)) return;
    } else {
#pragma unroll
      for (int i = 0; i < 4 * kCount; ++i) total[i / 4][i % 4] = sums[0][i / 4][i % 4];
    }
#pragma unroll
    for (int i = 0; i < 4 * kCount; ++i)
      total[i / 4][i % 4] = scaler_.Scale(total[i / 4][i % 4], i);
    if (p.out_is_f32) {
      FragmentStore<float, kTokens> store(p, first_ + 8 * place_.team, end_, place_.Row());
      Store(store, total);
    } else {
      Store(store_, total);
    }
  }

 private:
  static constexpr int kTokens = 8 * Shape::kTeams, kCount = Shape::kTeamChunks;

  template <typename Fragments>
  __device__ static inline void Store(Fragments& to, const float (&total)[kCount][4]) {
    // With some on their way at a time less is waited for.
    constexpr int kAbreast = kCount % 4 == 0 ? 4 : kCount % 3 == 0 ? 3 : kCount % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < kCount; i += kAbreast)
      to.Store(reinterpret_cast<const float (&)[kAbreast][4]>(total[i]));
  }

  uint32_t shared_;
  int rank_;
  Place place_;
  int first_, end_;  // tokens that this rank finishes
  Scaler<T, Shape> scaler_;
  FragmentStore<T, kTokens> store_;
};

// The same of a CTA that has all sums, to 16-bit `out`: rounded, as rows of tokens, by way of the
// stages (S4), so that a warp's stores lie together.
template <typename T, typename Shape>
class FinishRows {
 public:
  __device__ inline FinishRows(const WgmmaParams& p, uint32_t shared, int, const Place& place)
      : place_(place), scaler_(p, place.Row()) {
    const int lane = place.thread % 32, token = place.thread / kPieces;
    const int piece = place.thread % kPieces, n = place.n0 + piece * 8;
    // By the lane's matrix: the first or second eight of rows, of one or the next eight tokens.
    to_ = shared + (lane / 16 * 8 + lane % 8) * kRowBytes +
          (place.thread / 32 * 16 + lane / 8 % 2 * 8) * 2;
    from_ = shared + token * kRowBytes + piece * 16;
    tokens_left_ = n < p.n ? min(p.m - place.m0, Shape::kTileM) - token : 0;
    out_ = static_cast<char*>(p.out) + (static_cast<int64_t>(place.m0 + token) * p.n + n) * 2;
    pass_bytes_ = int64_t{p.n} * (2 * kPass);
  }

  __device__ inline void Keep() {
    Hold<true>(place_.thread), Hold<true>(place_.n0), Hold<true>(place_.m0);
    Hold<true>(to_), Hold<true>(from_), Hold<true>(tokens_left_);
    Hold<true>(out_), Hold<true>(pass_bytes_);
    scaler_.Keep();
  }

  __device__ inline void operator()(const WgmmaParams& p, const float (&acc)[Shape::kTileM / 2]) {
    if (p.out_is_f32) return StoreFloats(p, acc);
    ptx::NamedBarrier(2, Shape::kConsumers);  // S4
#pragma unroll
    for (int chunk = 0; chunk < Shape::kChunks; chunk += 2) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* v = &acc[min(4 * chunk + 2 * i, Shape::kTileM / 2 - 2)];
        pairs[i] = Pair<T>::Round(scaler_.Scale(v[0], 2 * i), scaler_.Scale(v[1], 2 * i));
      }
      ptx::StoreMatrix4Transposed(to_ + chunk * 8 * kRowBytes, pairs[0], pairs[1], pairs[2],
                                  pairs[3]);
    }
    ptx::NamedBarrier(2, Shape::kConsumers);
#pragma unroll 1
    for (int i = 0; i < kPasses; i += kAbreast) {
      uint4 rows[kAbreast];
#pragma unroll
      for (int j = 0; j < kAbreast; ++j)
        rows[j] = ptx::LoadShared128(from_ + (i + j) * kPass * kRowBytes);
#pragma unroll
      for (int j = 0; j < kAbreast; ++j)
        if ((i + j) * kPass < tokens_left_)
          *reinterpret_cast<uint4*>(out_ + (i + j) * pass_bytes_) = rows[j];
    }
  }

 private:
  static constexpr int kRowBytes = Shape::kTileN * 2 + 16;  // eight tokens in different banks
  // Of 16 bytes: a pass takes those of 16 tokens.
  static constexpr int kPieces = Shape::kTileN / 8, kPass = Shape::kConsumers / kPieces;
  static constexpr int kPasses = (Shape::kTileM + kPass - 1) / kPass;
  static constexpr int kAbreast = kPasses % 4 == 0   ? 4
                                  : kPasses % 3 == 0 ? 3
                                  : kPasses % 2 == 0 ? 2
                                                     : 1;
  static_assert(kPasses * kPass * kRowBytes <= Shape::kPipelineBytes && kPass == 16);

  __device__ inline void StoreFloats(const WgmmaParams& p, const float (&acc)[Shape::kTileM / 2]) {
    FragmentStore<float, 8> store(p, place_.m0, min(p.m, place_.m0 + Shape::kTileM), place_.Row());
#pragma unroll
    for (int chunk = 0; chunk < Shape::kChunks; ++chunk) {
      float v[1][4];
#pragma unroll
      for (int q = 0; q < 4; ++q) v[0][q] = scaler_.Scale(acc[4 * chunk + q], q);
      store.Store(v);
    }
  }

  Place place_;
  Scaler<T, Shape> scaler_;
  uint32_t to_, from_;
  int tokens_left_;
  char* out_;
  int64_t pass_bytes_;
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace w4a16
