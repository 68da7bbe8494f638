"""From device code and objects to what a driver and a loader take: machine code, code objects, shared libraries."""
