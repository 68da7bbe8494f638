"""Prints what a target finds in the kernels of quantized products, as JSON: kernel -> resources. Run as a process."""

import json
import sys
from dataclasses import asdict, replace

import tvm

from llmc import targets
from llmc.codegen.binaries import cuda, gates, rocm
from llmc.codegen.binaries.device_code import DeviceCode
from llmc.codegen.gpu import quantized
from llmc.codegen.library import passes
from tests.codegen.gpu import emission
from tests.codegen.gpu.quantized_products import FORMATS


def resources(name, format, columns, depth, activation, rounded=None):
    [target] = targets.parse(name)
    made = dict(format=FORMATS[format], activation=activation, out=activation, rounded=rounded)
    kernel = quantized.matmul(target, columns, depth, **made)
    if target.language == "amdgpu":
        compiler = rocm.Compiler(target)
        compiler.install()
        with passes(target.kind):
            module = tvm.compile(tvm.IRModule({"matmul": kernel}), tvm.target.Target(target.tvm(), host="llvm"))
        return gates.resources(compiler.device_code(module.mod), target)
    source = emission.source(kernel, target.kind)
    if target.language == "msl":
        parts = source.split("kernel void ")
        code = DeviceCode({}, [], {p.partition("(")[0]: f"kernel void {p}".encode() for p in parts[1:]})
        return gates.resources(code, target)
    binary = cuda.compile(source, target.arch)
    threads = {kernel: int(count) for count, kernel in cuda.BOUNDS.findall(source)}
    return gates.resources(replace(DeviceCode({}, [binary], cuda.kernels(binary)), threads=threads), target)


if __name__ == "__main__":
    name, format, columns, depth, activation, *rounded = sys.argv[1:]
    found = resources(name, format, int(columns), int(depth), activation, *map(int, rounded))
    print(json.dumps({k: asdict(r) for k, r in found.items()}))
