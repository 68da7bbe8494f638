"""Many requests at once and a cache far too small: each answer is that of its request alone, every page comes back."""

import random
import threading

import pytest

from tests.runtime.fake import VOCAB, fake_model
from tests.runtime.tokenizers_for_tests import EOS, saved

CACHE = 240  # tokens; a request takes up to 120
LONGEST = 80


def requests(count, seed):
    """Prompts that share beginnings, and how each wants to be sampled."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 60))] for _ in range(6)]
    for _ in range(count):
        begin = rng.choice(beginnings)[: rng.randrange(60)] if rng.random() < 0.7 else []
        prompt = (begin + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))])[:LONGEST]
        ask = {"max_tokens": rng.randrange(1, 40)}
        if rng.random() < 0.5:
            ask |= {"temperature": rng.choice([0.5, 1.0]), "seed": rng.randrange(100), "top_p": rng.choice([1.0, 0.8])}
        if rng.random() < 0.3:
            ask |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3}
        if rng.random() < 0.3:
            ask["stop"] = [chr(rng.randrange(97, 123)), "xy"]
        if rng.random() < 0.2:
            ask |= {"min_tokens": min(3, ask["max_tokens"]), "stop_token_ids": [rng.randrange(VOCAB)]}
        if rng.random() < 0.2:
            ask["logprobs"] = 2
        if rng.random() < 0.3:
            ask["ignore_eos"] = True
        yield prompt, ask, rng.randrange(12) if rng.random() < 0.2 else None


def soak(folder, count, seed):
    tokenizer = saved(folder)
    work = list(requests(count, seed))
    answers = [None] * count
    with fake_model(CACHE, tokenizer=tokenizer, eos=[EOS], engine={"max_tokens": 48, "max_sequences": 16}) as model:

        def client(mine):
            for i in mine:
                prompt, ask, cancel_after = work[i]
                request = model.submit(prompt, **ask)
                if cancel_after is not None:
                    for n, _ in enumerate(request):
                        if n == cancel_after:
                            request.cancel()
                answers[i] = request.result(60)

        clients = [threading.Thread(target=client, args=(range(c, count, 24),)) for c in range(24)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        engine = model.engine
        assert engine.pages.held == 0
        assert all(pool.available == pool.capacity - 1 for pool in engine.pages.pools)
        assert not engine.pages.copies
        counts = engine.preemptions, engine.executor.copied, sum(a.usage["cached_tokens"] > 0 for a in answers)
    with fake_model(4096, tokenizer=tokenizer, eos=[EOS], engine={"keep_idle": 0}) as alone:
        for (prompt, ask, cancel_after), found in zip(work, answers, strict=True):
            expected = alone.generate(prompt, **ask)
            if cancel_after is not None and found.finish_reason == "cancelled":
                assert found.token_ids == expected.token_ids[: len(found.token_ids)]
                assert expected.text.startswith(found.text.rstrip("�"))
                continue
            assert found.token_ids == expected.token_ids
            assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
            assert found.logprobs == expected.logprobs
    return counts


def test_a_soak(tmp_path):
    preemptions, copies, shared = soak(tmp_path, 300, seed=1)
    assert preemptions > 10 and copies > 20 and shared > 60  # it was as hard as it was meant to be


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_long_soak(tmp_path, seed):
    soak(tmp_path, 2000, seed)
