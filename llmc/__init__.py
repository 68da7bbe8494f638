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
    "compile": "llmc.compiler",
    "inspect": "llmc.inspection",
    "load": "llmc.runtime.model",
    "schemes": "llmc.quantization",
    "verify": "llmc.verification",
}
__all__ = [*_HOMES, "__version__", "targets"]


def __getattr__(name: str):
    if name == "targets":  # a room that can be called: llmc.targets()
        return import_module("llmc.targets")
    if name not in _HOMES:
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__():
    return sorted(__all__)
