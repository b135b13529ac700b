"""Where the arithmetic runs: backends, and the driver that moves rows through a network.

Given networks and bands of rows, this package hands back bands of feature maps; it knows nothing of gRPC
and can be used in-process:

    registry = Registry()
    backend = registry.resolve("")
    prepared = backend.prepare(network, Precision.HIGH)
    feature_maps = run(prepared, x)
"""
