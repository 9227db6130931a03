"""`sdprune search`: the sparsest model that is still as good as the dense one, and how sure that is."""
