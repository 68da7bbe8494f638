"""AMDGPU LLVM IR as TVM emits it, made IR that runs on the software device.

Address spaces become one, every access of tensors and shared memory is announced with its line, and what only the
device's instructions can do is a call of the machine. The IR is what LLVM's optimizer left, noalias and all; what this
machine's compiler may conclude from that is taken away, for lanes meet in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from llmc.ir.errors import CompileError

from .build import NATIVE
from .entry import ENTRY_POINT, Kernel, entry_point

__all__ = ["INCLUDE", "translate"]

INCLUDE = [NATIVE]

_PRIVATE = "5"
_NAME = r'[%@](?:"[^"]+"|[\w.$-]+)'
_SHARED = re.compile(r"^(@[\w.]+) = (?:\w+ )*addrspace\(3\) global (\[\d+ x .+?\]|\S+) \w+(?:, align (\d+))?")
_BRACKETS = r"\((?:[^()]|\([^()]*\))*\)"  # with others in them
_ACCESS = re.compile(
    r"^(?:(?P<result>%\S+) = )?(?P<kind>load|store|atomicrmw|cmpxchg) (?:atomic |volatile |weak |\w+ (?=ptr))*"
    rf"(?P<rest>.*?)(?P<pointer>ptr(?: addrspace\((?P<space>\d)\))? (?:{_NAME}|getelementptr [^()]*{_BRACKETS}))"
    r"(?P<tail>(?:, .*)?)$"
)
_CALL = re.compile(
    r"^(?:(?P<result>%\S+) = )?(?:tail |musttail )?call [^@]*@llvm\.amdgcn\.(?P<name>[\w.]+)\((?P<args>.*)\)"
)
_FENCE = re.compile(r'^fence (?:syncscope\("(\w+)"\) )?(\w+)')
# Wider than a wave: what lanes of a block may rely on.
_BLOCK_SCOPES = {"workgroup", "agent", None}

_RELEASES, _ACQUIRES = {"release", "acq_rel", "seq_cst"}, {"acquire", "acq_rel", "seq_cst"}

_INDICES = {"workitem.id": "device_thread", "workgroup.id": "device_block"}
_FUNCTIONS = {
    "ds.bpermute": ("i32", "device_permute"),
    "readfirstlane": ("i32", "device_first_lane"),
    "readfirstlane.i32": ("i32", "device_first_lane"),
    "mbcnt.lo": ("i32", "device_count_low"),
    "mbcnt.hi": ("i32", "device_count_high"),
    **{f"{name}.f32": ("float", f"device_{name}") for name in ("rcp", "rsq", "exp2", "log", "sqrt", "sin", "cos")},
}
# Products of 8-bit integers.
_INTEGERS = {
    "mfma.i32.16x16x16i8": "mfma_i8_16",
    "mfma.i32.16x16x32.i8": "mfma_i8_32",
    "wmma.i32.16x16x16.iu8": "wmma",
}
# Nothing that a result could depend on.
_HINTS = {"s.setprio", "sched.barrier", "sched.group.barrier", "iglp.opt", "s.waitcnt", "s.nop", "s.sethalt"}


def translate(text: str, kernels: Sequence[Kernel], *, strict: bool) -> dict[str, str]:
    """Sources of a library, by file name. Raises CompileError where the device does not know an instruction."""
    shared: dict[str, tuple[int, str]] = {}
    uses: dict[str, list[str]] = {}
    lines, function = [], ""
    for number, line in enumerate(text.splitlines(), 1):
        declared = _SHARED.match(line)
        if declared:
            name, dtype, align = declared.groups("16")
            shared[name] = size_of(dtype), align
            # A gap behind it: what runs over finds memory of nothing.
            line = f"{name} = hidden global {{ {dtype}, [1024 x i8] }} zeroinitializer, align {align}"
        elif line.startswith("define "):
            found = re.search(r"@([\w.$-]+)\(", line)
            function = found[1] if found else ""
        elif function:
            uses.setdefault(function, []).extend(name for name in re.findall(r"@[\w.]+", line) if name in shared)
        lines.append((number, line))
    body = _Module(lines, strict).text()
    entries = []
    for kernel in kernels:
        own = sorted(set(uses.get(kernel.name, ())))
        entries.append(_declare(kernel, own, shared))
        places = [
            f'device_shared_at({i}, {_symbol(name)}, {shared[name][0]}, "{name[1:]}");' for i, name in enumerate(own)
        ]
        arguments = ", ".join(f"frame.p{i}" for i in range(len(kernel.parameters)))
        call = f"{' '.join(places)} {_symbol('@' + kernel.name)}({arguments})"
        entries.append(entry_point(kernel, call, strict=strict, masks=False, lines=True))
    return {"kernels.ll": body, "entries.cc": "\n".join([ENTRY_POINT, *entries])}


def size_of(dtype: str) -> int:
    """Bytes of a type of LLVM's, in memory."""
    vector = re.fullmatch(r"[<\[](\d+) x (.+)[>\]]", dtype)
    if vector:
        return int(vector[1]) * size_of(vector[2])
    bits = re.fullmatch(r"i(\d+)", dtype)
    if bits:
        return -(-int(bits[1]) // 8)
    sizes = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}
    if dtype not in sizes:
        raise CompileError(f"the software device does not know the type {dtype!r}", stage="software_device")
    return sizes[dtype]


