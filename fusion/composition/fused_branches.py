"""Fused adapters as the adapters that they were made from."""

from dataclasses import replace

from fusion.adapters.adapter import Adapter


def split_branches(adapter: Adapter) -> list[Adapter]:
    """An adapter for each branch, with the branch's name; one that has a single branch as it is."""
    if len(adapter.branches) == 1:
        return [adapter]
    return [replace(adapter, info=replace(adapter.info, name=b.name), branches=(b,)) for b in adapter.branches]
