"""The engine on the fake model: every answer is that of the sequence by itself, whatever the batch."""

import gc
import threading
import time

import numpy as np
import pytest

from tests.runtime.fake import GROUPS, VOCAB, fake_model, group, reference_logits


def greedy(prompt, count, groups=GROUPS):
    """What the model says by itself, without pages."""
    tokens = [int(t) for t in prompt]
    for _ in range(count):
        tokens.append(int(reference_logits(tokens, groups)[-1].argmax()))
    return tokens[len(prompt) :]


def prompts(count, seed=0, longest=60):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(1, longest)).tolist() for _ in range(count)]


def test_one_answer():
    with fake_model() as model:
        answer = model.generate([1, 2, 3, 4, 5], max_tokens=20)
    assert answer.token_ids == greedy([1, 2, 3, 4, 5], 20)
    assert answer.finish_reason == "length"
    assert answer.usage == {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25, "cached_tokens": 0}


def test_a_batch_is_its_sequences_by_themselves():
    with fake_model(engine={"max_tokens": 24}) as model:
        many = prompts(12)
        for prompt, answer in zip(many, model.generate(many, max_tokens=15), strict=True):
            assert answer.token_ids == greedy(prompt, 15)
        steps = model.engine.executor.steps
        assert max(tokens for tokens, _ in steps) == 24 and max(sequences for _, sequences in steps) > 4
        assert model.engine.pages.held == 0


@pytest.mark.parametrize(
    "groups", [(group(0),), (group(0, window=5),), (group(0, chunk=7),), (group(0, window=9, chunk=12), group(1))]
)
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_logits_however_they_are_cut(groups, chunk):
    with fake_model(groups=groups, engine={"max_tokens": chunk}) as model:
        sequences = [list(range(n)) for n in (1, 2, 4, 17, 50)]
        for sequence, logits in zip(sequences, model.logits(sequences), strict=True):
            np.testing.assert_array_equal(logits, reference_logits(sequence, groups))
        assert model.engine.pages.held == 0


def test_equal_beginnings_are_computed_once():
    with fake_model() as model:
        prompt = list(range(40))
        first = model.generate([*prompt, 7], max_tokens=5)
        second = model.generate([*prompt, 8, 9], max_tokens=5)
        assert (first.usage["cached_tokens"], second.usage["cached_tokens"]) == (0, 40)
        assert second.token_ids == greedy([*prompt, 8, 9], 5)


def test_equal_beginnings_in_one_step_are_computed_once():
    with fake_model() as model:
        prompt = list(range(40))
        answers = model.generate([[*prompt, 7], [*prompt, 8], [*prompt, 9]], max_tokens=5)
        assert [a.usage["cached_tokens"] for a in answers] == [0, 40, 40]
        assert [a.token_ids for a in answers] == [greedy([*prompt, t], 5) for t in (7, 8, 9)]


def test_a_part_of_a_page_is_copied():
    with fake_model() as model:
        prompt = list(range(40))
        model.generate(prompt, max_tokens=1)
        again = model.generate(prompt, max_tokens=6)  # its last page is full, and its last token must be computed
        assert again.usage["cached_tokens"] == 39
        other = model.generate([*prompt[:38], 200, 201], max_tokens=6)
        assert other.usage["cached_tokens"] == 38
        assert model.engine.executor.copied == 2 * len(GROUPS)
        assert again.token_ids == greedy(prompt, 6)
        assert other.token_ids == greedy([*prompt[:38], 200, 201], 6)


def test_a_chat_goes_on_from_the_answer():
    with fake_model() as model:
        prompt = list(range(21))
        answer = model.generate(prompt, max_tokens=10)
        turn = [*prompt, *answer.token_ids, 3, 4]
        further = model.generate(turn, max_tokens=6)
        assert further.usage["cached_tokens"] == 30  # all but the answer's last token, which was never computed
        assert further.token_ids == greedy(turn, 6)


def test_a_pool_too_small_for_all_at_once():
    with fake_model(cache_tokens=80) as model:
        many = prompts(10, seed=3, longest=40)
        requests = [model.submit(p, max_tokens=30) for p in many]
        for prompt, request in zip(many, requests, strict=True):
            assert request.result(30).token_ids == greedy(prompt, 30)
        assert model.engine.pages.held == 0
        assert model.engine.preemptions > 0


def test_cancelling_frees_pages_at_once():
    with fake_model() as model:
        request = model.submit([1, 2, 3], max_tokens=300)
        stream = iter(request)
        seen = [next(stream) for _ in range(3)]
        request.cancel()
        answer = request.result(10)
        assert answer.finish_reason == "cancelled"
        assert model.engine.pages.held == 0
        assert answer.token_ids[:3] == [t for c in seen for t in c.token_ids]
        assert answer.token_ids == greedy([1, 2, 3], len(answer.token_ids))


