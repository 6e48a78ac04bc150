/* Multiplies ones by codes 9 (so, with the zero point 8, by ones): every sum is K. */
#include <stdio.h>
#include <w4a16.h>

enum { N = 16, K = 64 };

/* Every array starts at a multiple of 16 bytes. */
static union {
  struct {
    float x[K], scales[N], out[N];
    uint32_t qweight[128];
  } arrays;
  long double aligned;
} memory;

int main(void) {
  w4a16_problem problem = {1, N, K, K, W4A16_F32, W4A16_F32, 0, 0, 0};
  w4a16_operands operands = {memory.arrays.x,
                             memory.arrays.qweight,
                             memory.arrays.scales,
                             NULL,
                             NULL,
                             memory.arrays.out,
                             NULL,
                             0,
                             1.0f};
  w4a16_status status;
  int i;
  for (i = 0; i < K; ++i) memory.arrays.x[i] = 1;
  for (i = 0; i < N; ++i) memory.arrays.scales[i] = 1;
  for (i = 0; i < 128; ++i) memory.arrays.qweight[i] = 0x99999999u;
  status = w4a16_run_cpu(&problem, &operands, NULL);
  if (status.code != W4A16_OK) {
    fprintf(stderr, "%s\n", status.message);
    return 1;
  }
  for (i = 0; i < N; ++i) {
    if (memory.arrays.out[i] != K) return 1;
  }
  printf("w4a16 %s: ok\n", w4a16_version());
  return 0;
}
