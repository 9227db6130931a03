"""The embedded world, the miniature pipeline trained on it, and its recipe."""
