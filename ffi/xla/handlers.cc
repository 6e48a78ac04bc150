// The FFI handlers: decode buffers and attributes, check how they relate, call the C interface,
// return its status. The checks do not trust the Python side: a module may be hand-written or
// deserialised. What the C interface checks itself (extents, pointers, alignment, configuration,
// workspace) is not repeated here.
#include "handlers.h"

#include <exception>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../layout.h"
#include "../problem.h"
#include "../w4a16.h"
#include "thread_pool.h"
#include "xla/ffi/api/ffi.h"

namespace w4a16::xla {
namespace {

namespace ffi = ::xla::ffi;
using ffi::AnyBuffer;
using ffi::Error;
using Dimensions = ffi::Span<const int64_t>;

Error Invalid(std::string message) { return Error::InvalidArgument(std::move(message)); }

// No exception may leave a handler: it would end the process.
template <typename Body>
Error Guard(Body&& body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    return Error::Internal(error.what());
  } catch (...) {
    return Error::Internal("an exception of unknown type");
  }
}

Error ToError(const w4a16_status& status) {
  switch (status.code) {
    case W4A16_OK:
      return Error::Success();
    case W4A16_INVALID_ARGUMENT:
      return Invalid(status.message);
    case W4A16_UNSUPPORTED:
      return Error(ffi::ErrorCode::kUnimplemented, status.message);
    default:
      return Error::Internal(status.message);
  }
}

std::string ShapeText(Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

Error CheckShape(const char* name, AnyBuffer buffer, const std::vector<int64_t>& expected) {
  const Dimensions got = buffer.dimensions();
  const Dimensions want(expected.data(), expected.size());
  if (std::equal(got.begin(), got.end(), want.begin(), want.end())) return Error::Success();
  return Invalid(std::string(name) + ": expected shape " + ShapeText(want) + ", got " +
                 ShapeText(got));
}

Error CheckType(const char* name, AnyBuffer buffer, ffi::DataType expected) {
  if (buffer.element_type() == expected) return Error::Success();
  return Invalid(std::string(name) + ": expected element type " +
                 std::to_string(static_cast<int>(expected)) + ", got " +
                 std::to_string(static_cast<int>(buffer.element_type())));
}

Error ReadDType(const char* name, AnyBuffer buffer, DType* dtype) {
  switch (buffer.element_type()) {
    case ffi::F16:
      *dtype = W4A16_F16;
      return Error::Success();
    case ffi::BF16:
      *dtype = W4A16_BF16;
      return Error::Success();
    case ffi::F32:
      *dtype = W4A16_F32;
      return Error::Success();
    default:
      return Invalid(std::string(name) +
                     ": expected float16, bfloat16 or float32, got element type " +
                     std::to_string(static_cast<int>(buffer.element_type())));
  }
}

Error CheckRank(const char* name, AnyBuffer buffer, size_t rank) {
  if (buffer.dimensions().size() == rank) return Error::Success();
  return Invalid(std::string(name) + ": expected rank " + std::to_string(rank) + ", got shape " +
                 ShapeText(buffer.dimensions()));
}

Error CheckGroupSize(int64_t group_size) {
  if (group_size > 0) return Error::Success();
  return Invalid("group_size: expected a positive number, got " + std::to_string(group_size));
}

#define W4A16_RETURN_IF_ERROR(expression) \
  if (Error error = (expression); error.failure()) return error

// qweight, scales and zeros of a weight [k, n], or of a stack of them; shapes and types follow from
// the scales' type.
Error CheckWeight(AnyBuffer qweight, AnyBuffer scales, std::optional<AnyBuffer> zeros, int64_t k,
                  int64_t n, int64_t group_size, std::optional<int64_t> stack = {}) {
  const int64_t groups = NumGroups(k, group_size);
  std::vector<int64_t> codes = {BlocksK(k), BlocksN(n), kBlockWords}, factors = {groups, n};
  if (stack) {
    codes.insert(codes.begin(), *stack);
    factors.insert(factors.begin(), *stack);
  }
  W4A16_RETURN_IF_ERROR(CheckType("qweight", qweight, ffi::U32));
  W4A16_RETURN_IF_ERROR(CheckShape("qweight", qweight, codes));
  W4A16_RETURN_IF_ERROR(CheckShape("scales", scales, factors));
  if (zeros) {
    W4A16_RETURN_IF_ERROR(CheckType("zeros", *zeros, scales.element_type()));
    W4A16_RETURN_IF_ERROR(CheckShape("zeros", *zeros, factors));
  }
  return Error::Success();
}

// Takes the next of the optional operands, in their order.
class OptionalArgs {
 public:
  explicit OptionalArgs(ffi::RemainingArgs args) : args_(args) {}

  Error Take(const char* name, bool present, std::optional<AnyBuffer>* buffer) {
    if (!present) return Error::Success();
    auto next = args_.get<AnyBuffer>(taken_++);
    if (!next.has_value()) return Invalid(std::string(name) + ": expected an operand, got none");
    *buffer = next.value();
    return Error::Success();
  }

  Error CheckAllTaken() const {
    if (args_.size() == taken_) return Error::Success();
    return Invalid("operands: expected " + std::to_string(taken_) + " optional ones, got " +
                   std::to_string(args_.size()));
  }

 private:
  ffi::RemainingArgs args_;
  size_t taken_ = 0;
};

const void* Data(std::optional<AnyBuffer> buffer) {
  return buffer ? buffer->untyped_data() : nullptr;
}

// The two backends: what a handler needs beyond its buffers, and which C functions it calls.
struct Cpu {
  using Context = ffi::ThreadPool;

  static w4a16_status Dot(Context pool, const Problem& p, const Operands& o, const char*) {
    PoolExecutor executor(pool);
    const w4a16_executor callbacks = executor.callbacks();
    return w4a16_run_cpu(&p, &o, &callbacks);
  }
  static w4a16_status RaggedDot(Context pool, const Problem& p, const Experts& e, const Operands& o,
                                const char*) {
    PoolExecutor executor(pool);
    const w4a16_executor callbacks = executor.callbacks();
    return w4a16_ragged_run_cpu(&p, e.count, &o, e.group_sizes, &callbacks);
  }
  template <typename... Args>
  static w4a16_status Pack(Context pool, Args... args) {
    PoolExecutor executor(pool);
    const w4a16_executor callbacks = executor.callbacks();
    return w4a16_pack_cpu(args..., &callbacks);
  }
  template <typename... Args>
  static w4a16_status Dequantize(Context pool, Args... args) {
    PoolExecutor executor(pool);
    const w4a16_executor callbacks = executor.callbacks();
    return w4a16_dequantize_cpu(args..., &callbacks);
  }
  template <typename... Args>
  static w4a16_status Quantize(Context pool, Args... args) {
    PoolExecutor executor(pool);
    const w4a16_executor callbacks = executor.callbacks();
    return w4a16_quantize_cpu(args..., &callbacks);
  }
};

struct Cuda {
  using Context = void*;  // cudaStream_t

  static w4a16_status Dot(Context stream, const Problem& p, const Operands& o, const char* config) {
    return w4a16_run_cuda(&p, &o, config, stream);
  }
  static w4a16_status RaggedDot(Context stream, const Problem& p, const Experts& e,
                                const Operands& o, const char* config) {
    return w4a16_ragged_run_cuda(&p, e.count, &o, e.group_sizes, config, stream);
  }
  template <typename... Args>
  static w4a16_status Pack(Context stream, Args... args) {
    return w4a16_pack_cuda(args..., stream);
  }
  template <typename... Args>
  static w4a16_status Dequantize(Context stream, Args... args) {
    return w4a16_dequantize_cuda(args..., stream);
  }
  template <typename... Args>
  static w4a16_status Quantize(Context stream, Args... args) {
    return w4a16_quantize_cuda(args..., stream);
  }
};

// M, N and K of a product of x [..., K] that gives [..., N].
Error ReadSizes(AnyBuffer x, Dimensions out_dims, Problem* p) {
  const Dimensions x_dims = x.dimensions();
  if (x_dims.size() == 0 || out_dims.size() != x_dims.size() ||
      !std::equal(x_dims.begin(), x_dims.end() - 1, out_dims.begin()))
    return Invalid("out: expected shape [..., N] for x " + ShapeText(x_dims) + ", got " +
                   ShapeText(out_dims));
  p->k = x_dims.back();
  p->n = out_dims.back();
  p->m = 1;
  for (size_t i = 0; i + 1 < x_dims.size(); ++i) {
    if (__builtin_mul_overflow(p->m, x_dims[i], &p->m))
      return Invalid("x: too many rows in shape " + ShapeText(x_dims));
  }
  return Error::Success();
}

template <typename Backend>
Error Dot(typename Backend::Context context, AnyBuffer x, AnyBuffer qweight, AnyBuffer scales,
          ffi::RemainingArgs optional, ffi::Result<AnyBuffer> out, ffi::RemainingRets scratch,
          int64_t group_size, float alpha, bool has_zeros, bool has_bias, bool batch_invariant,
          std::string_view config) {
  return Guard([&]() -> Error {
    OptionalArgs args(optional);
    std::optional<AnyBuffer> zeros, bias;
    W4A16_RETURN_IF_ERROR(args.Take("zeros", has_zeros, &zeros));
    W4A16_RETURN_IF_ERROR(args.Take("bias", has_bias, &bias));
    W4A16_RETURN_IF_ERROR(args.CheckAllTaken());
    W4A16_RETURN_IF_ERROR(CheckGroupSize(group_size));

    Problem p = {};
    W4A16_RETURN_IF_ERROR(ReadSizes(x, out->dimensions(), &p));
    p.group_size = group_size;
    p.has_zeros = has_zeros;
    p.has_bias = has_bias;
    p.batch_invariant = batch_invariant;
    W4A16_RETURN_IF_ERROR(ReadDType("x", x, &p.x_dtype));
    W4A16_RETURN_IF_ERROR(ReadDType("out", *out, &p.out_dtype));
    W4A16_RETURN_IF_ERROR(CheckType("scales", scales, x.element_type()));
    W4A16_RETURN_IF_ERROR(CheckWeight(qweight, scales, zeros, p.k, p.n, group_size));
    if (bias) {
      W4A16_RETURN_IF_ERROR(CheckType("bias", *bias, x.element_type()));
      W4A16_RETURN_IF_ERROR(CheckShape("bias", *bias, {p.n}));
    }

    Operands o = {};
    o.x = x.untyped_data();
    o.qweight = static_cast<const uint32_t*>(qweight.untyped_data());
    o.scales = scales.untyped_data();
    o.zeros = Data(zeros);
    o.bias = Data(bias);
    o.out = out->untyped_data();
    o.alpha = alpha;
    if (scratch.size() > 1)
      return Invalid("results: expected out and at most a workspace, got " +
                     std::to_string(1 + scratch.size()));
    if (scratch.size() == 1) {
      auto workspace = scratch.get<AnyBuffer>(0);
      if (!workspace.has_value()) return Invalid("workspace: expected a buffer");
      o.workspace = (*workspace)->untyped_data();
      o.workspace_bytes = static_cast<int64_t>((*workspace)->size_bytes());
    }
    return ToError(Backend::Dot(context, p, o, std::string(config).c_str()));
  });
}

// A product with an epilogue. Operands: x, qweight, scales, then zeros, and residual and norm_scale
// (add_norm) or squares (swiglu). Results: out, then scaled and squares (add_norm).
Error FusedDot(void* stream, AnyBuffer x, AnyBuffer qweight, AnyBuffer scales,
               ffi::RemainingArgs optional, ffi::Result<AnyBuffer> out, ffi::RemainingRets further,
               int64_t group_size, float epsilon, bool has_zeros, bool has_squares,
               std::string_view epilogue, std::string_view config) {
  return Guard([&]() -> Error {
    Problem p = {};
    if (!FindEpilogue(epilogue, &p.epilogue))
      return Invalid("epilogue: expected add_norm or swiglu, got " + std::string(epilogue));
    const bool add_norm = p.epilogue == W4A16_ADD_NORM;
    OptionalArgs args(optional);
    std::optional<AnyBuffer> zeros, residual, norm_scale, squares, scaled;
    W4A16_RETURN_IF_ERROR(args.Take("zeros", has_zeros, &zeros));
    W4A16_RETURN_IF_ERROR(args.Take("residual", add_norm, &residual));
    W4A16_RETURN_IF_ERROR(args.Take("norm_scale", add_norm, &norm_scale));
    W4A16_RETURN_IF_ERROR(args.Take("squares", !add_norm && has_squares, &squares));
    W4A16_RETURN_IF_ERROR(args.CheckAllTaken());
    if (further.size() != (add_norm ? 2 : 0))
      return Invalid("results: expected " + std::to_string(add_norm ? 3 : 1) + ", got " +
                     std::to_string(1 + further.size()));
    if (add_norm) {
      auto first = further.get<AnyBuffer>(0), second = further.get<AnyBuffer>(1);
      if (!first.has_value() || !second.has_value())
        return Invalid("results: expected scaled and squares");
      scaled = **first, squares = **second;
    }

    W4A16_RETURN_IF_ERROR(CheckGroupSize(group_size));
    W4A16_RETURN_IF_ERROR(ReadSizes(x, out->dimensions(), &p));
    if (!add_norm) p.n *= 2;
    p.group_size = group_size;
    p.has_zeros = has_zeros;
    W4A16_RETURN_IF_ERROR(ReadDType("x", x, &p.x_dtype));
    p.out_dtype = p.x_dtype;
    W4A16_RETURN_IF_ERROR(CheckType("out", *out, x.element_type()));
    W4A16_RETURN_IF_ERROR(CheckType("scales", scales, x.element_type()));
    W4A16_RETURN_IF_ERROR(CheckWeight(qweight, scales, zeros, p.k, p.n, group_size));
    std::vector<int64_t> shape(x.dimensions().begin(), x.dimensions().end());
    if (add_norm) {
      shape.back() = p.n;
      W4A16_RETURN_IF_ERROR(CheckType("residual", *residual, x.element_type()));
      W4A16_RETURN_IF_ERROR(CheckShape("residual", *residual, shape));
      W4A16_RETURN_IF_ERROR(CheckType("norm_scale", *norm_scale, x.element_type()));
      W4A16_RETURN_IF_ERROR(CheckShape("norm_scale", *norm_scale, {p.n}));
      W4A16_RETURN_IF_ERROR(CheckType("scaled", *scaled, x.element_type()));
      W4A16_RETURN_IF_ERROR(CheckShape("scaled", *scaled, shape));
    }
    if (squares) {
      const Dimensions dims = squares->dimensions();
      shape.back() = add_norm ? BlocksN(p.n) : dims.size() > 0 ? dims.back() : 1;
      W4A16_RETURN_IF_ERROR(CheckType("squares", *squares, ffi::F32));
      W4A16_RETURN_IF_ERROR(CheckShape("squares", *squares, shape));
    }

    Operands o = {};
    o.x = x.untyped_data();
    o.qweight = static_cast<const uint32_t*>(qweight.untyped_data());
    o.scales = scales.untyped_data();
    o.zeros = Data(zeros);
    o.out = out->untyped_data();
    o.alpha = 1.0f;
    o.residual = Data(residual);
    o.norm_scale = Data(norm_scale);
    o.scaled = const_cast<void*>(Data(scaled));
    o.squares = static_cast<float*>(const_cast<void*>(Data(squares)));
    o.num_squares = squares ? shape.back() : 0;
    o.epsilon = epsilon;
    return ToError(w4a16_run_cuda(&p, &o, std::string(config).c_str(), stream));
  });
}

template <typename Backend>
Error RaggedDot(typename Backend::Context context, AnyBuffer x, AnyBuffer group_sizes,
                AnyBuffer qweight, AnyBuffer scales, ffi::RemainingArgs optional,
                ffi::Result<AnyBuffer> out, int64_t group_size, bool has_zeros,
                std::string_view config) {
  return Guard([&]() -> Error {
    OptionalArgs args(optional);
    std::optional<AnyBuffer> zeros;
    W4A16_RETURN_IF_ERROR(args.Take("zeros", has_zeros, &zeros));
    W4A16_RETURN_IF_ERROR(args.CheckAllTaken());
    W4A16_RETURN_IF_ERROR(CheckGroupSize(group_size));
    W4A16_RETURN_IF_ERROR(CheckRank("x", x, 2));
    W4A16_RETURN_IF_ERROR(CheckRank("out", *out, 2));
    W4A16_RETURN_IF_ERROR(CheckRank("group_sizes", group_sizes, 1));
    W4A16_RETURN_IF_ERROR(CheckType("group_sizes", group_sizes, ffi::S32));
    Problem p = {};
    p.m = x.dimensions()[0];
    p.k = x.dimensions()[1];
    p.n = out->dimensions()[1];
    p.group_size = group_size;
    p.has_zeros = has_zeros;
    W4A16_RETURN_IF_ERROR(ReadDType("x", x, &p.x_dtype));
    W4A16_RETURN_IF_ERROR(ReadDType("out", *out, &p.out_dtype));
    W4A16_RETURN_IF_ERROR(CheckShape("out", *out, {p.m, p.n}));
    W4A16_RETURN_IF_ERROR(CheckType("scales", scales, x.element_type()));
    const Experts e = {group_sizes.dimensions()[0],
                       static_cast<const int32_t*>(group_sizes.untyped_data())};
    W4A16_RETURN_IF_ERROR(CheckWeight(qweight, scales, zeros, p.k, p.n, group_size, e.count));

    Operands o = {};
    o.x = x.untyped_data();
    o.qweight = static_cast<const uint32_t*>(qweight.untyped_data());
    o.scales = scales.untyped_data();
    o.zeros = Data(zeros);
    o.out = out->untyped_data();
    o.alpha = 1.0f;
    return ToError(Backend::RaggedDot(context, p, e, o, std::string(config).c_str()));
  });
}

template <typename Backend>
Error Pack(typename Backend::Context context, AnyBuffer codes, ffi::Result<AnyBuffer> qweight) {
  return Guard([&]() -> Error {
    W4A16_RETURN_IF_ERROR(CheckRank("codes", codes, 2));
    W4A16_RETURN_IF_ERROR(CheckType("codes", codes, ffi::U8));
    const int64_t k = codes.dimensions()[0], n = codes.dimensions()[1];
    W4A16_RETURN_IF_ERROR(CheckType("qweight", *qweight, ffi::U32));
    W4A16_RETURN_IF_ERROR(CheckShape("qweight", *qweight, {BlocksK(k), BlocksN(n), kBlockWords}));
    return ToError(Backend::Pack(context, static_cast<const uint8_t*>(codes.untyped_data()), k, n,
                                 static_cast<uint32_t*>(qweight->untyped_data())));
  });
}

template <typename Backend>
Error Dequantize(typename Backend::Context context, AnyBuffer qweight, AnyBuffer scales,
                 ffi::RemainingArgs optional, ffi::Result<AnyBuffer> out, int64_t group_size,
                 bool has_zeros) {
  return Guard([&]() -> Error {
    OptionalArgs args(optional);
    std::optional<AnyBuffer> zeros;
    W4A16_RETURN_IF_ERROR(args.Take("zeros", has_zeros, &zeros));
    W4A16_RETURN_IF_ERROR(args.CheckAllTaken());
    W4A16_RETURN_IF_ERROR(CheckGroupSize(group_size));
    W4A16_RETURN_IF_ERROR(CheckRank("out", *out, 2));
    const int64_t k = out->dimensions()[0], n = out->dimensions()[1];
    DType scale_dtype, out_dtype;
    W4A16_RETURN_IF_ERROR(ReadDType("scales", scales, &scale_dtype));
    W4A16_RETURN_IF_ERROR(ReadDType("out", *out, &out_dtype));
    W4A16_RETURN_IF_ERROR(CheckWeight(qweight, scales, zeros, k, n, group_size));
    return ToError(
        Backend::Dequantize(context, static_cast<const uint32_t*>(qweight.untyped_data()),
                            static_cast<const void*>(scales.untyped_data()), Data(zeros),
                            scale_dtype, k, n, group_size, out_dtype, out->untyped_data()));
  });
}

template <typename Backend>
Error Quantize(typename Backend::Context context, AnyBuffer w, ffi::Result<AnyBuffer> qweight,
               ffi::Result<AnyBuffer> scales, ffi::RemainingRets optional, int64_t group_size,
               bool symmetric) {
  return Guard([&]() -> Error {
    W4A16_RETURN_IF_ERROR(CheckGroupSize(group_size));
    W4A16_RETURN_IF_ERROR(CheckRank("w", w, 2));
    const int64_t k = w.dimensions()[0], n = w.dimensions()[1];
    DType w_dtype, scale_dtype;
    W4A16_RETURN_IF_ERROR(ReadDType("w", w, &w_dtype));
    W4A16_RETURN_IF_ERROR(ReadDType("scales", *scales, &scale_dtype));
    const size_t expected_optional = symmetric ? 0 : 1;
    if (optional.size() != expected_optional)
      return Invalid("results: expected " + std::to_string(2 + expected_optional) + ", got " +
                     std::to_string(2 + optional.size()));
    std::optional<AnyBuffer> zeros;
    if (!symmetric) {
      auto result = optional.get<AnyBuffer>(0);
      if (!result.has_value()) return Invalid("zeros: expected a buffer");
      zeros = **result;
    }
    W4A16_RETURN_IF_ERROR(CheckWeight(*qweight, *scales, zeros, k, n, group_size));
    return ToError(Backend::Quantize(context, static_cast<const void*>(w.untyped_data()), w_dtype,
                                     k, n, group_size, scale_dtype,
                                     static_cast<uint32_t*>(qweight->untyped_data()),
                                     scales->untyped_data(), const_cast<void*>(Data(zeros))));
  });
}

auto BindCpu() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }
auto BindCuda() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>(); }

