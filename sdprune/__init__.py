"""Find out how much of a text-to-image model can be pruned away before the pictures suffer."""
