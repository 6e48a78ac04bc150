// The Python module jax_w4a16._w4a16: hands out what the library offers; no logic.
#include <dlfcn.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "config.h"
#include "w4a16.h"
#include "xla/handlers.h"

namespace nb = nanobind;

namespace {

w4a16_dtype ParseDType(const std::string& name) {
  for (w4a16_dtype dtype : {W4A16_F16, W4A16_BF16, W4A16_F32}) {
    if (name == w4a16::DTypeName(dtype)) return dtype;
  }
  throw nb::value_error(("dtype: expected float16, bfloat16 or float32, got " + name).c_str());
}

void ThrowIfFailed(const w4a16_status& status) {
  if (status.code != W4A16_OK) throw nb::value_error(status.message);
}

w4a16_epilogue ParseEpilogue(const std::string& name) {
  w4a16_epilogue epilogue = W4A16_NO_EPILOGUE;
  if (name != "none" && !w4a16::FindEpilogue(name, &epilogue))
    throw nb::value_error(("epilogue: expected none, add_norm or swiglu, got " + name).c_str());
  return epilogue;
}

// A problem and a device, of the keyword arguments that the look-ups share.
class Facts {
 public:
  explicit Facts(const nb::kwargs& given) : given_(given) {
    problem = {Take<int64_t>("m"),
               Take<int64_t>("n"),
               Take<int64_t>("k"),
               Take<int64_t>("group_size"),
               ParseDType(Take<std::string>("x_dtype")),
               ParseDType(Take<std::string>("out_dtype")),
               Take<bool>("has_zeros"),
               Take<bool>("has_bias"),
               Take<bool>("batch_invariant"),
               ParseEpilogue(given.contains("epilogue") ? Take<std::string>("epilogue") : "none")};
    device = {Take<int32_t>("compute_capability"), Take<int32_t>("num_sms")};
    if (given.size() != taken_)
      throw nb::type_error(("expected " + std::to_string(taken_) + " keyword arguments, got " +
                            std::to_string(given.size()))
                               .c_str());
  }

  w4a16_problem problem;
  w4a16_device device;

 private:
  template <typename T>
  T Take(const char* name) {
    T value;
    if (!given_.contains(name) || !nb::try_cast(given_[name], value))
      throw nb::type_error((std::string(name) + ": missing, or of another type").c_str());
    ++taken_;
    return value;
  }

  const nb::kwargs& given_;
  size_t taken_ = 0;
};

// None if `status` is ok, the message of a refusal; the caller's mistakes raise.
std::optional<std::string> Refusal(const w4a16_status& status) {
  if (status.code == W4A16_UNSUPPORTED) return status.message;
  ThrowIfFailed(status);
  return std::nullopt;
}

// Folder of the package: this module's own.
std::string PackageFolder() {
  Dl_info info = {};
  dladdr(reinterpret_cast<void*>(&ThrowIfFailed), &info);
  const std::string path = info.dli_fname ? info.dli_fname : "";
  return path.substr(0, path.rfind('/'));
}

nb::dict BuildInfo() {
  nb::dict info;
  info["version"] = w4a16_version();
  info["ffi_minor"] = XLA_FFI_API_MINOR;
  info["cuda"] = w4a16_has_cuda() != 0;
  const nb::str architectures(w4a16_cuda_architectures());
  info["cuda_architectures"] =
      nb::len(architectures) ? architectures.attr("split")(",") : nb::list();
  info["cpu_instruction_set"] = w4a16_cpu_instruction_set();
  nb::list configs;
  for (int i = 0; i < w4a16_config_count(); ++i) configs.append(w4a16_config_name(i));
  info["configs"] = configs;
  info["library"] = PackageFolder() + "/lib/libw4a16.so";
  info["program"] = PackageFolder() + "/bin/w4a16";
  return info;
}

nb::list Configs() {
  nb::list configs;
  for (int i = 0; i < w4a16::NumConfigs(); ++i) {
    const w4a16::Config& c = w4a16::ConfigAt(i);
    nb::dict entry;
    entry["name"] = c.name;
    entry["family"] = w4a16::FamilyName(c.family);
    entry["tile_n"] = c.tile_n;
    entry["tile_m"] = c.tile_m;
    entry["blocks"] = c.blocks;
    entry["warps"] = c.warps;
    entry["stages"] = c.stages;
    entry["split_k"] = c.split_k;
    entry["teams"] = c.teams;
    entry["cluster_n"] = c.cluster_n;
    entry["cluster_m"] = c.cluster_m;
    entry["ragged"] = c.ragged;
    entry["resident"] = c.resident;
    configs.append(entry);
  }
  return configs;
}

nb::dict RegistrationsDict() {
  nb::dict platforms;
  const auto [begin, end] = w4a16::xla::AllRegistrations();
  for (auto* r = begin; r != end; ++r) {
    if (!platforms.contains(r->platform)) platforms[r->platform] = nb::dict();
    nb::cast<nb::dict>(platforms[r->platform])[r->target] =
        nb::capsule(reinterpret_cast<void*>(r->handler));
  }
  return platforms;
}

}  // namespace

NB_MODULE(_w4a16, m) {
  m.attr("ffi_minor") = XLA_FFI_API_MINOR;
  m.def("registrations", &RegistrationsDict);
  m.def("build_info", &BuildInfo);
  m.def("configs", &Configs);

  // These take a problem and a device by keyword (Facts).
  m.def(
      "select",
      [](int64_t workspace_limit, const nb::kwargs& facts) {
        const Facts f(facts);
        const char* config = nullptr;
        int64_t bytes = 0;
        ThrowIfFailed(w4a16_select(&f.problem, &f.device, workspace_limit, &config));
        ThrowIfFailed(w4a16_workspace_bytes(&f.problem, &f.device, config, &bytes));
        return nb::make_tuple(config, bytes);
      },
      nb::arg("workspace_limit") = -1, nb::arg("facts"));
  m.def(
      "workspace_bytes",
      [](const std::string& config, const nb::kwargs& facts) {
        const Facts f(facts);
        int64_t bytes = 0;
        ThrowIfFailed(w4a16_workspace_bytes(&f.problem, &f.device, config.c_str(), &bytes));
        return bytes;
      },
      nb::arg("config"), nb::arg("facts"));
  m.def(
      "can_implement",
      [](const std::string& config, const nb::kwargs& facts) {
        const Facts f(facts);
        return Refusal(w4a16_can_implement(&f.problem, &f.device, config.c_str()));
      },
      nb::arg("config"), nb::arg("facts"),
      "Why `config` cannot serve the problem, or None if it can.");
  m.def(
      "ragged_select",
      [](int64_t experts, const nb::kwargs& facts) {
        const Facts f(facts);
        const char* config = nullptr;
        ThrowIfFailed(w4a16_ragged_select(&f.problem, experts, &f.device, &config));
        return config;
      },
      nb::arg("experts"), nb::arg("facts"));
  m.def(
      "ragged_can_implement",
      [](const std::string& config, int64_t experts, const nb::kwargs& facts) {
        const Facts f(facts);
        return Refusal(w4a16_ragged_can_implement(&f.problem, experts, &f.device, config.c_str()));
      },
      nb::arg("config"), nb::arg("experts"), nb::arg("facts"));
}