def _symbol(name: str) -> str:
    return "amdgpu_" + re.sub(r"\W", "_", name[1:])


def _declare(kernel: Kernel, own: Sequence[str], shared: dict) -> str:
    types = ", ".join(p.c_type for p in kernel.parameters)
    lines = [f'extern "C" void {_symbol("@" + kernel.name)}({types}) __asm__("{kernel.name}");']
    lines += [f'extern "C" char {_symbol(name)}[] __asm__("{name[1:]}");' for name in own]
    return "\n".join(lines)


class _Module:
    """The lines of a module, rewritten one by one."""

    def __init__(self, lines: Sequence[tuple[int, str]], strict: bool):
        self.lines, self.strict = lines, strict
        self.number, self.entry = 0, ""
        self.fences = self._fences()

    def text(self) -> str:
        made: list[str] = []
        for index, (number, line) in enumerate(self.lines):
            self.number = number
            if re.match(r"^(target |attributes #|!|declare .*@llvm\.amdgcn|source_filename)", line):
                continue
            made.extend(self.line(index, line))
        return "\n".join([*made, _DECLARATIONS])

    def line(self, index: int, line: str) -> Iterator[str]:
        """What stands for a line."""
        code = line.strip().split(" ;")[0] if not line.startswith(";") else ""
        if line.startswith("define "):
            # The first block: operands of matrix instructions are handed over in memory.
            yield self.plain(re.sub(r"\b(dllexport|amdgpu_kernel|noalias|readonly|writeonly|readnone) ", "", line))
            label = next(rest for _, rest in self.lines[index + 1 :] if rest.strip())
            self.entry = label if label.endswith(":") or ":" in label.split(";")[0] else ""
            if not self.entry:
                yield _OPERANDS
        elif self.entry and line == self.entry:
            yield line
            yield _OPERANDS
            self.entry = ""
        elif code.startswith("fence "):
            return
        elif found := _CALL.match(code):
            yield from self.instruction(index, found)
        elif (found := _ACCESS.match(code)) and found["space"] != _PRIVATE:
            if self.strict:
                yield self.announce(found)
            yield self.plain(line)
        else:
            yield self.plain(line)

    def plain(self, line: str) -> str:
        """A line without what belongs to AMD's targets, or to the optimizer's knowledge of them."""
        if re.search(r"(ptrtoint|inttoptr) .*addrspace\(3\)", line):
            self.refuse(line)
        line = re.sub(r", ![\w.]+ !\d+", "", line)
        line = re.sub(r" ?addrspace\(\d+\)", "", line)
        line = re.sub(r"\b(captures|nofpclass|range)\([^)]*\) ?", "", line)
        line = re.sub(r' #\d+\b|syncscope\("[^"]*"\) |\b(dllexport|noalias|section "[^"]*") ?', "", line)
        line = re.sub(rf"addrspacecast \(ptr ({_NAME}) to ptr\)", r"\1", line)
        return line.replace("addrspacecast ptr", "bitcast ptr")

    def announce(self, found: re.Match) -> str:
        """The call that stands before an access."""
        kind, rest = found["kind"], found["rest"]
        dtype = _first_type(found["tail"][2:] if kind in ("atomicrmw", "cmpxchg") else rest)
        size = size_of(dtype)
        align = re.search(r"align (\d+)", found["tail"])
        pointer = self.plain(found["pointer"])
        name = {"load": "device_load", "store": "device_store"}.get(kind, "device_atomic_at")
        return f"  call void @{name}({pointer}, i64 {size}, i64 {align[1] if align else 1}, i32 {self.number})"

    def instruction(self, index: int, found: re.Match) -> Iterator[str]:
        """A device instruction as calls of the machine."""
        name, args = found["name"], self.plain(found["args"])
        result = f"  {found['result']} = " if found["result"] else "  "
        axis = re.fullmatch(r"(workitem\.id|workgroup\.id)\.([xyz])", name)
        here = f"  call void @device_at(i32 {self.number})"
        if axis:
            yield f"{result}call i32 @{_INDICES[axis[1]]}(i32 {'xyz'.index(axis[2])})"
        elif name in ("s.barrier", "wave.barrier"):
            spaces = 3 if self.fences.get(index) else 0
            yield here
            if name == "s.barrier":
                yield f"  call void @device_barrier(i32 {spaces}) #0"
            else:
                yield f"  call void @device_warp_barrier(i64 0, i32 {spaces}) #0"
        elif name in _FUNCTIONS:
            dtype, function = _FUNCTIONS[name]
            yield here
            yield f"{result}call {dtype} @{function}({args}) #0"
        elif name.startswith(("mfma.f32.16x16x16", "wmma.f32.16x16x16")):
            yield here
            yield from self.matrix(name, args, result)
        elif unit := _INTEGERS.get(re.sub(r"\.v\d.*", "", name)):
            yield here
            yield from self.integers(name, unit, args, result)
        elif name not in _HINTS:
            self.refuse(f"llvm.amdgcn.{name}")

    def matrix(self, name: str, args: str, result: str) -> Iterator[str]:
        """Operands one behind the other in memory, the call, and the sums from memory."""
        operands = re.findall(r"(<\d+ x \w+>) (splat \([^)]*\)|<[^>]*>|[^\s,]+)", args)[:3]
        modifiers = re.findall(r"\bi(?:1|32) (\w+)", args.split(operands[2][1])[-1])
        if any(m not in ("0", "false") for m in modifiers):
            self.refuse(f"llvm.amdgcn.{name} with modifiers {modifiers}")
        element = "bf16" if "bf16" in name else "f16"
        unit = "mfma" if name.startswith("mfma") else "wmma11" if operands[0][0].startswith("<16") else "wmma12"
        yield from self.handed(operands, f"device_{unit}_{element}", result)

    def integers(self, name: str, unit: str, args: str, result: str) -> Iterator[str]:
        """The same of 8-bit integers: RDNA's operands say whether they are signed, and its sums whether they saturate;
        CDNA's may be scalars."""
        given = re.findall(r"(<\d+ x i32>|i\d+) (splat \([^)]*\)|<[^>]*>|[^\s,]+)", args)
        if unit == "wmma":
            (_, signed), a, (_, signed_too), b, c, (_, saturates) = given
            unit = "wmma11_iu8" if a[0].startswith("<4") else "wmma12_iu8"
            said, expected = [signed, signed_too, saturates], ["true", "true", "false"]
        else:
            a, b, c, *flags = given
            said, expected = [flag for _, flag in flags], ["0"] * 3
        if said != expected:
            self.refuse(f"llvm.amdgcn.{name} with modifiers {said}")
        yield from self.handed([a, b, c], f"device_{unit}", result)

    def handed(self, operands: Sequence[tuple[str, str]], function: str, result: str) -> Iterator[str]:
        """A call that finds its operands one behind the other in memory, and leaves its sums where they were."""
        offset = 0
        for dtype, value in operands:
            where = f"%operands.{self.number}.{offset}"
            yield f"  {where} = getelementptr i8, ptr %device.operands, i64 {offset}"
            yield f"  store {dtype} {value}, ptr {where}, align 4"
            offset, last, sums = offset + size_of(dtype), where, dtype
        yield f"  call void @{function}(ptr %device.operands) #0"
        yield f"{result}load {sums}, ptr {last}, align 4"

    def refuse(self, what: str) -> None:
        raise CompileError(
            f"the software device does not know this instruction (line {self.number}): {what.strip()}",
            stage="software_device",
        )

    def _fences(self) -> dict[int, bool]:
        """Line index of every barrier -> whether a release stands before it and an acquire behind it."""
        found = {}
        for index, (_, line) in enumerate(self.lines):
            call = _CALL.match(line.strip())
            if call and call["name"] in ("s.barrier", "wave.barrier"):
                scopes = _BLOCK_SCOPES | {"wavefront"} if call["name"] == "wave.barrier" else _BLOCK_SCOPES
                before, after = self._fence(index, -1), self._fence(index, 1)
                released = before is not None and before[1] in scopes and before[2] in _RELEASES
                found[index] = released and after is not None and after[1] in scopes and after[2] in _ACQUIRES
        return found

    def _fence(self, index: int, step: int) -> re.Match | None:
        """The fence next to a line."""
        index += step
        while 0 <= index < len(self.lines) and not self.lines[index][1].strip():
            index += step
        return _FENCE.match(self.lines[index][1].strip())


