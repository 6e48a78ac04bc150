"""Sizes that tests share."""

# Every remainder class that a tile, a block or a group can leave, and the degenerate sizes.
M = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 129, 257)
N = (0, 1, 8, 15, 16, 17, 24, 40, 64, 65, 100, 128, 136, 200, 256, 384)
K = (0, 1, 2, 8, 31, 32, 33, 63, 64, 65, 96, 100, 128, 160, 192, 256, 320, 500, 512, 1000, 1024)

ALIGNED_M = (1, 4, 16, 32, 64, 128)
ALIGNED_N = (64, 128, 256)
ALIGNED_K = (128, 256, 512)

GROUP_SIZES = (32, 64, 128, 256, -1)
DTYPES = ("float16", "bfloat16", "float32")

# (M, K, N): a few that together cross every edge, for tests that run each kernel in many variants.
EDGES = ((1, 64, 16), (3, 200, 40), (17, 256, 65), (64, 512, 128), (130, 320, 100))