def test_cancelling_before_it_ran_and_after_it_ended():
    hold = threading.Event()
    with fake_model(hold=hold) as model:
        first = model.submit([1, 2], max_tokens=2)
        second = model.submit([3, 4], max_tokens=2)
        second.cancel()
        hold.set()
        assert second.result(10).finish_reason == "cancelled"
        assert first.result(10).finish_reason == "length"
        first.cancel()
        assert first.result(10).finish_reason == "length"


def test_requests_join_a_running_batch_from_any_thread():
    with fake_model() as model:
        many, answers = prompts(16, seed=5), {}

        def ask(i):
            time.sleep(0.002 * i)
            answers[i] = model.submit(many[i], max_tokens=25).result(30)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, prompt in enumerate(many):
            assert answers[i].token_ids == greedy(prompt, 25)
        assert model.engine.pages.held == 0


def test_a_failing_step_fails_its_requests_and_no_other():
    with fake_model(fail_at=3) as model:
        with pytest.raises(RuntimeError, match="the step went wrong"):
            model.generate([1, 2, 3, 4, 5, 6], max_tokens=10)
        assert model.engine.pages.held == 0
        answer = model.generate([1, 2, 3, 4, 5, 6], max_tokens=10)
        assert answer.usage["cached_tokens"] == 0  # nothing of the failed step is trusted
        assert answer.token_ids == greedy([1, 2, 3, 4, 5, 6], 10)


def test_closing_cancels_what_runs():
    model = fake_model()
    request = model.submit([1, 2, 3], max_tokens=390)
    model.close()
    model.close()
    assert request.result(10).finish_reason == "cancelled"
    assert model.engine.executor.closed
    with pytest.raises(RuntimeError, match="the model is closed"):
        model.generate([1])


def test_a_model_that_nobody_has_is_closed():
    model = fake_model()
    engine, request = model.engine, model.submit([1, 2], max_tokens=20)
    del model
    assert request.result(10).finish_reason == "length"  # a request keeps its model
    del request
    gc.collect()
    engine._thread.join(10)
    assert engine.executor.closed


def test_a_fault_of_the_engine_reaches_who_waits(monkeypatch):
    model = fake_model()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(model.engine._scheduler, "advance", lambda plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate([1, 2])
    with pytest.raises(RuntimeError, match="the model is closed"):
        model.generate([1, 2])
    assert model.engine.executor.closed


def test_a_full_context_ends_an_answer():
    with fake_model(context=32) as model:
        answer = model.generate(list(range(30)), max_tokens=100)
        assert answer.finish_reason == "length"
        assert answer.token_ids == greedy(range(30), 3)  # the last is chosen at the context's last position
        assert len(model.generate(list(range(32)), max_tokens=100).token_ids) == 1


def test_idle_pages_are_bounded():
    with fake_model(engine={"keep_idle": 3}) as model:
        for prompt in prompts(10, seed=9):
            model.generate(prompt, max_tokens=5)
        assert all(len(pool.by_key) <= 3 for pool in model.engine.pages.pools)


def test_tokens_drawn_by_the_device():
    """Logits stay where they are; and what is drawn does not depend on who else wants logits."""
    sampled = {"temperature": 1.0, "seed": 5, "max_tokens": 12}
    with fake_model(samples=True) as model:
        alone = model.generate([1, 2, 3], **sampled).token_ids
        assert model.generate([1, 2, 3], max_tokens=12).token_ids == greedy([1, 2, 3], 12)
        assert model.engine.executor.fetched == 0
        requests = [model.submit([1, 2, 3], **sampled), model.submit([7, 8], max_tokens=12, logprobs=2)]
        together, other = [request.result() for request in requests]
        assert together.token_ids == alone
        assert other.token_ids == greedy([7, 8], 12) and len(other.logprobs) == 12
        assert model.engine.executor.fetched > 0
        [logits] = model.logits([[1, 2, 3]])
    np.testing.assert_array_equal(logits, reference_logits([1, 2, 3]))


def test_a_device_that_finds_no_numbers_fails_that_request(monkeypatch):
    with fake_model(samples=True) as model:
        drawn = model.engine.executor.sample
        monkeypatch.setattr(
            model.engine.executor, "sample", lambda logits, draws: np.where(draws.top_k == 7, -1, drawn(logits, draws))
        )
        bad, good = model.submit([1, 2], temperature=1.0, top_k=7), model.submit([1, 2], max_tokens=3)
        with pytest.raises(FloatingPointError, match="no numbers"):
            bad.result()
        assert good.result().token_ids == greedy([1, 2], 3)
