"""The model's face: prompts of every kind, streams, asyncio, measurement, and one clear line for what can't be."""

import asyncio
import re

import numpy as np
import pytest

from llmc.runtime.errors import RequestError
from tests.runtime.fake import VOCAB, fake_model, reference_logits
from tests.runtime.test_engine import greedy
from tests.runtime.tokenizers_for_tests import EOS, saved


@pytest.fixture
def tokenizer(tmp_path):
    return saved(tmp_path)


@pytest.fixture
def model(tokenizer):
    with fake_model(tokenizer=tokenizer, eos=[EOS]) as model:
        yield model


def answer_of(tokenizer, prompt, count):
    """The whole answer of the model, its text and whether it ended by itself."""
    ids = greedy(prompt, count)
    if EOS in ids:
        ids = ids[: ids.index(EOS) + 1]
    return ids, tokenizer.decode(ids), "stop" if EOS in ids else "length"


class TestPrompts:
    def test_text_ids_chat_and_arrays_are_one_prompt(self, model):
        ids = list(b"Hi there")
        expected = answer_of(model.tokenizer, ids, 20)
        for prompt in ("Hi there", ids, tuple(ids), np.array(ids), np.array(ids, np.uint8), [np.int32(i) for i in ids]):
            answer = model.generate(prompt, max_tokens=20)
            assert (answer.token_ids, answer.text, answer.finish_reason) == expected
        chat = model.generate([{"role": "user", "content": "Hi"}], max_tokens=20)
        assert chat.token_ids == answer_of(model.tokenizer, [257, 258, *b"Hi", 259], 20)[0]

    def test_several_prompts_give_several_answers_in_order(self, model):
        prompts = ["one", list(b"two"), [{"role": "user", "content": "three"}], np.array([1, 2])]
        answers = model.generate(prompts, max_tokens=6)
        assert isinstance(answers, list)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == model.generate(prompt, max_tokens=6).token_ids
        assert isinstance(model.generate(["one"], max_tokens=2), list)

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("", "the prompt is empty: expected at least one token"),
            ([], "the prompt is empty: expected at least one token"),
            ([[]], "the prompt is empty: expected at least one token"),
            ([[1], []], "the prompt is empty: expected at least one token"),
            ([1, 260], "the prompt has the token id 260: expected ids from 0 to 259"),
            ([-1], "the prompt has the token id -1: expected ids from 0 to 259"),
            ([1] * 401, "the prompt has 401 tokens: the model's context is 400; shorten the prompt"),
            ([1, "a"], "a prompt is text, a list of token ids or a list of messages, found [1, 'a']"),
            ([1, 2.5], "a prompt is text, a list of token ids or a list of messages, found [1, 2.5]"),
            ([True], "a prompt is text, a list of token ids or a list of messages, found True"),
            ([None], "a prompt is text, a list of token ids or a list of messages, found None"),
            (7, "expected a prompt (text, token ids, messages) or a list of prompts, found 7"),
            (None, "expected a prompt (text, token ids, messages) or a list of prompts, found None"),
        ],
    )
    def test_prompts_that_cant_be(self, model, prompt, message):
        with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
            model.generate(prompt)
        assert model.engine.pages.held == 0

    def test_without_a_tokenizer(self):
        with fake_model() as model:
            assert model.tokenizer is None
            assert model.generate([1, 2], max_tokens=3).text == ""
            line = "this artifact has no tokenizer: expected a list of token ids, found "
            with pytest.raises(RequestError, match=line + "text"):
                model.generate("Hi")
            with pytest.raises(RequestError, match=line + "a chat"):
                model.generate([{"role": "user", "content": "Hi"}])
            with pytest.raises(
                RequestError, match="stop: this artifact has no tokenizer, so stop strings can't be found"
            ):
                model.generate([1], stop="a")

    def test_a_request_that_can_never_fit(self):
        with fake_model(cache_tokens=32) as model:
            with pytest.raises(
                RequestError, match=r"cache is too small for this request: .*, 40 tokens, need 40 .* are 32"
            ):
                model.generate([1] * 20, max_tokens=21)
            assert len(model.generate([1] * 20, max_tokens=13).token_ids) == 13

    def test_bad_sampling_is_refused_before_anything_runs(self, model):
        with pytest.raises(RequestError, match="top_p: expected"):
            model.generate("Hi", top_p=2)
        with pytest.raises(RequestError, match="stop_token_ids: expected ids below 260, found 260"):
            model.generate("Hi", stop_token_ids=[260])
        with pytest.raises(TypeError, match="unknown sampling parameter 'max_token'"):
            model.generate("Hi", max_token=2)
        assert model.engine.steps == 0


