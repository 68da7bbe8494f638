"""Files for llama.cpp, and what their weights stand for: against llama.cpp's own logits."""

from pathlib import Path

import numpy as np
import pytest

TINY = Path(__file__).parents[1] / "data" / "tiny-python"
WORDS = 48

pytest.importorskip("llama_cpp", reason="llama.cpp is one of the peers: pip install llmc[peers]")


def llama_cpp_logits(path, tokens):
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])


def run(folder):
    """For F16, Q4_0 and Q8_0: llama.cpp's logits; ours with the file's weights; and with its activations too."""
    from llmc import quantization
    from llmc.bench import gguf_writer
    from llmc.frontend import huggingface
    from llmc.quality.evaluator import Evaluator
    from llmc.refinement import textbook

    imported = huggingface.load(TINY)
    names = list(quantization.plan_of(quantization.prepare(imported, "int8")).schemes)
    tokens = np.random.default_rng(0).integers(3, 4096, WORDS)
    evaluator = Evaluator(textbook(imported), imported.weights, WORDS)
    whole, found = gguf_writer.write(TINY, Path(folder) / "F16.gguf"), {}
    for kind in ("F16", "Q4_0", "Q8_0"):
        path = whole if kind == "F16" else gguf_writer.quantize(whole, kind, Path(folder) / f"{kind}.gguf", 1)
        ours = []
        for rounded in (False, True) if kind != "F16" else (False,):
            weights = gguf_writer.weights(path, TINY, names, rounded=rounded)
            ours += evaluator([tokens], weights)
        types = sorted({weight.type for weight in weights.values()})
        found[kind] = types, llama_cpp_logits(path, tokens.tolist()), ours
    return found


@pytest.mark.slow
def test_weights_are_those_that_llama_cpp_multiplies(isolated, tmp_path):
    found = isolated(run, str(tmp_path), timeout=300)
    off = {}
    for kind, (_, theirs, ours) in found.items():
        off[kind] = [float(np.sqrt(np.mean((own - theirs) ** 2)) / theirs.std()) for own in ours]
    assert [found[kind][0] for kind in found] == [["F16"], ["Q4_0", "Q6_K"], ["Q8_0"]]
    # llama.cpp multiplies halves with F16 and activations in 8 bits with the others, whose groups are rounded here too;
    # which of two numbers is nearer is decided otherwise now and then, and later layers make more of it.
    assert off["F16"][0] < 3e-3
    assert off["Q4_0"][1] < off["Q4_0"][0] < 0.025 and off["Q8_0"][1] < off["Q8_0"][0] < 0.025
    plain, few = found["F16"][1], found["Q4_0"][1]
    assert np.sqrt(np.mean((few - plain) ** 2)) > 5 * off["Q4_0"][0] * few.std()  # what the weights' 4 bits do


def test_what_is_no_llama_is_refused():
    from llmc.bench.gguf_writer import name_in_gguf

    with pytest.raises(ValueError, match=r"expected the weights of a Llama, found model\.conv\.weight"):
        name_in_gguf("model.conv.weight", {"num_hidden_layers": 2})
