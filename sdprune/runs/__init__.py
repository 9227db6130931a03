"""A run's directory: its name, its pictures, its scores, and how two of them compare."""
