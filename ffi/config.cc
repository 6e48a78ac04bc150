#include "config.h"

#include <algorithm>
#include <array>

#include "cuda/gemm_wgmma.h"
#include "cuda/ragged_decode.h"

namespace w4a16 {
namespace {

constexpr Config kConfigs[] = {
#define W4A16_COSTS(START, STEP, TILE, FILL, ...)               \
  .start_us = START##f, .step_ns = STEP##f, .tile_us = TILE##f, \
  .fill = FILL##f __VA_OPT__(, .resident = __VA_ARGS__)
#define W4A16_DECODE(N, M, BLOCKS, WARPS, STAGES, SPLIT, ...)                     \
  {.name = "decode_" #N "x" #M "_b" #BLOCKS "_w" #WARPS "_s" #STAGES "_k" #SPLIT, \
   .family = Family::kDecode,                                                     \
   .tile_n = N,                                                                   \
   .tile_m = M,                                                                   \
   .blocks = BLOCKS,                                                              \
   .warps = WARPS,                                                                \
   .stages = STAGES,                                                              \
   .split_k = SPLIT,                                                              \
   W4A16_COSTS(__VA_ARGS__)},
#define W4A16_WGMMA(N, M, STAGES, SPLIT, TEAMS, ...)                           \
  {.name = TEAMS > 1 ? "wgmma_" #N "x" #M "_s" #STAGES "_k" #SPLIT "_t" #TEAMS \
                     : "wgmma_" #N "x" #M "_s" #STAGES "_k" #SPLIT,            \
   .family = Family::kWgmma,                                                   \
   .tile_n = N,                                                                \
   .tile_m = M,                                                                \
   .stages = STAGES,                                                           \
   .split_k = SPLIT,                                                           \
   .teams = TEAMS,                                                             \
   W4A16_COSTS(__VA_ARGS__)},
#define W4A16_PERSISTENT(N, M, STAGES, CLUSTER, ...)           \
  {.name = "persistent_" #N "x" #M "_s" #STAGES "_c" #CLUSTER, \
   .family = Family::kPersistent,                              \
   .tile_n = N,                                                \
   .tile_m = M,                                                \
   .stages = STAGES,                                           \
   .cluster_n = CLUSTER,                                       \
   W4A16_COSTS(__VA_ARGS__)},
#define W4A16_CUTLASS(N, M, CN, CM, SCHEDULE, SCHEDULER, ...)                  \
  {.name = "cutlass_" #N "x" #M "_c" #CN "x" #CM "_" #SCHEDULE "_" #SCHEDULER, \
   .family = Family::kCutlass,                                                 \
   .tile_n = N,                                                                \
   .tile_m = M,                                                                \
   .cluster_n = CN,                                                            \
   .cluster_m = CM,                                                            \
   .schedule = Schedule::k##SCHEDULE,                                          \
   .scheduler = Scheduler::k##SCHEDULER,                                       \
   W4A16_COSTS(__VA_ARGS__)},
#define W4A16_RAGGED_DECODE(N, M, BLOCKS, WARPS, STAGES, ...)                \
  {.name = "ragged_decode_" #N "x" #M "_b" #BLOCKS "_w" #WARPS "_s" #STAGES, \
   .family = Family::kDecode,                                                \
   .tile_n = N,                                                              \
   .tile_m = M,                                                              \
   .blocks = BLOCKS,                                                         \
   .warps = WARPS,                                                           \
   .stages = STAGES,                                                         \
   .ragged = true,                                                           \
   W4A16_COSTS(__VA_ARGS__)},
#define W4A16_RAGGED_WGMMA(N, M, STAGES, SPLIT, ...)           \
  {.name = "ragged_wgmma_" #N "x" #M "_s" #STAGES "_k" #SPLIT, \
   .family = Family::kWgmma,                                   \
   .tile_n = N,                                                \
   .tile_m = M,                                                \
   .stages = STAGES,                                           \
   .split_k = SPLIT,                                           \
   .ragged = true,                                             \
   W4A16_COSTS(__VA_ARGS__)},
#define W4A16_RAGGED_PERSISTENT(N, M, STAGES, ...)      \
  {.name = "ragged_persistent_" #N "x" #M "_s" #STAGES, \
   .family = Family::kPersistent,                       \
   .tile_n = N,                                         \
   .tile_m = M,                                         \
   .stages = STAGES,                                    \
   .ragged = true,                                      \
   W4A16_COSTS(__VA_ARGS__)},
#include "configs.inc"
#undef W4A16_COSTS
#undef W4A16_DECODE
#undef W4A16_WGMMA
#undef W4A16_PERSISTENT
#undef W4A16_CUTLASS
};

Status Refuse(const Config& config, const std::string& why) {
  return Status::Unsupported(std::string(config.name) + ": " + why);
}

// What a CTA may use of an SM's shared memory, by compute capability.
int SharedMemoryPerCta(int cc) {
  const int kib = cc < 80 ? 64 : cc == 80 || cc == 87 ? 163 : cc >= 90 && cc < 120 ? 227 : 99;
  return kib * 1024;
}

}  // namespace

const char* FamilyName(Family family) {
  switch (family) {
    case Family::kDecode:
      return "decode";
    case Family::kWgmma:
      return "wgmma";
    case Family::kPersistent:
      return "persistent";
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

namespace {

// What Hopper's kernels ask of a problem: why none of them can serve, or null.
const char* HopperRefusal(const Problem& p, int compute_capability) {
  if (compute_capability != 90) return "compiled for compute capability 9.0 alone";
  // TMA: row strides are multiples of 16 bytes.
  if (p.n % 8 != 0) return "N is not a multiple of 8";
  if (p.k % 8 != 0) return "K is not a multiple of 8";
  if (p.m == 0 || p.n == 0 || p.k == 0) return "M, N or K is 0";
  return nullptr;
}

// Whether decode's code on such a device has clusters. Later devices run that of sm_80, compiled
// anew by the driver.
constexpr bool HasClusters(int compute_capability) {
#ifdef W4A16_NO_CLUSTERS
  return false;
#else
  return compute_capability == 90;
#endif
}

// The first devices that decode's code is compiled for.
#ifdef W4A16_NO_TURING
constexpr int kLeastCapability = 80;
#else
constexpr int kLeastCapability = 75;
#endif

// As "8.0".
std::string CapabilityText(int cc) {
  return std::to_string(cc / 10) + "." + std::to_string(cc % 10);
}

// The configuration that serves a batch-invariant problem whatever M is, where Hopper's cannot.
bool IsInvariantDecode(const Config& config) {
  for (const Config& c : kConfigs) {
    if (c.family == Family::kDecode && c.tile_m == 16 && c.split_k == 1) return &c == &config;
  }
  return false;
}

// Batch-invariant problems are left to configurations that all sum in one order. wgmma without
// split-K adds up the steps of K one after the other, whatever the tile; decode's order depends on
// the configuration, so there is only one.
bool SumsInOneOrder(const Problem& p, int compute_capability, const Config& config) {
  if (HopperRefusal(p, compute_capability) == nullptr)
    return (config.family == Family::kWgmma && config.split_k == 1 && config.teams == 1 &&
            !AlwaysFolds(config.tile_m)) ||
           config.family == Family::kPersistent;
  return IsInvariantDecode(config);
}

Status CheckSharedMemory(const Device& device, const Config& config, int64_t needed) {
  const int most = SharedMemoryPerCta(device.compute_capability);
  if (needed <= most) return {};
  return Refuse(config, "needs " + std::to_string(needed) + " bytes of shared memory of " +
                            std::to_string(most));
}

// What a kernel asks of a problem, ragged or not.
Status CanServe(const Problem& p, const Device& device, const Config& config) {
  const int cc = device.compute_capability;
  if (p.x_dtype == W4A16_F32)
    return Refuse(config, "x is float32; CUDA kernels take float16 or bfloat16");
  if (cc < kLeastCapability || (cc < 80 && p.x_dtype != W4A16_F16))
    return Refuse(config, "needs compute capability " + CapabilityText(kLeastCapability) +
                              " or later, and 8.0 for bfloat16; got " + CapabilityText(cc) +
                              " and " + DTypeName(p.x_dtype));
  if (p.batch_invariant && !SumsInOneOrder(p, cc, config))
    return Refuse(config, "sums in an order of its own; a batch-invariant result needs one order");
  if (p.epilogue != W4A16_NO_EPILOGUE) {
    if (config.family != Family::kDecode || cc < 80)
      return Refuse(config, "epilogues are compiled into decode alone, for 8.0 and later");
    if (StageParts(p, config) > config.blocks)
      return Refuse(config,
                    "epilogues are compiled for K of whole 8 and groups of whole 64 codes alone");
  }
  if (config.family == Family::kDecode) {
    if (config.split_k > 1 && !HasClusters(cc))
      return Refuse(config, "split-K is a cluster, compiled for compute capability 9.0 alone");
    if (cc < 80 && (config.warps > kTuringWarps || config.tile_n * config.tile_m > kTuringOutputs))
      return Refuse(config, "has more warps or a larger tile than is compiled before 8.0");
    return CheckSharedMemory(device, config, SharedMemoryOfDecode(p, config).total_bytes);
  }
  if (const char* why = HopperRefusal(p, cc); why != nullptr) return Refuse(config, why);
  if (config.family == Family::kCutlass) {
    if (p.k < kBlockK) return Refuse(config, "K is less than 64");
    if (p.has_zeros) return Refuse(config, "zero points are not compiled into the CUTLASS kernels");
    if (p.out_dtype != p.x_dtype) return Refuse(config, "float32 output is not compiled in");
  }
  const bool any_group = config.family == Family::kWgmma && !AlwaysFolds(config.tile_m);
  if (!any_group && p.group_size < p.k && p.group_size % kBlockK != 0)
    return Refuse(config, "group size is not a multiple of 64");
  return {};
}

}  // namespace

Status CanImplement(const Problem& p, const Device& device, const Config& config) {
  if (config.ragged) return Refuse(config, "serves ragged products alone");
  return CanServe(p, device, config);
}

Status CanImplementRagged(const Problem& p, int64_t experts, const Device& device,
                          const Config& config) {
  if (!config.ragged) return Refuse(config, "does not serve ragged products");
  if (config.family == Family::kDecode) {
    const int64_t needed = SharedMemoryOfRaggedDecode(p, experts, config).total_bytes;
    if (Status s = CheckSharedMemory(device, config, needed); !s.ok()) return s;
  }
  if (config.family == Family::kPersistent && experts > kMostPersistentExperts)
    return Refuse(config, "more than " + std::to_string(kMostPersistentExperts) + " experts");
  return CanServe(p, device, config);
}

// What PersistentTileSchedulerSm90StreamKParams::get_workspace_component_sizes of CUTLASS counts
// for clusters of one CTA: the last full wave and the partial one are cut along K, and each of
// their tiles keeps its float32 sums and one 4-byte barrier for each of two warpgroups.
int64_t WorkspaceBytes(const Problem& p, const Device& device, const Config& config) {
  if (config.scheduler != Scheduler::kStreamK) return 0;
  constexpr int64_t kMinTilesK = 8;  // with no more than these along K, nothing is cut
  const int64_t tiles = CeilDiv(p.n, config.tile_n) * CeilDiv(p.m, config.tile_m);
  const int64_t sms = std::max(device.num_sms, 1);
  if (tiles % sms == 0 || BlocksK(p.k) <= kMinTilesK) return 0;
  const int64_t cut_tiles = tiles - std::max<int64_t>(tiles / sms - 1, 0) * sms;
  const auto align = [](int64_t bytes) { return CeilDiv(bytes, 128) * 128; };
  return align(cut_tiles * config.tile_n * config.tile_m * 4) + align(cut_tiles * 2 * 4);
}

}  // namespace w4a16
