"""`sdprune inspect`: what can be said of a model without its weights."""
