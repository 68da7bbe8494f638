"""One benchmark command, and what it compares with."""
