"""What can go wrong when an artifact is loaded or run."""


class ArtifactError(Exception):
    """Not an artifact, damaged, of another format or ABI version, or not for this machine."""


class RequestError(ValueError):
    """A request that can't be served as it is: its prompt, its sampling parameters, or its size."""


# Float16 ends at 65504, and models trained in bfloat16 may have larger activations: an infinity becomes NaN in the next
# norm, and reaches the logits.
OVERFLOW = (
    "the model's logits are no numbers: it overflowed; where the artifact computes in float16 (`llmc inspect` tells), "
    "compile it with --dtype bfloat16 or float32"
)
