"""Faults planted in every type, to know that the sweep can see: each must come out as wrong.

A fault drops one thing from the imported program: the window, the chunks, the soft cap or the sinks of its attention,
the scale of the scores, an expert, a layer. The program is then evaluated as it stands and judged as the sweep judges
an artifact; the untouched program must pass by the same rule.
"""

import re

import numpy as np

from llmc.ir.ops import attention, attributes_of, op_of
from llmc.ir.rewrite import Rewriter, bindings

from . import checkpoints, comparison, configs

SEQUENCE = 4  # 64 tokens: past every window and chunk of the configs
LAYER = re.compile(r"\.(\d+)\.")  # the first number in a weight's name is that of its layer
EXPERTS = re.compile(r"expert", re.I)


def without(parameter):
    return lambda parameters, sinks: (parameters | {parameter: 0}, sinks) if parameters[parameter] else None


def other_scale(parameters, sinks):
    """The raw products; half of them where they are what the type wants."""
    return parameters | {"scale": 1.0 if parameters["scale"] != 1.0 else 0.5}, sinks


# Fault: from the parameters and the sinks of an attention to faulty ones, or None where there is nothing to drop.
IN_ATTENTION = {
    "window": without("window"),
    "chunk": without("chunk"),
    "softcap": without("softcap"),
    "sinks": lambda parameters, sinks: None if sinks is None else (parameters, None),
    "scale": other_scale,
}


class Planted(Rewriter):
    """The module with a fault in every attention that has what it drops; `count` says how many have."""

    def __init__(self, module, fault):
        super().__init__(module)
        self.fault, self.count = IN_ATTENTION[fault], 0

    def rewrite(self, var, value):
        if op_of(self.module, value) != "attention":
            return self.again(value)
        parameters = attributes_of(self.module, value)
        parameters = {key: parameters[key] for key in ("scale", "softcap", "window", "chunk")}
        q, k, v, *sinks = [self.get(operand) for operand in value.args]
        changed = self.fault(parameters, sinks[0] if sinks else None)
        if changed is None:
            return self.again(value)
        self.count += 1
        return attention(self.builder, q, k, v, changed[1], **changed[0])


def in_weights(weights, ops):
    """Faults that zero weights: {fault: {name: array}}, of those that the program can have."""
    layers = {name: int(number[1]) for name in weights if (number := LAYER.search(name))}
    middle = sorted(set(layers.values()))[len(set(layers.values())) // 2]
    faults = {"layer": {name: np.zeros_like(weights[name]) for name, layer in layers.items() if layer == middle}}
    if "expert_linear" in ops:
        faults["expert"] = {}
        for name, array in weights.items():
            if EXPERTS.search(name) and array.ndim == 3:
                faults["expert"][name] = array.copy()
                faults["expert"][name][1] = 0
    return faults


def judge(name, work):
    """Plant every fault in one type: "pass" if the sweep's rule sees each of them, and passes the type without."""
    from llmc.frontend import huggingface
    from llmc.ir.errors import CompileError
    from llmc.ir.evaluate import Reference

    folder = comparison.model_folder(name, work)
    facts, ids, want = checkpoints.read(folder)
    try:
        imported = huggingface.load(folder, max_context=configs.variant(name).max_context)
    except CompileError as refusal:
        return {"verdict": "refused", "reason": str(refusal)}
    module = imported.module
    names = [str(key) for key in module["main"].attrs["llmc.weights"]]
    weights = {key: imported.weights[key].read() for key in names}
    tokens = ids[SEQUENCE].astype(np.int32)[None]
    positions = np.arange(tokens.size, dtype=np.int32)[None]

    def errors_of(module, changes):
        """The error with each set of changed weights."""
        reference = Reference(module)
        for changed in changes:
            logits = reference(tokens, positions, *(weights | changed).values())[0]
            yield comparison.error([logits], [want[SEQUENCE]], facts["spread"])

    ops = {op_of(module, binding.value) for binding in bindings(module["main"])}
    by_weights = in_weights(weights, ops)
    untouched, *found = errors_of(module, [{}, *by_weights.values()])
    if comparison.verdict({"untouched": untouched}) != "pass":
        return {"verdict": "wrong", "errors": {"untouched": untouched}, "reason": "wrong without any fault"}
    errors = dict(zip(by_weights, found, strict=True))
    for fault in IN_ATTENTION:
        planted = Planted(module, fault)
        mutant = planted.run()
        if planted.count:
            (errors[fault],) = errors_of(mutant, [{}])
    unseen = [fault for fault, found in errors.items() if comparison.verdict({fault: found}) == "pass"]
    result = {"verdict": "wrong" if unseen else "pass", "errors": errors}
    return result | ({"reason": f"not seen: {', '.join(unseen)}"} if unseen else {})
