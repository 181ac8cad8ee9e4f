"""The GPU: CuPy arrays, CUDA kernels, cuBLAS, cuDNN. Importing it registers its pairs beside the plain ones."""

from refpeft.cuda import (  # noqa: F401  pairs register themselves
    activations,
    adam,
    attention,
    blockwise,
    changed,
    dropout,
    elementwise,
    gather,
    linear,
    losses,
    lowrank,
    norms,
    rope,
    solve,
    triplets,
)
