"""One token's work between the matrix products and attention: as values, as statements, as a kernel."""
