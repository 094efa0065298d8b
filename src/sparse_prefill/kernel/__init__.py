"""From a keep table to an output: block lists, and compiled attention over them."""
