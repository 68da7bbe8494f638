"""Kernels of graphics processors: templates over a target's facts, in a vocabulary that three languages share."""
