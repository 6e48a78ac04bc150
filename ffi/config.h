// Config: one compiled CUDA kernel. configs.inc is the only list of them; everything else looks it
// up here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "problem.h"
#include "schedule.h"

namespace w4a16 {

enum class Family {
  kDecode,      // cuda/decode.cuh: mma.sync, every GPU from sm_75, any problem
  kWgmma,       // cuda/gemm_wgmma.cuh: packed weights as wgmma's register operand, sm_90a
  kPersistent,  // cuda/gemm_persistent.cuh: likewise, one CTA per SM for all its tiles, sm_90a
  kCutlass,     // cuda/gemm_cutlass.cuh: CUTLASS mixed-input collective, sm_90a
};

const char* FamilyName(Family family);

// Tiles are (N, M) = (weight rows, tokens): every kernel computes the transposed product w^T x^T.
struct Config {
  const char* name;
  Family family;
  int tile_n;
  int tile_m;
  int blocks = 0;     // decode: blocks of K in a stage
  int warps = 0;      // decode: warps of a CTA, which share a tile's K
  int stages = 0;     // depth of the pipeline (0: chosen by CUTLASS)
  int split_k = 1;    // CTAs (a cluster) that share a tile's K, summed in fixed order
  int teams = 1;      // wgmma: of warps of a CTA, which take its stages in turn
  int cluster_n = 1;  // CTAs along N and M that share loads by multicast
  int cluster_m = 1;
  bool ragged = false;  // finds its rows and weights by expert
  Schedule schedule = Schedule::kNone;
  Scheduler scheduler = Scheduler::kDataParallel;
  // Measured: heuristics.cc says what they are.
  float start_us = 0, step_ns = 0, tile_us = 0, fill = 1;
  int resident = 1;
};

// All compiled configurations, in the order of configs.inc.
int NumConfigs();
const Config& ConfigAt(int index);
const Config* FindConfig(std::string_view name);  // nullptr if unknown

// OK if `config` can serve `problem` (which has passed CheckProblem) on `device`; else why not.
Status CanImplement(const Problem& problem, const Device& device, const Config& config);

// The same of a ragged product, which has passed CheckRaggedProblem. It needs no workspace.
Status CanImplementRagged(const Problem& problem, int64_t experts, const Device& device,
                          const Config& config);

// Bytes of workspace that `config` needs for `problem`.
int64_t WorkspaceBytes(const Problem& problem, const Device& device, const Config& config);

}  // namespace w4a16
