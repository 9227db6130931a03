"""What can be removed as a whole, read off a component's structure. A new file in this folder is found by itself."""

from sdprune.pruning.narrowing.groups.base import Group, Grouping, Slice, find_groups

__all__ = ["Group", "Grouping", "Slice", "find_groups"]
