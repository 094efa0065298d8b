"""Doors into real models, each in a module of its own that needs its own extra."""
