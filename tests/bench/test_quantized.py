"""Types of the sweep in every scheme: compiled and compared with transformers over the weights that codes stand for."""

import numpy as np
import pytest

from llmc.passes import schemes
from tests.bench.test_architectures import COVER as TYPES

# Every type of the sweep's cover and every scheme, each at least once.
COVER = {
    "llama+yarn": "int4-g32-a8",
    "gpt2": "w8a8",  # weights stored [inputs, outputs]
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
PRODUCT = [(n, s) for n in ALL for s in schemes.names() if n not in MIXTURES or schemes.parse(s).activation is None]


def judged(name, scheme, work):
    from llmc.bench import quantized

    return quantized.judge(name, scheme, work)


def check(result):
    assert result["verdict"] == "pass" and result["bitwise"], result
    assert set(result["errors"]) == {"ragged", "chunked", "decode"}


@pytest.mark.parametrize("name", COVER)
def test_cover(name, tmp_path, isolated):
    result = isolated(judged, name, COVER[name], tmp_path, timeout=600)
    check(result)
    facts = result["quantized"]
    assert facts["bits_per_weight"] < 16 and facts["formats"], facts


def test_the_cover_has_every_scheme():
    bases = {part for text in COVER.values() for part in text.replace("head=", "").split(":")}
    assert {name.split("-")[0] for name in schemes.names()} <= {base.split("-")[0] for base in bases}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), PRODUCT)
def test_every_type_in_every_scheme(name, scheme, tmp_path, isolated):
    check(isolated(judged, name, scheme, tmp_path, timeout=900))


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
