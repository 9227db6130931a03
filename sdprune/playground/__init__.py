"""See on one prompt what pruning does: the dense and the pruned model side by side, in a browser."""
