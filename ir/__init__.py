"""Meaning: what a program says. Semantic ops, the four forms, reference evaluation, printing and diffing."""
