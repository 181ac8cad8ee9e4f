"""The GPU: CuPy arrays, CUDA kernels, cuBLAS, cuDNN. Importing it registers its pairs beside the plain ones."""

from refpeft.cuda import blockwise, linear  # noqa: F401  pairs register themselves
