"""From a keep table to an output: block lists, and the compiled attention over them."""
