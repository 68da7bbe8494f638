"""Texts as tokens."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from llmc.ir.errors import CompileError
from llmc.quality import samples


def tokenizer(words, template=None):
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", "<s>", *words])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1)])
    return {"tokenizer.json": made.to_str().encode()}


WORDS = ["one", "two", "three", "four", "a"]
TEXT = "one two three four " * 20


def test_a_prefix_is_what_stands_before_any_text():
    assert samples.read_text(tokenizer(WORDS), "x", TEXT).prefix == ()
    found = samples.read_text(tokenizer(WORDS, "<s> $A"), "x", TEXT)
    assert found.prefix == (1,) and found.ids.tolist() == [2, 3, 4, 5] * 20


def test_texts_that_cannot_be_read_are_refused():
    with pytest.raises(CompileError, match="x: expected a text that the tokenizer reads, found 20 of 80 tokens"):
        samples.read_text(tokenizer([*WORDS[:3], "a"]), "x", TEXT)
    with pytest.raises(CompileError, match="x: expected a text of at least 32 tokens, found 4"):
        samples.read_text(tokenizer(WORDS), "x", TEXT[:19])
    with pytest.raises(CompileError, match="x: expected a model with a tokenizer to read it, found none"):
        samples.read_text({}, "x", TEXT)


def test_sequences_come_from_all_over_a_text():
    tokens = samples.Tokens("x", np.arange(1000, dtype="int32"), (7,))
    found = samples.spread(tokens, 11, 4)
    assert [s[1] for s in found] == [0, 330, 660, 990] and all(s[0] == 7 and len(s) == 11 for s in found)
    assert len(samples.spread(tokens, 101, 50)) == 10
    assert [len(s) for s in samples.calibration(tokens, context=4096)] == [500, 500]


def test_the_bundled_text_is_prose_and_code():
    text = samples.bundled()
    assert "def moving_average" in text and len(text.split()) > 600
