"""Two small tokenizers: bytes as GPT-2 has them, and sentencepiece with its byte fallback as Llama 2 has it."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from llmc.runtime.text import Tokenizer

EOS = 256


def byte_level() -> tokenizers.Tokenizer:
    """Token b is byte b for b < 256; 256 and up are <eos>, <bos>, <user>, <assistant>."""
    # GPT-2's way to write bytes as letters: printable ones as they are, the others from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, other = {}, 0
    for b in range(256):
        if b in printable:
            letters[chr(b)] = b
        else:
            letters[chr(256 + other)] = b
            other += 1
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<eos>", "<bos>", "<user>", "<assistant>")])
    return tokenizer


PIECES = ["▁Hello", "▁world", "▁", "é", "a", "b", ".", "▁the", "你", "▁▁"]


def sentencepiece() -> tokenizers.Tokenizer:
    """Tokens 0 … 255 are the bytes <0x00> … <0xFF>, then PIECES; a space leads, and is dropped at the beginning."""
    names = [f"<0x{b:02X}>" for b in range(256)] + PIECES
    vocab = [(name, -2.0) for name in names] + [("<unk>", -9.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=len(vocab) - 1, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def saved(folder: Path, tokenizer: tokenizers.Tokenizer | None = None, **config) -> Tokenizer:
    """The runtime's tokenizer, from a folder."""
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "chat_template": TEMPLATE, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder, ["tokenizer.json", "tokenizer_config.json"])
