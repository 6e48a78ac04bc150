#include "config.h"

#include <array>

namespace w4a16 {
namespace {

constexpr Config kConfigs[] = {
#define W4A16_DECODE(N, M, WARPS, STAGES, SPLIT)                     \
  {.name = "decode_" #N "x" #M "_w" #WARPS "_s" #STAGES "_k" #SPLIT, \
   .family = Family::kDecode,                                        \
   .tile_n = N,                                                      \
   .tile_m = M,                                                      \
   .warps = WARPS,                                                   \
   .stages = STAGES,                                                 \
   .split_k = SPLIT},
#define W4A16_WGMMA(N, M, STAGES, SPLIT)                \
  {.name = "wgmma_" #N "x" #M "_s" #STAGES "_k" #SPLIT, \
   .family = Family::kWgmma,                            \
   .tile_n = N,                                         \
   .tile_m = M,                                         \
   .stages = STAGES,                                    \
   .split_k = SPLIT},
#define W4A16_CUTLASS(N, M, CN, CM, SCHEDULE, SCHEDULER)                       \
  {.name = "cutlass_" #N "x" #M "_c" #CN "x" #CM "_" #SCHEDULE "_" #SCHEDULER, \
   .family = Family::kCutlass,                                                 \
   .tile_n = N,                                                                \
   .tile_m = M,                                                                \
   .cluster_n = CN,                                                            \
   .cluster_m = CM,                                                            \
   .schedule = Schedule::k##SCHEDULE,                                          \
   .scheduler = Scheduler::k##SCHEDULER},
#include "configs.inc"
#undef W4A16_DECODE
#undef W4A16_WGMMA
#undef W4A16_CUTLASS
};

Status Refuse(const Config& config, const std::string& why) {
  return Status::Unsupported(std::string(config.name) + ": " + why);
}

}  // namespace

const char* FamilyName(Family family) {
  switch (family) {
    case Family::kDecode:
      return "decode";
    case Family::kWgmma:
      return "wgmma";
    case Family::kCutlass:
      return "cutlass";
  }
  return "unknown";
}

int NumConfigs() { return static_cast<int>(std::size(kConfigs)); }

const Config& ConfigAt(int index) { return kConfigs[index]; }

const Config* FindConfig(std::string_view name) {
  for (const Config& config : kConfigs) {
    if (name == config.name) return &config;
  }
  return nullptr;
}

Status CanImplement(const Problem& p, const Device& device, const Config& config) {
  const int cc = device.compute_capability;
  if (p.x_dtype == W4A16_F32)
    return Refuse(config, "x is float32; CUDA kernels take float16 or bfloat16");
  if (cc < 80)
    return Refuse(config, "needs compute capability 8.0 or later, got " + std::to_string(cc));
  if (config.family == Family::kDecode) {
    if (config.split_k > 1 && cc < 90)
      return Refuse(config, "split-K is a cluster, which needs compute capability 9.0 or later");
    return {};
  }
  if (cc != 90) return Refuse(config, "compiled for compute capability 9.0 alone");
  // TMA: row strides are multiples of 16 bytes.
  if (p.n % 8 != 0) return Refuse(config, "N is not a multiple of 8");
  if (p.k % 8 != 0) return Refuse(config, "K is not a multiple of 8");
  if (p.m == 0 || p.n == 0 || p.k == 0) return Refuse(config, "M, N or K is 0");
  if (config.family == Family::kCutlass) {
    if (p.has_zeros) return Refuse(config, "zero points are not compiled into the CUTLASS kernels");
    if (p.out_dtype != p.x_dtype) return Refuse(config, "float32 output is not compiled in");
    if (p.group_size < p.k && p.group_size % kBlockK != 0)
      return Refuse(config, "group size is not a multiple of 64");
  }
  return {};
}

int64_t WorkspaceBytes(const Problem&, const Device&, const Config&) { return 0; }

}  // namespace w4a16
