"""The GPU: CuPy arrays, CUDA kernels, cuBLAS, cuDNN. Importing it registers its pairs beside the plain ones."""

from refpeft.cuda import adam, blockwise, dropout, linear, losses  # noqa: F401  pairs register themselves
