"""The contract's messages and stubs, generated from proto/convservice/v1 by `make proto`."""