class TestEnding:
    def prompt(self, tokenizer, count=40):
        """A prompt whose answer ends by itself, neither at once nor late."""
        for i in range(4000):
            prompt = [i % 250, i // 250]
            ids = greedy(prompt, count)
            if EOS in ids and 5 < ids.index(EOS) < count - 5:
                return prompt, ids
        raise AssertionError("no prompt found")

    def test_the_end_token(self, model):
        prompt, ids = self.prompt(model.tokenizer)
        end = ids.index(EOS)
        answer = model.generate(prompt, max_tokens=40)
        assert (answer.token_ids, answer.finish_reason) == (ids[: end + 1], "stop")
        assert answer.text == model.tokenizer.decode(ids[:end])
        assert answer.usage["completion_tokens"] == end + 1

    def test_going_on_past_it(self, model):
        prompt, ids = self.prompt(model.tokenizer)
        answer = model.generate(prompt, max_tokens=40, ignore_eos=True)
        assert (answer.token_ids, answer.finish_reason) == (ids, "length")

    def test_other_end_tokens(self, model):
        prompt, ids = self.prompt(model.tokenizer)
        answer = model.generate(prompt, max_tokens=40, stop_token_ids=[ids[3]], ignore_eos=True)
        assert answer.token_ids == ids[: ids.index(ids[3]) + 1] and answer.finish_reason == "stop"
        assert answer.text == model.tokenizer.decode(answer.token_ids[:-1])

    def test_min_tokens(self, model):
        prompt, ids = self.prompt(model.tokenizer)
        end = ids.index(EOS)
        answer = model.generate(prompt, max_tokens=40, min_tokens=end + 1)
        assert answer.token_ids[:end] == ids[:end] and EOS not in answer.token_ids[: end + 1]

    def test_a_stop_string(self, model):
        ids = greedy(list(b"ab"), 30)
        text = model.tokenizer.decode(ids)
        stop = text[8:10]
        answer = model.generate("ab", max_tokens=30, stop=[stop, "never comes"], ignore_eos=True)
        assert answer.text == text[: text.index(stop)] and answer.finish_reason == "stop"
        assert stop in model.tokenizer.decode(answer.token_ids)
        assert stop not in model.tokenizer.decode(answer.token_ids[:-1])
        assert model.engine.pages.held == 0


class TestStream:
    def test_chunks_make_up_the_answer(self, model):
        whole = model.generate("Hi", max_tokens=25)
        chunks = list(model.stream("Hi", max_tokens=25))
        assert "".join(c.text for c in chunks) == whole.text
        assert [t for c in chunks for t in c.token_ids] == whole.token_ids
        assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == whole.finish_reason

    def test_closing_the_iterator_frees_its_pages(self, model):
        stream = model.stream("Hi", max_tokens=390, ignore_eos=True)
        next(stream)
        assert model.engine.pages.held > 0
        stream.close()
        assert model.engine.pages.held == 0

    def test_leaving_a_loop_frees_its_pages(self, model):
        for chunk in model.stream("Hi", max_tokens=390, ignore_eos=True):
            if chunk.token_ids:
                break
        del chunk
        assert model.engine.pages.held == 0

    def test_an_error_in_the_engine_reaches_the_reader(self, tokenizer):
        with fake_model(tokenizer=tokenizer, fail_at=3) as model, pytest.raises(RuntimeError, match="went wrong"):
            list(model.stream("Hi", max_tokens=10, ignore_eos=True))

    def test_a_bad_prompt_is_refused_when_asked(self, model):
        with pytest.raises(RequestError, match="the prompt is empty"):
            model.stream("")

    def test_a_request_is_read_once_and_has_its_result(self, model):
        request = model.submit("Hi", max_tokens=5)
        assert [t for c in request for t in c.token_ids] == request.result().token_ids
        assert list(request) == []
        with pytest.raises(TimeoutError, match=r"the request is not done after 0.01 s"):
            model.submit("Hi", max_tokens=300, ignore_eos=True).result(timeout=0.01)


class TestLogprobs:
    def test_they_come_with_chunks_and_answers(self, model):
        whole = model.generate([1, 2, 3], max_tokens=6, logprobs=2)
        assert [entry.token_id for entry in whole.logprobs] == whole.token_ids
        tokens = [1, 2, 3, *whole.token_ids]
        for position, entry in enumerate(whole.logprobs, start=3):
            row = reference_logits(tokens[:position])[-1].astype(np.float64)
            row -= np.log(np.exp(row - row.max()).sum()) + row.max()
            assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-5)
            assert list(entry.top) == np.argsort(-row, kind="stable")[:2].tolist()
        chunks = list(model.stream([1, 2, 3], max_tokens=6, logprobs=2))
        assert [e for c in chunks for e in c.logprobs] == whole.logprobs
        assert model.generate([1], max_tokens=2).logprobs is None


