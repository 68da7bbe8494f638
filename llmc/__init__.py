"""llmc: an ahead-of-time compiler for transformer language models.

path = llmc.compile("path/to/model.safetensors", target="cpu")
model = llmc.load(path)
print(model.generate("Once upon a time").text)
"""

from importlib import import_module
from importlib.metadata import version as _version

__version__ = _version("llmc")

# Resolved on first use: `import llmc` loads neither a compiler nor a framework.
_HOMES = {
    "ArtifactError": "llmc.runtime.errors",
    "CompileError": "llmc.ir.errors",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__():
    return sorted(__all__)
