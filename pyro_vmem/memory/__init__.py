"""Memories: templates in slots, how they are stored, encoded, read and searched."""

from pyro_vmem._utils.checks import check_entries
from pyro_vmem.memory.encoded import EncodedMemory, Template
from pyro_vmem.memory.index import AddressIndex, ExactIndex, FaissIndex, Hits, recall
from pyro_vmem.memory.memory import Memory, Store
from pyro_vmem.memory.packed import PackedMemory, PackedStore

__all__ = [
    "AddressIndex",
    "EncodedMemory",
    "ExactIndex",
    "FaissIndex",
    "Hits",
    "Memory",
    "PackedMemory",
    "PackedStore",
    "Store",
    "Template",
    "recall",
]
check_entries(globals(), in_steps=("EncodedMemory", "Hits", "Memory", "Template"))
