"""Facts: what a machine is."""