def _first_type(code: str) -> str:
    """The type that a list of typed operands begins with."""
    found = re.match(r"<\d+ x \w+>|\w+", code.strip())
    return found[0] if found else code


_OPERANDS = "  %device.operands = alloca [256 x i8], align 64"
_DECLARATIONS = """
declare i32 @device_thread(i32) memory(none)
declare i32 @device_block(i32) memory(none)
declare void @device_at(i32)
declare void @device_load(ptr, i64, i64, i32)
declare void @device_store(ptr, i64, i64, i32)
declare void @device_atomic_at(ptr, i64, i64, i32)
declare void @device_barrier(i32) #0
declare void @device_warp_barrier(i64, i32) #0
declare i32 @device_permute(i32, i32) #0
declare i32 @device_first_lane(i32) #0
declare i32 @device_count_low(i32, i32)
declare i32 @device_count_high(i32, i32)
declare float @device_rcp(float)
declare float @device_rsq(float)
declare float @device_exp2(float)
declare float @device_log(float)
declare float @device_sqrt(float)
declare float @device_sin(float)
declare float @device_cos(float)
declare void @device_mfma_f16(ptr) #0
declare void @device_mfma_bf16(ptr) #0
declare void @device_wmma11_f16(ptr) #0
declare void @device_wmma11_bf16(ptr) #0
declare void @device_wmma12_f16(ptr) #0
declare void @device_wmma12_bf16(ptr) #0
declare void @device_mfma_i8_16(ptr) #0
declare void @device_mfma_i8_32(ptr) #0
declare void @device_wmma11_iu8(ptr) #0
declare void @device_wmma12_iu8(ptr) #0
attributes #0 = { convergent noduplicate nomerge }
"""
