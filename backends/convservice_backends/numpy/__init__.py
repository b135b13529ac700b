"""The NumPy backend: blocked im2col and GEMM on the processor."""
