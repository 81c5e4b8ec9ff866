"""Memories: templates in slots, how they are stored, encoded, read and searched."""

from pyro_vmem.memory.index import AddressIndex, ExactIndex, FaissIndex, Hits, recall
from pyro_vmem.memory.memory import EncodedMemory, Memory, Template
from pyro_vmem.memory.packed import LazyMemory, PackedMemory

__all__ = [
    "AddressIndex",
    "EncodedMemory",
    "ExactIndex",
    "FaissIndex",
    "Hits",
    "LazyMemory",
    "Memory",
    "PackedMemory",
    "Template",
    "recall",
]
