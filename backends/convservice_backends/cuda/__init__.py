"""Convolution in CUDA C++: kernels, the planner that chooses and launches them, sessions on a device.

Nothing here imports CuPy: a `device.Device` is what runs the kernels. There is one for CuPy, and one for
tests that runs the same source on the processor, thread by thread.
"""
