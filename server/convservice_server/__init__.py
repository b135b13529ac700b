"""The server: strangers come in here.

Given a `ServerConfig` it serves the contract over gRPC: weights and networks are kept by digest (`store`),
running tensors share a byte budget (`admission`), the service itself (`service`, `streams`, `passage`) knows
no transport, `grpc_adapter` is gRPC's side of it, `server` its life from start to drain.
"""
