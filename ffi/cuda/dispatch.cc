#include "dispatch.h"

#include "../heuristics.h"
#include "cuda_status.h"

namespace w4a16 {

Status CurrentDevice(Device* device) {
  int ordinal = 0, major = 0, minor = 0, num_sms = 0;
  if (Status s = ToStatus(cudaGetDevice(&ordinal), "cudaGetDevice"); !s.ok()) return s;
  const std::pair<int*, cudaDeviceAttr> wanted[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},
      {&minor, cudaDevAttrComputeCapabilityMinor},
      {&num_sms, cudaDevAttrMultiProcessorCount},
  };
  for (auto [value, attribute] : wanted) {
    if (Status s =
            ToStatus(cudaDeviceGetAttribute(value, attribute, ordinal), "cudaDeviceGetAttribute");
        !s.ok())
      return s;
  }
  *device = {10 * major + minor, num_sms};
  return {};
}

Status RunCuda(const Problem& p, const Operands& o, const Config* config, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return {};
  Device device;
  if (Status s = CurrentDevice(&device); !s.ok()) return s;
  if (config == nullptr) {
    if (Status s = Select(p, device, o.workspace_bytes, &config); !s.ok()) return s;
  } else if (Status s = CanImplement(p, device, *config); !s.ok()) {
    return s;
  }
  const int64_t workspace_bytes = WorkspaceBytes(p, device, *config);
  if (workspace_bytes > o.workspace_bytes)
    return Status::Invalid("workspace: " + std::string(config->name) + " needs " +
                           std::to_string(workspace_bytes) + " bytes, got " +
                           std::to_string(o.workspace_bytes));
  switch (config->family) {
    case Family::kDecode:
      return RunDecode(p, o, *config, device, stream);
    case Family::kWgmma:
      return RunWgmma(p, o, *config, stream);
    case Family::kPersistent:
      return RunPersistent(p, o, *config, device.num_sms, stream);
    case Family::kCutlass:
      return RunCutlass(p, o, *config, device.num_sms, stream);
  }
  return Status::Internal(std::string(config->name) + ": unknown family");
}

Status RunRaggedCuda(const Problem& p, const Experts& e, const Operands& o, const Config* config,
                     cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return {};
  Device device;
  if (Status s = CurrentDevice(&device); !s.ok()) return s;
  if (config == nullptr) {
    if (Status s = SelectRagged(p, e.count, device, &config); !s.ok()) return s;
  } else if (Status s = CanImplementRagged(p, e.count, device, *config); !s.ok()) {
    return s;
  }
  switch (config->family) {
    case Family::kDecode:
      return RunRaggedDecode(p, e, o, *config, device.num_sms, stream);
    case Family::kWgmma:
      return RunRaggedWgmma(p, e, o, *config, stream);
    case Family::kPersistent:
      return RunRaggedPersistent(p, e, o, *config, device.num_sms, stream);
    case Family::kCutlass:
      break;
  }
  return Status::Internal(std::string(config->name) + ": unknown family");
}

}  // namespace w4a16
