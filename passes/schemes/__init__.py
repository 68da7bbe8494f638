"""Quantization schemes by name, one file each."""

from __future__ import annotations

import difflib
import re
from typing import Any

from llmc.ir.errors import CompileError

from . import fp8, int3, int4, int8, mxfp4, nf4, w8a8
from .scheme import GROUPS, Options, Scheme
from .stored import Stored

__all__ = ["Scheme", "Stored", "names", "parse"]

# Each has NAMES, which are listed (the first is what it is called), TAKES, the options that may follow it, and
# scheme(name, options).
_FILES: tuple[Any, ...] = (int8, int4, int3, fp8, w8a8, nf4, mxfp4)
_BY_NAME = {file.NAMES[0]: file for file in _FILES}
_OPTION = {"group": "-g128 … -g16", "zeros": "-zp", "activation": "-a8"}


def names() -> list[str]:
    """The names of schemes that are listed; other groups may be given in their place."""
    return [name for file in _FILES for name in file.NAMES]


def parse(text: str) -> Scheme:
    """The scheme of a name such as "int4-g64-zp". CompileError for an unknown one, with the nearest and all names."""
    base, *rest = text.split("-")
    file = _BY_NAME.get(base)
    if file is None:
        near = difflib.get_close_matches(text, names(), 1, 0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise CompileError(f"no quantization scheme is called {text!r}: {hint}There are: {', '.join(names())}")
    given: dict[str, Any] = {}
    for option in rest:
        kind = {"zp": "zeros", "a8": "activation"}.get(option, "group" if re.fullmatch(r"g\d+", option) else "")
        if kind not in file.TAKES or kind in given:
            takes = ", ".join(_OPTION[k] for k in sorted(file.TAKES)) or "nothing"
            raise CompileError(
                f"quantization scheme {text!r}: expected after {base}: {takes}, each once; found -{option}"
            )
        given[kind] = int(option[1:]) if kind == "group" else True
    if given.get("group", GROUPS[0]) not in GROUPS:
        sizes = ", ".join(map(str, GROUPS[::-1]))
        raise CompileError(f"quantization scheme {text!r}: expected groups of {sizes}; found {given['group']}")
    return file.scheme(text, Options(**given))