#define W4A16_DEFINE(NAME, BACKEND, FUNCTION, BINDING)                     \
  XLA_FFI_DEFINE_HANDLER(NAME, FUNCTION<BACKEND>, Bind##BACKEND() BINDING, \
                         {ffi::Traits::kCmdBufferCompatible});
#define W4A16_DEFINE_BOTH(FUNCTION, BINDING)           \
  W4A16_DEFINE(kCpu##FUNCTION, Cpu, FUNCTION, BINDING) \
  W4A16_DEFINE(kCuda##FUNCTION, Cuda, FUNCTION, BINDING)

W4A16_DEFINE_BOTH(Dot, .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .RemainingArgs()
                           .Ret<AnyBuffer>()
                           .RemainingRets()
                           .Attr<int64_t>("group_size")
                           .Attr<float>("alpha")
                           .Attr<bool>("has_zeros")
                           .Attr<bool>("has_bias")
                           .Attr<bool>("batch_invariant")
                           .Attr<std::string_view>("config"))
XLA_FFI_DEFINE_HANDLER(kCudaFusedDot, FusedDot,
                       BindCuda()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .RemainingArgs()
                           .Ret<AnyBuffer>()
                           .RemainingRets()
                           .Attr<int64_t>("group_size")
                           .Attr<float>("epsilon")
                           .Attr<bool>("has_zeros")
                           .Attr<bool>("has_squares")
                           .Attr<std::string_view>("epilogue")
                           .Attr<std::string_view>("config"),
                       {ffi::Traits::kCmdBufferCompatible});
W4A16_DEFINE_BOTH(RaggedDot, .Arg<AnyBuffer>()
                                 .Arg<AnyBuffer>()
                                 .Arg<AnyBuffer>()
                                 .Arg<AnyBuffer>()
                                 .RemainingArgs()
                                 .Ret<AnyBuffer>()
                                 .Attr<int64_t>("group_size")
                                 .Attr<bool>("has_zeros")
                                 .Attr<std::string_view>("config"))
W4A16_DEFINE_BOTH(Pack, .Arg<AnyBuffer>().Ret<AnyBuffer>())
W4A16_DEFINE_BOTH(Dequantize, .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<AnyBuffer>()
                                  .Attr<int64_t>("group_size")
                                  .Attr<bool>("has_zeros"))
W4A16_DEFINE_BOTH(Quantize, .Arg<AnyBuffer>()
                                .Ret<AnyBuffer>()
                                .Ret<AnyBuffer>()
                                .RemainingRets()
                                .Attr<int64_t>("group_size")
                                .Attr<bool>("symmetric"))

}  // namespace

Registrations AllRegistrations() {
  static const Registration kAll[] = {
      {"cpu", "w4a16_dot", kCpuDot},
      {"cpu", "w4a16_ragged_dot", kCpuRaggedDot},
      {"cpu", "w4a16_pack", kCpuPack},
      {"cpu", "w4a16_dequantize", kCpuDequantize},
      {"cpu", "w4a16_quantize", kCpuQuantize},
      {"CUDA", "w4a16_dot", kCudaDot},
      {"CUDA", "w4a16_fused_dot", kCudaFusedDot},
      {"CUDA", "w4a16_ragged_dot", kCudaRaggedDot},
      {"CUDA", "w4a16_pack", kCudaPack},
      {"CUDA", "w4a16_dequantize", kCudaDequantize},
      {"CUDA", "w4a16_quantize", kCudaQuantize},
  };
  constexpr int kNumCpu = 5;
  return {std::begin(kAll), w4a16_has_cuda() ? std::end(kAll) : std::begin(kAll) + kNumCpu};
}

}  // namespace w4a16::xla
