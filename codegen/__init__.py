"""Emission: from the ragged form to kernels, and from kernels to a library."""
