"""The layers that a network is made of."""

from convservice.layers.activation import FUNCTIONS, Activation, activation_of
from convservice.layers.base import Layer, ReceptiveField, checked_index, split_shape
from convservice.layers.conv import Conv

__all__ = [
    "FUNCTIONS",
    "Activation",
    "Conv",
    "Layer",
    "ReceptiveField",
    "activation_of",
    "checked_index",
    "split_shape",
]
