"""Types of the sweep in every scheme: compiled and compared with transformers over the weights that codes stand for."""

import json

import numpy as np
import pytest

from llmc.bench import architectures
from llmc.passes import schemes
from tests.bench.test_architectures import COVER as TYPES

# Every type of the sweep's cover and every scheme, each at least once.
COVER = {
    "llama+yarn": "int4-g32-a8",
    "gpt2": "w8a8",  # weights stored [inputs, outputs]
    "qwen2+window": "fp8-a8",
    "gemma2": "nf4",
    "gemma3": "int8",
    "phi3+longrope-long": "int8-g32:head=fp8",
    "cohere2": "int3-g32-zp",
    "mixtral": "int4",
    "gpt_oss": "mxfp4",  # experts stored [inputs, outputs], with biases
    "deepseek_v3": "fp8",  # a latent that attention absorbs stays as it is
    "llama4_text": "int4-g64-zp:head=none",
}
ALL = [name for name, verdict in TYPES.items() if verdict == "pass" and name != "roberta"]
# transformers' experts are no layers whose activations a hook could round.
MIXTURES = {"mixtral", "gpt_oss", "deepseek_v3", "llama4_text"}
SCHEMES = {n: [s for s in schemes.names() if n not in MIXTURES or schemes.parse(s).activation is None] for n in ALL}


def child(*args):
    from llmc.bench import quantized

    quantized.child(*args)


def judged(name, wanted, work, timeout=600):
    """-> scheme -> its result, of one type in one process."""
    code = architectures.run_process(child, (name, wanted, work), timeout)
    files = {scheme: work / f"{scheme}.json" for scheme in wanted}
    assert code == 0, f"exit code {code}; no result of {[s for s, file in files.items() if not file.exists()]}"
    return {scheme: json.loads(file.read_text()) for scheme, file in files.items()}


def check(result):
    assert result["verdict"] == "pass" and result["bitwise"], result
    assert set(result["errors"]) == {"ragged", "chunked", "decode"}


@pytest.mark.parametrize("name", COVER)
def test_cover(name, tmp_path):
    [result] = judged(name, [COVER[name]], tmp_path).values()
    check(result)
    facts = result["quantized"]
    assert facts["bits_per_weight"] < 16 and facts["formats"], facts


def test_the_cover_has_every_scheme():
    bases = {part for text in COVER.values() for part in text.replace("head=", "").split(":")}
    assert {name.split("-")[0] for name in schemes.names()} <= {base.split("-")[0] for base in bases}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ALL)
def test_every_type_in_every_scheme(name, tmp_path):
    """In one process for a type: what does not depend on the scheme is done once."""
    results = judged(name, SCHEMES[name], tmp_path, timeout=3500)
    assert len(results) >= 12
    wrong = {s: r for s, r in results.items() if r["verdict"] != "pass" or not r["bitwise"] or len(r["errors"]) != 3}
    assert not wrong


def test_what_is_raised_is_the_error_of_its_scheme(tmp_path):
    from llmc.bench import quantized

    def judge(name, scheme, work):
        if scheme == "nf4":
            raise ValueError(f"no {name}")
        return {"verdict": "pass"}

    quantized.child("llama", ["nf4", "int8"], tmp_path, judge)
    nf4, int8 = (json.loads(quantized.result_path(tmp_path, s).read_text()) for s in ("nf4", "int8"))
    assert nf4["verdict"] == "error" and "ValueError: no llama" in nf4["reason"] and int8 == {"verdict": "pass"}


def test_tokens_are_judged_two_by_two():
    from llmc.bench.quantized import pairs

    found = pairs([np.arange(5), np.arange(10, 12), np.arange(20, 24)], count=5)
    assert [pair.tolist() for pair in found] == [[0, 1], [2, 3], [4], [10, 11], [20, 21]]


def test_the_median_error_sees_a_fault_of_most_rows():
    from llmc.bench.quantized import median_error

    want = [np.zeros((4, 3), "float32"), np.zeros((7, 3), "float32")]
    got = [rows.copy() for rows in want]
    got[1][5:] = 9
    assert median_error(got, want, 2.0) == 0
    got[1][0:] = 9
    assert median_error(got, want, 2.0) == 4.5
    got[0][0, 0] = np.nan
    assert median_error(got, want, 2.0) is None
