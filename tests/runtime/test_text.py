"""Text: characters never split, stop strings however tokens cut them, chat templates that can do no harm."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.errors import ArtifactError, RequestError
from llmc.runtime.text import ChatTemplate, Detokenizer, StopStrings, Tokenizer
from tests.runtime.tokenizers_for_tests import PIECES, byte_level, saved, sentencepiece


class Plain:
    """A tokenizer without files."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


BYTES, PIECE = Plain(byte_level()), Plain(sentencepiece())


def pieces(tokenizer, ids, prompt=(), stop=()):
    detokenizer = Detokenizer(tokenizer, prompt, stop)
    out = []
    for i in ids:
        out.append(detokenizer.push(i))
        if detokenizer.stopped:
            return out
    return [*out, detokenizer.flush()]


class TestDetokenizer:
    def test_a_character_comes_whole(self):
        ids = list("né 你 😀!".encode())
        out = pieces(BYTES, ids)
        assert "".join(out) == "né 你 😀!"
        assert out == ["n", "", "é", " ", "", "", "你", " ", "", "", "", "😀", "!", ""]

    def test_bytes_that_fall_back(self):
        ids = [256, *"é😀".encode(), 258, 257]
        out = pieces(PIECE, ids)
        assert out == ["Hello", "", "é", "", "", "", "😀", " ", " world", ""]

    def test_the_space_after_the_prompt_stays(self):
        assert "".join(pieces(PIECE, [257, 257], prompt=[256])) == " world world"
        assert "".join(pieces(PIECE, [257, 257])) == "world world"

    def test_an_unfinished_character_comes_at_the_end(self):
        assert pieces(BYTES, [65, 0xF0, 0x9F]) == ["A", "", "", "�"]

    def test_bytes_that_are_no_text_are_not_held_for_ever(self):
        out = pieces(BYTES, [0x80] * 200)
        assert "".join(out) == "�" * 200
        assert all(len("".join(out[:n])) >= n - 4 for n in range(200))

    def test_tokens_that_always_cut_a_character(self):
        """Every token ends in the middle of the next one's character: what is whole comes at once."""
        vocab = {0: b"\xe4\xbd", 1: b"\xa0\xe5", 2: b"\xa5\xbd\xe4\xbd", 3: b"\xa0"}

        class Cut:
            def decode(self, ids):
                return b"".join(vocab[i] for i in ids).decode(errors="replace")

        ids = [0, *[1, 2] * 60, 3]
        text = Cut().decode(ids)
        out = pieces(Cut(), ids)
        assert "".join(out) == text == "你好" * 60 + "你"
        assert out[1:5] == ["你", "好", "你", "好"]

    @given(st.text(max_size=60), st.lists(st.integers(1, 5), max_size=60))
    @settings(max_examples=150, deadline=None)
    def test_any_text_in_any_pieces(self, text, _):
        out = pieces(BYTES, list(text.encode()))
        assert "".join(out) == text
        if "�" not in text:
            assert not any("�" in piece for piece in out)

    @given(st.lists(st.integers(0, 255), max_size=80))
    @settings(max_examples=150, deadline=None)
    def test_any_bytes(self, ids):
        assert "".join(pieces(BYTES, ids)) == bytes(ids).decode(errors="replace")

    @given(st.lists(st.sampled_from(["é", "你", "😀", "x", *PIECES]), max_size=40), st.booleans())
    @settings(max_examples=150, deadline=None)
    def test_pieces_and_bytes_mixed(self, words, prompt):
        ids = []
        for word in words:
            ids += [256 + PIECES.index(word)] if word in PIECES else list(word.encode())
        before = [256] if prompt else []
        out = pieces(PIECE, ids, before)
        assert "".join(out) == PIECE.decode(before + ids)[len(PIECE.decode(before)) :]
        assert not any("�" in piece for piece in out)

    def test_special_tokens_are_not_text(self):
        assert "".join(pieces(BYTES, [72, 257, 105, 256])) == "Hi"

    def test_each_token_decodes_a_window_only(self):
        seen = []

        class Counted:
            def decode(self, ids):
                seen.append(len(ids))
                return BYTES.decode(ids)

        pieces(Counted(), list(b"a long text " * 50))
        assert max(seen) <= 4


class TestStopStrings:
    def test_across_tokens_and_with_text_held_back(self):
        out = pieces(BYTES, list(b"one STOP two"), stop=["STOP"])
        assert out == ["o", "n", "e", " ", "", "", "", ""]

    def test_what_was_held_comes_when_it_is_no_stop_string(self):
        assert pieces(BYTES, list(b"aSTa"), stop=["STOP"]) == ["a", "", "", "STa", ""]
        assert pieces(BYTES, list(b"aST"), stop=["STOP"]) == ["a", "", "", "ST"]

    def test_a_stop_string_in_the_middle_of_a_piece(self):
        stop = StopStrings(["\n\n"])
        assert stop.push("a\n\nb") == ("a", True)

    def test_the_one_that_ends_first_counts(self):
        assert StopStrings(["abcd", "bc"]).push("xabcd") == ("xa", True)
        assert StopStrings(["cd", "bcd"]).push("abcd") == ("a", True)

    def test_a_stop_string_of_unfinished_characters(self):
        assert "".join(pieces(BYTES, [65, 0xF0], stop=["�"])) == "A"

    def test_none_before_min_tokens(self):
        detokenizer = Detokenizer(BYTES, [], ["ab"])
        out = [detokenizer.push(t, may_stop=i >= 3) for i, t in enumerate(b"ababab")]
        assert (out, detokenizer.stopped) == (["a", "b", "a", "b", "", ""], True)

    @given(
        st.lists(st.sampled_from("abc"), max_size=40),
        st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
        st.data(),
    )
    @settings(max_examples=200, deadline=None)
    def test_however_the_text_is_cut(self, letters, stops, data):
        text = "".join(letters)
        finder, out, stopped, at = StopStrings(stops), "", False, 0
        while at < len(text) and not stopped:
            size = data.draw(st.integers(1, 5))
            new, stopped = finder.push(text[at : at + size])
            out, at = out + new, at + size
            assert not any(s in out for s in stops)
        out += "" if stopped else finder.flush()
        ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        assert (out, stopped) == ((text[: min(ends)[1]], True) if ends else (text, False))


