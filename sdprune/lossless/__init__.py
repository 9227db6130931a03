"""`sdprune lossless`: a model without what no picture depends on."""