def test_sampling_depends_on_the_seed_and_not_on_the_batch(model):
    ask = {"max_tokens": 20, "temperature": 0.9, "top_p": 0.9, "ignore_eos": True}
    alone = model.generate("Hi", seed=7, **ask)
    assert model.generate("Hi", seed=7, **ask).token_ids == alone.token_ids
    assert model.generate("Hi", seed=8, **ask).token_ids != alone.token_ids
    assert model.generate("Hi", **ask).token_ids != model.generate("Hi", **ask).token_ids
    requests = [model.submit("Hi", seed=7, **ask) for _ in range(3)] + [model.submit("Other", seed=1, **ask)]
    assert [r.result().token_ids for r in requests[:3]] == [alone.token_ids] * 3


class TestMeasuring:
    def test_logits(self, model):
        found = model.logits([[1, 2, 3], [4, 5], np.arange(100)])
        assert [x.dtype for x in found] == [np.float32] * 3
        for tokens, logits in zip([[1, 2, 3], [4, 5], range(100)], found, strict=True):
            np.testing.assert_array_equal(logits, reference_logits(tokens))
        assert model.logits([]) == []
        assert model.engine.pages.held == 0

    def test_scores(self, model):
        ids = list(b"some text")
        rows = reference_logits(ids).astype(np.float64)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        expected = rows[np.arange(len(ids) - 1), ids[1:]]
        for asked in (["some text"], "some text", [ids], ids):
            (found,) = model.score(asked)
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert [len(s) for s in model.score([[1], [1, 2], list(range(200))])] == [0, 1, 199]

    def test_scores_of_a_text_longer_than_a_step(self, tokenizer):
        with fake_model(tokenizer=tokenizer, engine={"max_tokens": 7}) as small, fake_model() as large:
            np.testing.assert_array_equal(small.score([list(range(60))])[0], large.score([list(range(60))])[0])

    def test_what_cant_be(self, model):
        with pytest.raises(RequestError, match="the prompt is empty"):
            model.logits([[1], []])
        with pytest.raises(RequestError, match="token id 999"):
            model.score([[1, 999]])


class TestAsyncio:
    def test_results_and_chunks(self, model):
        prompts = [[i, i + 1] for i in range(12)]
        expected = [model.generate(p, max_tokens=12).token_ids for p in prompts]

        async def read(prompt):
            return [t async for chunk in model.asubmit(prompt, max_tokens=12) for t in chunk.token_ids]

        async def ask(prompt):
            return (await model.asubmit(prompt, max_tokens=12)).token_ids

        async def both():
            return await asyncio.gather(*map(read, prompts)), await asyncio.gather(*map(ask, prompts))

        assert asyncio.run(both()) == (expected, expected)

    def test_cancelling(self, model):
        async def cancelled():
            request = model.asubmit([1], max_tokens=390, ignore_eos=True)
            async for _ in request:
                break
            request.cancel()
            return await request.result()

        answer = asyncio.run(cancelled())
        assert answer.finish_reason == "cancelled" and len(answer.token_ids) < 390
        assert model.engine.pages.held == 0

    def test_a_cancelled_task_cancels_its_request(self, model):
        async def timed_out():
            request = model.asubmit([1], max_tokens=390, ignore_eos=True)
            task = asyncio.create_task(request.result())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(timed_out())
        model.generate([5], max_tokens=1)  # the cancelled one is gone by the next step
        assert model.engine.pages.held == 0

    def test_errors(self, tokenizer):
        with fake_model(tokenizer=tokenizer, fail_at=2) as model:

            async def ask():
                await model.asubmit([1, 2], max_tokens=9)

            with pytest.raises(RuntimeError, match="the step went wrong"):
                asyncio.run(ask())


def test_an_interrupted_batch_leaves_nothing_running(model, monkeypatch):
    from llmc.runtime.request import Request

    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(Request, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate([[1, 2], [3, 4]], max_tokens=390, ignore_eos=True)
    monkeypatch.undo()
    model.generate([5], max_tokens=1)
    assert model.engine.pages.held == 0


def test_logits_that_are_no_numbers_fail_their_request(monkeypatch):
    from tests.runtime import fake

    with fake_model() as model:
        monkeypatch.setattr(fake, "logits_of", lambda state: np.full(VOCAB, np.nan, np.float32))
        with pytest.raises(FloatingPointError, match=r"the model's logits are no numbers: .* --dtype bfloat16 or fl"):
            model.generate([1, 2])
        assert model.engine.pages.held == 0


def test_it_says_what_it_is(model):
    assert repr(model) == "<llmc.Model fake: vocabulary 260, context 400>"
    assert model.info.model["vocab_size"] == VOCAB
