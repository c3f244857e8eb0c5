"""The rules that a graph keeps (`require_valid` in csrc/memory/graph.h), written once more for what capture makes, byte
by byte and without the library.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def _elements(tensor: dict[str, Any]) -> np.ndarray:
    """First byte of every element of a tensor, from the beginning of its storage."""
    places = np.array([tensor["offset_bytes"]], dtype=np.int64)
    for size, stride in zip(tensor["sizes"], tensor["strides_bytes"], strict=True):
        assert stride >= 0
        steps = np.arange(size if stride else min(size, 1), dtype=np.int64) * stride
        places = (places[:, None] + steps).ravel()
    return places


def require_valid(graph: dict[str, Any]) -> None:
    """Check that names are unique, tensors lie in their storages, nothing is read before it is written, in-place pairs
    have equal boxes, and only mutations write what outlives the step.
    """
    storages, tensors, operations = graph["storages"], graph["tensors"], graph["operations"]
    for kind in (storages, tensors, operations):
        names = [one["name"] for one in kind]
        assert len(set(names)) == len(names)
    # Written bytes of a storage, counted in elements of the smallest type that lies in it.
    unit = [storage["size_bytes"] or 1 for storage in storages]
    for tensor in tensors:
        unit[tensor["storage"]] = min(unit[tensor["storage"]], tensor["element_bytes"])
        assert tensor["offset_bytes"] % tensor["element_bytes"] == 0
    written = [
        np.full(-(-storage["size_bytes"] // size), storage["kind"] in ("parameter", "input"))
        for storage, size in zip(storages, unit, strict=True)
    ]

    def places(index: int) -> tuple[int, np.ndarray]:
        tensor = tensors[index]
        first = _elements(tensor)
        size = unit[tensor["storage"]]
        assert first.size == 0 or first.max() + tensor["element_bytes"] <= storages[tensor["storage"]]["size_bytes"]
        parts = np.arange(tensor["element_bytes"] // size, dtype=np.int64)
        return tensor["storage"], ((first // size)[:, None] + parts).ravel()

    for operation in operations:
        for read in operation["reads"]:
            storage, where = places(read)
            assert written[storage][where].all(), (
                f"{operation['name']} reads {tensors[read]['name']} before it is written"
            )
        for position, write in enumerate(operation["writes"]):
            storage, where = places(write)
            if position in operation["mutates"]:
                assert write in operation["reads"], operation["name"]
            else:
                assert storages[storage]["kind"] not in ("parameter", "input"), operation["name"]
            assert len(np.unique(where)) == len(where), operation["name"]
            written[storage][where] = True
        for read, write in operation["inplace"]:
            one, other = tensors[operation["reads"][read]], tensors[operation["writes"][write]]
            for key in ("offset_bytes", "sizes", "strides_bytes", "element_bytes"):
                assert one[key] == other[key], operation["name"]
        if operation["is_sum"]:
            assert len(operation["reads"]) == 2 and len(operation["writes"]) == 1
        assert all(0 <= position < len(operation["writes"]) for position in operation["accumulates"])
    for storage, bits in zip(storages, written, strict=True):
        if storage["is_output"] or storage["kind"] == "gradient":
            assert bits.all(), storage["name"]
