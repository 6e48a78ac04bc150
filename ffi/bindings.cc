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

// Calls `body(problem, device)` with the arguments that the look-ups share.
template <typename Body>
auto WithProblem(int64_t m, int64_t n, int64_t k, int64_t group_size, const std::string& x_dtype,
                 const std::string& out_dtype, bool has_zeros, bool has_bias, bool batch_invariant,
                 int compute_capability, int num_sms, const std::string& epilogue, Body&& body) {
  const w4a16_problem problem = {m,
                                 n,
                                 k,
                                 group_size,
                                 ParseDType(x_dtype),
                                 ParseDType(out_dtype),
                                 has_zeros,
                                 has_bias,
                                 batch_invariant,
                                 ParseEpilogue(epilogue)};
  const w4a16_device device = {compute_capability, num_sms};
  return body(problem, device);
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
  m.def(
      "select",
      [](int64_t m, int64_t n, int64_t k, int64_t group_size, const std::string& x_dtype,
         const std::string& out_dtype, bool has_zeros, bool has_bias, bool batch_invariant,
         int compute_capability, int num_sms, const std::string& epilogue,
         int64_t workspace_limit) {
        return WithProblem(
            m, n, k, group_size, x_dtype, out_dtype, has_zeros, has_bias, batch_invariant,
            compute_capability, num_sms, epilogue, [&](const auto& problem, const auto& device) {
              const char* config = nullptr;
              int64_t bytes = 0;
              ThrowIfFailed(w4a16_select(&problem, &device, workspace_limit, &config));
              ThrowIfFailed(w4a16_workspace_bytes(&problem, &device, config, &bytes));
              return nb::make_tuple(config, bytes);
            });
      },
      nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("group_size"), nb::arg("x_dtype"),
      nb::arg("out_dtype"), nb::arg("has_zeros"), nb::arg("has_bias"), nb::arg("batch_invariant"),
      nb::arg("compute_capability"), nb::arg("num_sms"), nb::arg("epilogue") = "none",
      nb::arg("workspace_limit") = -1);
  m.def(
      "workspace_bytes",
      [](const std::string& config, int64_t m, int64_t n, int64_t k, int64_t group_size,
         const std::string& x_dtype, const std::string& out_dtype, bool has_zeros, bool has_bias,
         bool batch_invariant, int compute_capability, int num_sms, const std::string& epilogue) {
        return WithProblem(
            m, n, k, group_size, x_dtype, out_dtype, has_zeros, has_bias, batch_invariant,
            compute_capability, num_sms, epilogue, [&](const auto& problem, const auto& device) {
              int64_t bytes = 0;
              ThrowIfFailed(w4a16_workspace_bytes(&problem, &device, config.c_str(), &bytes));
              return bytes;
            });
      },
      nb::arg("config"), nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("group_size"),
      nb::arg("x_dtype"), nb::arg("out_dtype"), nb::arg("has_zeros"), nb::arg("has_bias"),
      nb::arg("batch_invariant"), nb::arg("compute_capability"), nb::arg("num_sms"),
      nb::arg("epilogue") = "none");
  m.def(
      "can_implement",
      [](const std::string& config, int64_t m, int64_t n, int64_t k, int64_t group_size,
         const std::string& x_dtype, const std::string& out_dtype, bool has_zeros, bool has_bias,
         bool batch_invariant, int compute_capability, int num_sms, const std::string& epilogue) {
        return WithProblem(
            m, n, k, group_size, x_dtype, out_dtype, has_zeros, has_bias, batch_invariant,
            compute_capability, num_sms, epilogue,
            [&](const auto& problem, const auto& device) -> std::optional<std::string> {
              const w4a16_status status = w4a16_can_implement(&problem, &device, config.c_str());
              if (status.code == W4A16_OK) return std::nullopt;
              if (status.code == W4A16_UNSUPPORTED) return status.message;
              throw nb::value_error(status.message);
            });
      },
      nb::arg("config"), nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("group_size"),
      nb::arg("x_dtype"), nb::arg("out_dtype"), nb::arg("has_zeros"), nb::arg("has_bias"),
      nb::arg("batch_invariant"), nb::arg("compute_capability"), nb::arg("num_sms"),
      nb::arg("epilogue") = "none", "Why `config` cannot serve the problem, or None if it can.");
  m.def(
      "ragged_select",
      [](int64_t experts, int64_t m, int64_t n, int64_t k, int64_t group_size,
         const std::string& x_dtype, const std::string& out_dtype, bool has_zeros, bool has_bias,
         bool batch_invariant, int compute_capability, int num_sms, const std::string& epilogue) {
        return WithProblem(
            m, n, k, group_size, x_dtype, out_dtype, has_zeros, has_bias, batch_invariant,
            compute_capability, num_sms, epilogue, [&](const auto& problem, const auto& device) {
              const char* config = nullptr;
              ThrowIfFailed(w4a16_ragged_select(&problem, experts, &device, &config));
              return config;
            });
      },
      nb::arg("experts"), nb::arg("m"), nb::arg("n"), nb::arg("k"), nb::arg("group_size"),
      nb::arg("x_dtype"), nb::arg("out_dtype"), nb::arg("has_zeros"), nb::arg("has_bias"),
      nb::arg("batch_invariant"), nb::arg("compute_capability"), nb::arg("num_sms"),
      nb::arg("epilogue") = "none");
  m.def(
      "ragged_can_implement",
      [](const std::string& config, int64_t experts, int64_t m, int64_t n, int64_t k,
         int64_t group_size, const std::string& x_dtype, const std::string& out_dtype,
         bool has_zeros, bool has_bias, bool batch_invariant, int compute_capability, int num_sms,
         const std::string& epilogue) {
        return WithProblem(
            m, n, k, group_size, x_dtype, out_dtype, has_zeros, has_bias, batch_invariant,
            compute_capability, num_sms, epilogue,
            [&](const auto& problem, const auto& device) -> std::optional<std::string> {
              const w4a16_status status =
                  w4a16_ragged_can_implement(&problem, experts, &device, config.c_str());
              if (status.code == W4A16_OK) return std::nullopt;
              if (status.code == W4A16_UNSUPPORTED) return status.message;
              throw nb::value_error(status.message);
            });
      },
      nb::arg("config"), nb::arg("experts"), nb::arg("m"), nb::arg("n"), nb::arg("k"),
      nb::arg("group_size"), nb::arg("x_dtype"), nb::arg("out_dtype"), nb::arg("has_zeros"),
      nb::arg("has_bias"), nb::arg("batch_invariant"), nb::arg("compute_capability"),
      nb::arg("num_sms"), nb::arg("epilogue") = "none");
}
