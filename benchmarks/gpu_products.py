"""The products with 4-bit weights that are timed on CUDA devices."""

#: Rows and columns of the weights: projections of language models from 0.5 B to 8 B parameters, and the head of one.
SHAPES = (
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (2048, 2048),
    (8192, 2048),
    (2048, 8192),
    (896, 896),
    (4864, 896),
    (128256, 2048),
)
#: Rows of x.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