class TestTokenizer:
    def test_there_and_back(self, tmp_path):
        tokenizer = saved(tmp_path)
        assert tokenizer.encode("né") == list("né".encode())
        assert tokenizer.decode([*"né".encode(), 256]) == "né"
        assert tokenizer.decode([256], skip_special_tokens=False) == "<eos>"
        assert tokenizer.vocab_size == 260
        assert (tokenizer.special_token("bos_token"), tokenizer.special_token("pad_token")) == ("<bos>", None)
        assert tokenizer.token_id("<user>") == 258

    def test_a_chat(self, tmp_path):
        tokenizer = saved(tmp_path)
        messages = [{"role": "user", "content": "Hi"}]
        assert tokenizer.apply_chat_template(messages) == "<bos><user>Hi<assistant>"
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == "<bos><user>Hi"

    def test_where_templates_are_found(self, tmp_path):
        saved(tmp_path)
        messages, files = [{"role": "user", "content": "Hi"}], ["tokenizer.json", "tokenizer_config.json"]
        named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        assert Tokenizer(tmp_path, files).apply_chat_template(messages) == "D"
        (tmp_path / "chat_template.jinja").write_text("J{{ messages[0].content }}")
        assert Tokenizer(tmp_path, [*files, "chat_template.jinja"]).apply_chat_template(messages) == "JHi"
        (tmp_path / "tokenizer_config.json").write_text("{}")
        (tmp_path / "chat_template.json").write_text('{"chat_template": "A"}')
        assert Tokenizer(tmp_path, [*files, "chat_template.json"]).apply_chat_template(messages) == "A"
        with pytest.raises(RequestError, match="this model has no chat template: give text or token ids"):
            Tokenizer(tmp_path, files).apply_chat_template(messages)

    @pytest.mark.parametrize("text", ["", "{", "{}"])
    def test_a_tokenizer_that_is_none(self, tmp_path, text):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"tokenizer.json: expected a fast tokenizer, found"):
            Tokenizer(tmp_path, ["tokenizer.json"])

    @pytest.mark.parametrize("text", ["{", "[]"])
    def test_a_config_that_is_none(self, tmp_path, text):
        saved(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"tokenizer_config.json: expected"):
            Tokenizer(tmp_path, ["tokenizer.json", "tokenizer_config.json"])


class TestChatTemplate:
    def render(self, source, **variables):
        return ChatTemplate(source, seconds=1.0, characters=10_000).render(**variables)

    def test_what_templates_use(self):
        messages = [{"role": "user", "content": " é<b> "}]
        assert self.render("{{ messages[0].content | trim | tojson }}", messages=messages) == '"é<b>"'
        assert self.render("{%- for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
        assert len(self.render("{{ strftime_now('%Y') }}")) == 4
        assert self.render("{{ '%02d|%s' % (3, 'x') }}{{ 7 % 4 }}{{ '-' * 3 }}{{ 2 * 3 }}") == "03|x3---6"
        assert self.render("{% set ns = namespace(n=0) %}{% set ns.n = 4 %}{{ ns.n }}") == "4"

    def test_a_template_may_refuse(self):
        with pytest.raises(RequestError, match="chat template refuses these messages: roles must alternate"):
            self.render("{{ raise_exception('roles must alternate') }}")

    def test_a_template_that_is_none(self):
        with pytest.raises(RequestError, match="chat template is not a jinja template: "):
            ChatTemplate("{% for %}")

    @pytest.mark.parametrize(
        "source",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.append(1) }}",
            "{{ cycler.__init__.__globals__.os.system('true') }}",
            "{{ 'x' * 100000000000 }}",
            "{{ [1] * 100000000000 }}",
            "{{ 10 ** 10 ** 10 }}",
            "{{ '%1000000000d' % 1 }}",
            "{{ '%*d' % (1000000000, 1) }}",
            "{% for i in range(99999) %}{{ 'xxxxxxxxxx' }}{% endfor %}",
            "{{ range(100000000) | list }}",
            "{{ messages[0].nothing.at_all }}",
        ],
    )
    def test_what_templates_may_not(self, source):
        with pytest.raises(RequestError, match="chat template"):
            self.render(source, messages=[{"role": "user"}])

    def test_a_template_that_takes_too_long(self):
        endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}"
        started = time.monotonic()
        with pytest.raises(RequestError, match=r"took longer than 1.0 s"):
            self.render(endless)
        assert time.monotonic() - started < 5
