"""ConvService's CUDA kernels on the processor, thread by thread: a backend for tests.

It is also an example of how a distribution of its own adds a backend.
"""
