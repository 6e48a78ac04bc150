/* Public C interface of libw4a16: 4-bit-weight, 16-bit-activation matrix multiplication.
 *
 *   out[M, N] = alpha * x[M, K] . w[K, N] + bias[N]
 *   w[k, n] = (code[k, n] - zero[k/g, n]) * scale[k/g, n]
 *
 * x, scales, zeros, bias are of one type (x_dtype); accumulation is float32. All arrays are dense
 * and row-major; M, N and K are at most 2^30. The weight is packed (layout.h):
 * uint32[ceil(K/64)][ceil(N/16)][128]. scales and zeros are [ceil(K/group_size), N]. zeros may be
 * NULL: every zero point is then 8. bias may be NULL.
 *
 * Functions named *_cuda take device pointers and a cudaStream_t (as void*) and only enqueue work:
 * they neither allocate nor synchronise. Functions named *_cpu take host pointers and return when
 * done. Every pointer must be aligned to 16 bytes, or the call is refused. No function throws or
 * exits.
 */
#ifndef W4A16_H_
#define W4A16_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define W4A16_API __attribute__((visibility("default")))
#else
#define W4A16_API
#endif

typedef enum {
  W4A16_OK = 0,
  W4A16_INVALID_ARGUMENT = 1, /* the caller's mistake; the message says what was expected */
  W4A16_UNSUPPORTED = 2,      /* a valid call that this build or device cannot serve */
  W4A16_INTERNAL = 3,         /* CUDA or the system reported an error */
} w4a16_status_code;

/* A result. `message` is empty when ok, and always null-terminated. */
typedef struct {
  w4a16_status_code code;
  char message[508];
} w4a16_status;

typedef enum {
  W4A16_F16 = 0,
  W4A16_BF16 = 1,
  W4A16_F32 = 2,                   /* as x_dtype: CPU only */
  W4A16_NO_DTYPE = -0x7fffffff - 1 /* makes room for any int, which a call then refuses */
} w4a16_dtype;

/* What becomes of a product y before it is stored. */
typedef enum {
  W4A16_NO_EPILOGUE = 0,
  W4A16_ADD_NORM = 1, /* out = residual + y, and what the next RMSNorm needs of it */
  W4A16_SWIGLU = 2    /* out = silu(gate) * up of y's columns, after the factor of an RMSNorm */
} w4a16_epilogue;

/* The static part of a call. */
typedef struct {
  int64_t m, n, k;
  int64_t group_size;    /* codes of K that share a scale; >= K means one scale per column */
  w4a16_dtype x_dtype;   /* type of x, scales, zeros and bias */
  w4a16_dtype out_dtype; /* x_dtype or W4A16_F32 */
  int32_t has_zeros;
  int32_t has_bias;
  int32_t
      batch_invariant; /* a row's result must not depend on M or on the other rows, to the bit */
  w4a16_epilogue epilogue; /* CUDA's decode kernels alone; then out is of x_dtype, there is no bias,
                              N % 16 == 0, K % 8 == 0, and a group is whole 64 codes, or K */
} w4a16_problem;

/* The arrays of a call.
 *
 * W4A16_ADD_NORM: out = residual + y, rounded; scaled = out * norm_scale; squares[m][b] is the sum
 * of the squares of out[m][16 b ... 16 b + 15], num_squares = N / 16. RMSNorm(out) * norm_scale is
 * then scaled / sqrt(sum of a row's squares / N + epsilon), and that factor may come after a
 * product.
 *
 * W4A16_SWIGLU: of each 16 columns of y the first 8 are gate's, the others up's; out is [M, N / 2].
 * If squares is not NULL, y is divided by sqrt(sum of a row's num_squares squares / K + epsilon);
 * their number is a multiple of 4. */
typedef struct {
  const void* x;
  const uint32_t* qweight;
  const void* scales;
  const void* zeros; /* NULL unless has_zeros */
  const void* bias;  /* NULL unless has_bias */
  void* out;
  void* workspace; /* w4a16_workspace_bytes() bytes; contents do not matter */
  int64_t workspace_bytes;
  float alpha;            /* kernels for few tokens: below 2^58 in bfloat16, 2^103 in float16 */
  const void* residual;   /* [M, N], NULL unless W4A16_ADD_NORM */
  const void* norm_scale; /* [N], likewise */
  void* scaled;           /* [M, N], likewise */
  float* squares;         /* [M, num_squares], written by W4A16_ADD_NORM, read by W4A16_SWIGLU */
  int64_t num_squares;
  float epsilon;
} w4a16_operands;

/* What the choice of a kernel depends on. */
typedef struct {
  int32_t compute_capability; /* 10 * major + minor: 90 is Hopper */
  int32_t num_sms;
} w4a16_device;

/* Where CPU functions run their tasks. parallel_for calls task(arg, 0) ... task(arg, num_tasks -
 * 1), in any order and on any threads, and returns when all have returned. A NULL executor: threads
 * of the library's own, as many as the machine has. Results do not depend on it. */
typedef struct {
  void* context;
  int num_threads;
  void (*parallel_for)(void* context, int64_t num_tasks, void (*task)(void* arg, int64_t index),
                       void* arg);
} w4a16_executor;

/* Library version, as "1.2.3". */
W4A16_API const char* w4a16_version(void);

/* 1 if the library was built with CUDA kernels, else 0. */
W4A16_API int w4a16_has_cuda(void);

