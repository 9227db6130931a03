"""Compact checkpoints: safetensors whose zeros take one bit each. docs/compact.md has the format."""
