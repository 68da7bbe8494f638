"""What can go wrong when an artifact is loaded or run."""


class ArtifactError(Exception):
    """Not an artifact, damaged, of another format or ABI version, or not for this machine."""


class RequestError(ValueError):
    """A request that can't be served as it is: its prompt, its sampling parameters, or its size."""
