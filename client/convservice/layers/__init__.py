"""The layers that a network is made of."""

from convservice.layers.activation import FUNCTIONS, Activation, activation_of
from convservice.layers.add import Add
from convservice.layers.base import Layer, ReceptiveField, checked_index, split_shape
from convservice.layers.conv import Conv
from convservice.layers.dense import Flatten, Linear
from convservice.layers.global_pool import GlobalAvgPool, GlobalMaxPool, GlobalPool
from convservice.layers.locally_connected import LocallyConnected
from convservice.layers.pool import AvgPool, MaxPool, Pool
from convservice.layers.transposed import ConvTranspose
from convservice.layers.windows import RowWindow, TransposedWindow, WholeWindow

__all__ = [
    "FUNCTIONS",
    "Activation",
    "Add",
    "AvgPool",
    "Conv",
    "ConvTranspose",
    "Flatten",
    "GlobalAvgPool",
    "GlobalMaxPool",
    "GlobalPool",
    "Layer",
    "Linear",
    "LocallyConnected",
    "MaxPool",
    "Pool",
    "ReceptiveField",
    "RowWindow",
    "TransposedWindow",
    "WholeWindow",
    "activation_of",
    "checked_index",
    "split_shape",
]
