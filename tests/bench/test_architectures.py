"""The sweep itself: its verdicts whatever a child process does, its table, and a cover of the types."""

import json
import os
import signal
import time
from argparse import Namespace

import pytest

from llmc.bench import architectures, configs


@pytest.fixture
def options():
    return Namespace(jobs=1, timeout=60, mutate=False)


@pytest.fixture
def work(tmp_path):
    (tmp_path / "results").mkdir()
    return tmp_path


def test_exit_codes_of_processes():
    assert architectures.run_process(os._exit, (0,), 60) == 0
    assert architectures.run_process(os._exit, (3,), 60) == 3
    assert architectures.run_process(os.abort, (), 60) == -signal.SIGABRT


def test_a_process_that_takes_too_long_is_ended():
    assert architectures.run_process(time.sleep, (60,), 0.2) is None


def test_a_crash_is_an_error_with_its_last_words(monkeypatch, work, options):
    def crash(target, args, timeout):
        args[-1].write_text("it hurts")
        return -11

    monkeypatch.setattr(architectures, "run_process", crash)
    result = architectures.run_child("llama", work, "results", options)
    assert (result["verdict"], result["reason"]) == ("error", "ended with exit code -11: it hurts")


def test_a_stale_result_is_not_taken_for_a_new_one(monkeypatch, work, options):
    monkeypatch.setattr(architectures, "run_process", lambda *_: 1)
    architectures.result_path(work, "results", "llama").write_text(json.dumps({"verdict": "pass"}))
    assert architectures.run_child("llama", work, "results", options)["verdict"] == "error"


def test_no_result_in_time_is_an_error(monkeypatch, work, options):
    monkeypatch.setattr(architectures, "run_process", lambda *_: None)
    result = architectures.run_child("llama", work, "results", options)
    assert (result["verdict"], result["reason"]) == ("error", "no result after 60 s")


def test_a_child_s_result_is_taken(monkeypatch, work, options):
    def answer(target, args, timeout):
        architectures.result_path(work, "results", "llama").write_text('{"name": "llama", "verdict": "pass"}')
        return 0

    monkeypatch.setattr(architectures, "run_process", answer)
    result = architectures.run_child("llama", work, "results", options)
    assert result["verdict"] == "pass" and result["seconds"] >= 0


def test_a_type_that_cannot_be_built_is_refused_by_name(tmp_path, options):
    result = architectures.run_child("musicgen", tmp_path, "results", options)
    assert result["verdict"] == "refused" and "sound" in result["reason"]


@pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("refused", 0), ("wrong", 1), ("error", 1)])
def test_exit_code(monkeypatch, tmp_path, verdict, code):
    result = {"name": "llama", "verdict": verdict, "errors": {"ragged": 1e-6}, "reason": "", "seconds": 1.0}
    monkeypatch.setattr(architectures, "run_child", lambda *_: result)
    assert architectures.main(["llama", "--work", str(tmp_path), "--no-table"]) == code


def test_unknown_name(capsys):
    assert architectures.main(["lama"]) == 2
    assert "unknown type lama" in capsys.readouterr().err


def test_only_and_resume_choose_by_the_last_results(monkeypatch, tmp_path):
    ran = []

    def child(name, work, kind, options):
        ran.append(name)
        return {"name": name, "verdict": "pass", "errors": {}, "seconds": 0.0}

    monkeypatch.setattr(architectures, "run_child", child)
    (tmp_path / "results").mkdir()
    for name, verdict in (("gpt2", "refused"), ("llama", "wrong"), ("opt", "pass")):
        result = {"name": name, "verdict": verdict, "seconds": 0.0}
        architectures.result_path(tmp_path, "results", name).write_text(json.dumps(result))
    common = ["--work", str(tmp_path), "--no-table"]
    architectures.main(["--only", "refused,wrong", *common])
    assert sorted(ran) == ["gpt2", "llama"]
    ran.clear()
    architectures.main(["--resume", *common])
    assert set(configs.names()) - set(ran) == {"gpt2", "llama", "opt"}


def test_table():
    text = architectures.markdown(
        [
            {
                "name": "llama",
                "verdict": "pass",
                "errors": {"ragged": 1e-6, "decode": None},
                "seconds": 3,
            },
            {"name": "rwkv", "verdict": "refused", "reason": "a | b", "seconds": 1.2},
            {"name": "llama+yarn", "verdict": "wrong", "errors": {"ragged": 1.0}, "seconds": 1},
        ],
        "results",
        "2026-01-01",
    )
    assert "Types: pass 1, refused 1, wrong 0, error 0." in text
    assert "Variants: pass 0, refused 0, wrong 1, error 0." in text
    assert "| llama | pass | 1.0e-06 | not finite |  | 3 |" in text
    assert "| rwkv | refused |  |  | a \\| b | 1 |" in text


COVER = {
    "llama+yarn": "pass",  # rope with an attention factor
    "gpt2": "pass",  # learned positions, fused projections, tied head
    "gemma2": "pass",  # windows, soft caps, norms that add one
    "gemma3": "pass",  # the text half of a checkpoint with pictures
    "phi3+longrope-long": "pass",  # factors that follow the context
    "cohere2": "pass",  # layers without rope, parallel blocks
    "mixtral": "pass",  # experts stored one by one
    "gpt_oss": "pass",  # experts with biases, sinks
    "deepseek_v3": "pass",  # latent attention, groups of experts
    "llama4_text": "pass",  # chunks, a temperature of the position
    "roberta": "pass",  # positions that begin after the padding's
    "rwkv": "refused",
    "bert+encoder": "refused",
}


def expected(name):
    """What a type must come to: only those that `configs` names may be refused."""
    refused = {other for names in configs.REFUSED.values() for other in names} | set(configs.UNBUILT)
    return ("pass", "refused") if name in refused else ("pass",)


def judged(name, work, kind="results", **changes):
    (work / kind).mkdir(exist_ok=True)
    options = Namespace(jobs=1, timeout=600, mutate=kind == "mutations", **changes)
    return architectures.run_child(name, work, kind, options)


@pytest.mark.parametrize("name", COVER)
def test_cover(name, tmp_path):
    result = judged(name, tmp_path)
    assert result["verdict"] == COVER[name], result
    if result["verdict"] == "pass":
        assert set(result["errors"]) == {"ragged", "chunked", "decode"}
        assert result["bitwise"]


def test_planted_faults_are_seen(tmp_path):
    result = judged("gpt_oss", tmp_path, "mutations")
    assert result["verdict"] == "pass", result
    assert set(result["errors"]) == {"layer", "expert", "window", "sinks", "scale"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(configs.names()) - set(COVER)))
def test_every_type(name, tmp_path):
    result = judged(name, tmp_path)
    assert result["verdict"] in expected(name), result
    assert result.get("bitwise", True), result


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(configs.names()) - {"gpt_oss"}))
def test_planted_faults_are_seen_in_every_type(name, tmp_path):
    result = judged(name, tmp_path, "mutations")
    assert result["verdict"] in expected(name), result
