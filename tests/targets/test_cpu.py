import pytest

from llmc.targets import CpuTarget, cpu, parse

FLAGS_V4 = " ".join(cpu.X86_64_V4)


def cpuinfo(vendor, family, model, flags):
    head = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
    return f"{head}flags\t\t: {flags}\n\nprocessor\t: 1\n"


def test_this_machine_is_a_target():
    [here] = parse("cpu")
    assert here.kind == "cpu" and here.name.startswith("cpu:") and here.cores >= 1
    assert here.vector_bits in (128, 256, 512) and here.keys_token_last
    assert cpu.by_name(here.name[4:]) == here


def test_a_microarchitecture_is_recognised():
    target = cpu.detect(cpuinfo("AuthenticAMD", 25, 17, " ".join(cpu._ZEN4)))
    assert (target.name, target.mcpu, target.vector_bits, target.has_bf16_dot) == ("cpu:znver4", "znver4", 512, True)


def test_hidden_features_fall_back_to_the_level():
    target = cpu.detect(cpuinfo("AuthenticAMD", 25, 17, FLAGS_V4))
    assert (target.name, target.has_bf16_dot) == ("cpu:x86-64-v4", False)
    target = cpu.detect(cpuinfo("AuthenticAMD", 25, 17, " ".join(cpu.X86_64_V3)))
    assert (target.name, target.vector_bits) == ("cpu:x86-64-v3", 256)


def test_an_unknown_model_keeps_its_bf16_instruction():
    target = cpu.detect(cpuinfo("GenuineIntel", 6, 250, FLAGS_V4 + " avx512_bf16"))
    assert target.name == "cpu:x86-64-v4+bf16" and target.llvm()["mattr"] == ["+avx512bf16"] and target.has_bf16_dot
    assert "avx512_bf16" in target.features


def test_an_unknown_model_keeps_its_integer_dots():
    target = cpu.detect(cpuinfo("GenuineIntel", 6, 250, FLAGS_V4 + " avx512_bf16 avx512_vnni"))
    assert target.name == "cpu:x86-64-v4+bf16+vnni" and target.llvm()["mattr"] == ["+avx512bf16", "+avx512vnni"]
    target = cpu.detect(cpuinfo("GenuineIntel", 6, 250, " ".join(cpu.X86_64_V3) + " avx_vnni"))
    assert target.name == "cpu:x86-64-v3+vnni" and target.llvm()["mattr"] == ["+avxvnni"]
    assert "avx_vnni" in target.features


def test_an_old_cpu_is_refused_with_what_it_lacks():
    with pytest.raises(ValueError, match="lacks avx2, bmi1"):
        cpu.detect(cpuinfo("GenuineIntel", 6, 42, "avx movbe f16c fma"))


def test_names_and_lists():
    names = [t.name for t in parse("cpu:x86-64-v3, cpu:x86-64-v4,cpu:x86-64-v3")]
    assert names == ["cpu:x86-64-v3", "cpu:x86-64-v4"]
    [arm] = parse(["cpu:aarch64"])
    assert isinstance(arm, CpuTarget) and arm.lanes == 4 and arm.host == "linux-aarch64"


def test_unknown_targets():
    with pytest.raises(ValueError, match="unknown target 'tpu': expected one of cpu, cuda, rocm, metal"):
        parse("tpu")
    with pytest.raises(ValueError, match=r"unknown CPU 'pentium': expected cpu .*cpu:x86-64-v3"):
        parse("cpu:pentium")


def test_a_cpu_has_one_host():
    assert parse("cpu:aarch64", "linux-aarch64")[0].host == "linux-aarch64"
    with pytest.raises(ValueError, match="host 'linux-aarch64' with target cpu:x86-64-v3: expected linux-x86_64"):
        parse("cpu:x86-64-v3", "linux-aarch64")
