// Negative control for compute-sanitizer: `sanitizer_control oob` writes past an allocation, `race`
// has two warps race on shared memory. A sanitizer that does not complain here proves nothing
// elsewhere.
#include <cstdio>
#include <cstring>

__global__ void OutOfBounds(int* data, int size) { data[size + threadIdx.x] = 1; }

__global__ void Race(int* data) {
  __shared__ int shared[64];
  shared[threadIdx.x] = threadIdx.x;
  // No barrier: the other warp's element may not be there yet.
  data[threadIdx.x] = shared[63 - threadIdx.x];
}

int main(int argc, char** argv) {
  const char* fault = argc > 1 ? argv[1] : "";
  int* data = nullptr;
  if (cudaMalloc(&data, 64 * sizeof(int)) != cudaSuccess) return 2;
  if (std::strcmp(fault, "oob") == 0) {
    OutOfBounds<<<1, 1>>>(data, 64);
  } else if (std::strcmp(fault, "race") == 0) {
    Race<<<1, 64>>>(data);
  } else {
    std::fprintf(stderr, "usage: sanitizer_control oob|race\n");
    return 2;
  }
  cudaDeviceSynchronize();
  cudaFree(data);
  return 0;
}
