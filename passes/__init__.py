"""Change: IRModule to IRModule, up to the ragged form."""
