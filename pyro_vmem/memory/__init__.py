"""Memories: templates in slots, how they are stored, encoded, read and searched."""

from pyro_vmem._utils.checks import check_entries
from pyro_vmem.memory.encoded import EncodedMemory, Template
from pyro_vmem.memory.index import AddressIndex, ExactIndex, FaissIndex, Hits, KeyTable, recall
from pyro_vmem.memory.memory import Memory, Store
from pyro_vmem.memory.milvus import MilvusIndex, MilvusMemory
from pyro_vmem.memory.packed import PackedMemory

__all__ = [
    "AddressIndex",
    "EncodedMemory",
    "ExactIndex",
    "FaissIndex",
    "Hits",
    "KeyTable",
    "Memory",
    "MilvusIndex",
    "MilvusMemory",
    "PackedMemory",
    "Store",
    "Template",
    "recall",
]
check_entries(globals(), in_steps=("EncodedMemory", "Hits", "Memory", "Template"), methods=True)
