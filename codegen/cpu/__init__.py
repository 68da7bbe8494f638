"""Kernel templates for CPUs, written over the facts of a target."""
