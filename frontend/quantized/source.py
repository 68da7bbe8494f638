"""The tensors of a quantized checkpoint, handed out module by module: what is missing or misshapen is named."""

from collections.abc import Iterator, Mapping, Sequence

from llmc.frontend.quantized.tensor import QuantizedTensor
from llmc.frontend.weights import LazyTensor
from llmc.ir.errors import SourceError
from llmc.ir.quantized import Format

INSTEAD = "; give the model before quantization, and a scheme of llmc's in its place"


class Source:
    """A checkpoint of which quantized weights are taken out in parts, and put in again as QuantizedTensors.

    tensors: all that is in it, by published name. dtype: the dtype that quantized weights stand for. notes: what a
    user should know of how they are computed with.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], dtype: str):
        self.tensors, self.dtype = dict(tensors), dtype
        self.notes: dict[str, None] = {}  # in the order in which they came up, each once

    def modules(self, ending: str) -> Iterator[str]:
        """What comes before `ending` in the names of tensors that have it."""
        return iter([name.removesuffix(ending) for name in self.tensors if name.endswith(ending)])

    def take(self, name: str, shape: Sequence[int] | None = None, dtypes: Sequence[str] = ()) -> LazyTensor:
        """The tensor of a name, which is no longer in the checkpoint afterwards. SourceError if it is not as expected.

        shape: -1 stands for any size.
        """
        tensor = self.find(name)
        if tensor is None:
            raise SourceError(f"{name}: expected this part of a quantized weight, found no such tensor")
        if shape is not None and (
            len(shape) != tensor.ndim
            or any(want not in (-1, have) for want, have in zip(shape, tensor.shape, strict=True))
        ):
            wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
            raise SourceError(f"{name}: expected shape [{wanted}], found {list(tensor.shape)}")
        if dtypes and tensor.dtype not in dtypes:
            raise SourceError(f"{name}: expected {' or '.join(dtypes)}, found {tensor.dtype}")
        return tensor

    def find(self, name: str) -> LazyTensor | None:
        """The tensor of a name, taken out, or None."""
        return self.tensors.pop(name, None)

    def put(
        self,
        name: str,
        format: Format,
        parts: Sequence[LazyTensor],
        *,
        order: LazyTensor | None = None,
        activation: int | None = None,
        turned: bool = False,
    ) -> None:
        """Give a weight as its parts, in Format's order."""
        named = dict(zip(("codes", "scales", "zeros"), parts, strict=False))
        try:
            weight = QuantizedTensor(format, named, self.dtype, order=order, activation=activation, turned=turned)
        except ValueError as error:
            raise SourceError(f"{name}: {error}") from None
        self.tensors[name] = weight

    def note(self, text: str) -> None:
        self.notes[text] = None


def group_of(name: str, size: int, depth: int) -> int:
    """Columns that share a scale, of a config's group size (-1 and 0: the whole row)."""
    if size < -1:
        raise SourceError(f"{name}: expected a group size of -1 or more, found {size}")
    return depth if size in (-1, 0) else size
