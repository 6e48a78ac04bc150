// What the CUDA half offers to the rest of the library. Each launcher enqueues on `stream` of the
// current device and returns; problem and operands have been checked, and CanImplement has accepted
// the config.
#pragma once

#include <cuda_runtime_api.h>

#include "config.h"

namespace w4a16 {

Status RunDecode(const Problem& p, const Operands& o, const Config& config, const Device& device,
                 cudaStream_t stream);
Status RunWgmma(const Problem& p, const Operands& o, const Config& config, cudaStream_t stream);
Status RunPersistent(const Problem& p, const Operands& o, const Config& config, int num_sms,
                     cudaStream_t stream);
Status RunCutlass(const Problem& p, const Operands& o, const Config& config, int num_sms,
                  cudaStream_t stream);

// The kernels of ragged products, configurations marked `ragged`.
Status RunRaggedDecode(const Problem& p, const Experts& e, const Operands& o, const Config& config,
                       int num_sms, cudaStream_t stream);
Status RunRaggedWgmma(const Problem& p, const Experts& e, const Operands& o, const Config& config,
                      cudaStream_t stream);
Status RunRaggedPersistent(const Problem& p, const Experts& e, const Operands& o,
                           const Config& config, int num_sms, cudaStream_t stream);

Status PackCuda(const uint8_t* codes, int64_t k, int64_t n, uint32_t* qweight, cudaStream_t stream);

Status DequantizeCuda(const uint32_t* qweight, const void* scales, const void* zeros,
                      DType scale_dtype, int64_t k, int64_t n, int64_t group_size, DType out_dtype,
                      void* out, cudaStream_t stream);

Status QuantizeCuda(const void* w, DType w_dtype, int64_t k, int64_t n, int64_t group_size,
                    DType scale_dtype, uint32_t* qweight, void* scales, void* zeros,
                    cudaStream_t stream);

// Streams `bytes` bytes from memory once: the floor of a decode kernel.
Status ReadFloorCuda(const void* data, int64_t bytes, void* sink, cudaStream_t stream);

}  // namespace w4a16
