"""What the benchmark of cards needs of a machine, before any of it is imported: python -m llmc.bench.preflight

Standard library only. Exit code 2 with what is missing.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable
from pathlib import Path

# transformers 5 reads the rotary embedding from `rope_parameters`, as the shapes give it; torch: what transformers 5
# takes (its metadata); numpy: what llmc is held against.
LEAST = {"numpy": (2, 0), "torch": (2, 6), "transformers": (5, 0)}
SITE = Path(__file__).parents[2]  # where llmc and tvm_ffi lie in the archive


def missing(site: Path = SITE) -> list[str]:
    """What to do before the benchmark can start, in words; nothing where all is there."""
    found = []
    own = "{}.{}".format(*sys.version_info)
    made = _pythons(site)
    if made and own not in made:
        found.append(
            f"expected Python {' or '.join(made)}, for which this archive was made, found {own}: name another with "
            f"PYTHON=…, or make the archive with --python {own}"
        )
    for name, least in LEAST.items():
        wanted = f"{name} {'.'.join(map(str, least))} or later"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"expected {wanted}, found none: pip install {name}")
            continue
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < least:
            found.append(f"expected {wanted}, found {version}: pip install --upgrade {name}")
    return found


def _pythons(site: Path) -> list[str]:
    """The Pythons that tvm-ffi's extensions are for, e.g. "3.12"; none where they don't say."""
    names: Iterable[str] = (file.name for file in (site / "tvm_ffi").glob("core.*.so"))
    return sorted({f"{m[1]}.{m[2]}" for name in names if (m := re.search(r"cpython-(\d)(\d+)-", name))})


def main() -> int:
    found = missing()
    if found:
        print(f"the benchmark can't start with {sys.executable}:", *found, sep="\n  ", file=sys.stderr)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
