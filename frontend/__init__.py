"""Doors in: a model on disk becomes the imported form."""
