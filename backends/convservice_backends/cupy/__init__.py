"""The CuPy backend: CUDA devices through CuPy, with the project's own kernels."""