/* The CUDA architectures compiled in, as "80,90a" ("" without CUDA), and the instruction set that
 * the CPU kernels use on this machine: "avx512", "avx2" or "portable". */
W4A16_API const char* w4a16_cuda_architectures(void);
W4A16_API const char* w4a16_cpu_instruction_set(void);

/* Number of compiled CUDA configurations, and the name of the i-th (NULL outside 0..count-1). */
W4A16_API int w4a16_config_count(void);
W4A16_API const char* w4a16_config_name(int index);

/* Describes the current CUDA device. */
W4A16_API w4a16_status w4a16_current_device(w4a16_device* device);

/* Chooses a configuration; a pure host function. `*config` receives a static string. Only
 * configurations that need at most `workspace_limit_bytes` are considered (-1: no limit). */
W4A16_API w4a16_status w4a16_select(const w4a16_problem* problem, const w4a16_device* device,
                                    int64_t workspace_limit_bytes, const char** config);

/* OK if `config` can serve `problem` on `device`; else a status that says why not. */
W4A16_API w4a16_status w4a16_can_implement(const w4a16_problem* problem, const w4a16_device* device,
                                           const char* config);

/* Workspace that `config` needs for `problem` on `device`. */
W4A16_API w4a16_status w4a16_workspace_bytes(const w4a16_problem* problem,
                                             const w4a16_device* device, const char* config,
                                             int64_t* bytes);

/* The product. config NULL or "auto": w4a16_select() within the given workspace. */
W4A16_API w4a16_status w4a16_run_cuda(const w4a16_problem* problem, const w4a16_operands* operands,
                                      const char* config, void* stream);
W4A16_API w4a16_status w4a16_run_cpu(const w4a16_problem* problem, const w4a16_operands* operands,
                                     const w4a16_executor* executor);

/* The ragged product (mixture of experts): row m of x times the weight of its expert.
 *
 * The M rows of x are sorted by expert: the first group_sizes[0] are expert 0's, and so on.
 * qweight, scales and zeros hold `experts` (at most 65536) weights one after the other. Rows beyond
 * the sum of group_sizes give zeros; a negative size counts as 0, and what exceeds M is cut off.
 * group_sizes are int32[experts], on the device for _cuda, which never reads them on the host.
 * problem's has_bias, batch_invariant and epilogue must be 0; no workspace is needed. */
W4A16_API w4a16_status w4a16_ragged_select(const w4a16_problem* problem, int64_t experts,
                                           const w4a16_device* device, const char** config);
W4A16_API w4a16_status w4a16_ragged_can_implement(const w4a16_problem* problem, int64_t experts,
                                                  const w4a16_device* device, const char* config);
W4A16_API w4a16_status w4a16_ragged_run_cuda(const w4a16_problem* problem, int64_t experts,
                                             const w4a16_operands* operands,
                                             const int32_t* group_sizes, const char* config,
                                             void* stream);
W4A16_API w4a16_status w4a16_ragged_run_cpu(const w4a16_problem* problem, int64_t experts,
                                            const w4a16_operands* operands,
                                            const int32_t* group_sizes,
                                            const w4a16_executor* executor);

/* codes uint8[K, N] (0..15; higher bits are ignored) -> qweight. */
W4A16_API w4a16_status w4a16_pack_cuda(const uint8_t* codes, int64_t k, int64_t n,
                                       uint32_t* qweight, void* stream);
W4A16_API w4a16_status w4a16_pack_cpu(const uint8_t* codes, int64_t k, int64_t n, uint32_t* qweight,
                                      const w4a16_executor* executor);

/* qweight, scales, zeros (or NULL) -> w[K, N]; value = (code - zero) * scale in float32, rounded
 * once. */
W4A16_API w4a16_status w4a16_dequantize_cuda(const uint32_t* qweight, const void* scales,
                                             const void* zeros, w4a16_dtype scale_dtype, int64_t k,
                                             int64_t n, int64_t group_size, w4a16_dtype out_dtype,
                                             void* out, void* stream);
W4A16_API w4a16_status w4a16_dequantize_cpu(const uint32_t* qweight, const void* scales,
                                            const void* zeros, w4a16_dtype scale_dtype, int64_t k,
                                            int64_t n, int64_t group_size, w4a16_dtype out_dtype,
                                            void* out, const w4a16_executor* executor);

/* w[K, N] -> qweight, scales, zeros; round to nearest. zeros NULL: symmetric (quantize.h has the
 * rule). */
W4A16_API w4a16_status w4a16_quantize_cuda(const void* w, w4a16_dtype w_dtype, int64_t k, int64_t n,
                                           int64_t group_size, w4a16_dtype scale_dtype,
                                           uint32_t* qweight, void* scales, void* zeros,
                                           void* stream);
W4A16_API w4a16_status w4a16_quantize_cpu(const void* w, w4a16_dtype w_dtype, int64_t k, int64_t n,
                                          int64_t group_size, w4a16_dtype scale_dtype,
                                          uint32_t* qweight, void* scales, void* zeros,
                                          const w4a16_executor* executor);

/* Reads `bytes` bytes (a multiple of 16) once, as fast as the device can, and may write 4 bytes to
 * `sink`: the floor that a decode kernel is measured against. */
W4A16_API w4a16_status w4a16_read_floor_cuda(const void* data, int64_t bytes, void* sink,
                                             void* stream);

#ifdef __cplusplus
}
#endif

#endif /* W4A16_H_ */
