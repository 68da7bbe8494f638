"""Whole quantized models on the software device, for CUDA, ROCm and Metal from one artifact."""

import pytest

# Schemes that the kernels' own tests tell apart: integers, with zero points, in planes, tables, powers of two, rounded.
MODELS = [
    ("llama+yarn", "int4-g32-zp:head=nf4", "float32"),
    ("llama+yarn", "w8a8", "float32"),
    ("gemma2", "int4", "float32"),
    ("qwen3_moe", "nf4:head=int3-g32", "float32"),
    ("qwen3_moe", "mxfp4", "bfloat16"),
    ("deepseek_v3", "fp8", "float32"),
    ("deepseek_v3", "int3-g32:head=int8-g32", "float16"),
]


def judged(*args):
    from llmc.bench import quantized_devices

    return quantized_devices.judge(*args)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "scheme", "dtype"), MODELS)
def test_whole_models(name, scheme, dtype, tmp_path, isolated):
    result = isolated(judged, name, scheme, tmp_path, dtype, timeout=3500)
    assert result["verdict"] == "pass", result
    assert list(result["errors"]) == ["cuda:sm_90", "rocm:gfx942", "metal"]
    assert result["quantized"]["formats"]
