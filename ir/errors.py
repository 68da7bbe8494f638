"""What can go wrong on the way to an artifact.

Imports nothing heavy: the command line catches these before any compiler is loaded.
"""


class CompileError(Exception):
    """A model could not be compiled. The message says what was expected, what was found, where, and what to do.

    `stage`, `pass_name` and `op` name the place in the pipeline where they apply.
    """

    def __init__(self, message: str, *, stage: str | None = None, pass_name: str | None = None, op: str | None = None):
        super().__init__(message)
        self.stage = stage
        self.pass_name = pass_name
        self.op = op


class SourceError(CompileError):
    """The source is missing, damaged, of an unknown kind, or asks for something llmc refuses."""


class FormError(CompileError):
    """A module is not in the form that the next step of the pipeline expects."""
