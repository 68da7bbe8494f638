"""Between text and tokens: the tokenizer that travels with an artifact, chat templates, text that grows by tokens."""

import ctypes
import datetime
import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import ArtifactError, RequestError

_UNCERTAIN = "�"  # what a decoder writes for bytes that are no character (yet)
_LONGEST = 3  # a character takes four bytes: three tokens at most are a part of one
_WINDOW = 32  # tokens that are decoded again, at most


class Tokenizer:
    """The artifact's tokenizer (a `tokenizers` one) with its special tokens and chat template."""

    def __init__(self, folder: Path, files: Sequence[str]):
        """files: those of the artifact. Raises ArtifactError when tokenizer.json can't be read."""
        import tokenizers  # here, so that `import llmc` stays quick

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise ArtifactError(f"{folder / 'tokenizer.json'}: expected a fast tokenizer, found: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = _json(folder / "tokenizer_config.json") if "tokenizer_config.json" in files else {}
        template = self._config.get("chat_template")
        if "chat_template.jinja" in files:
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        elif template is None and "chat_template.json" in files:
            template = _json(folder / "chat_template.json").get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default", next(iter(named.values()), None))
        self.chat_template: str | None = template
        self._compiled: Any = None

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token given as it stands in the vocabulary; None if there is none."""
        return self._tokenizer.token_to_id(token)

    def special_token(self, name: str) -> str | None:
        """The text of bos_token, eos_token, pad_token, …; None if the tokenizer has none."""
        token = self._config.get(name)
        return token.get("content") if isinstance(token, dict) else token

    def apply_chat_template(
        self, messages: Sequence[dict], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a chat, as the model was trained to read it. Raises RequestError: no template, or it refuses or
        fails on these messages, or takes too long."""
        if self.chat_template is None:
            raise RequestError("this model has no chat template: give text or token ids instead of messages")
        if self._compiled is None:
            self._compiled = ChatTemplate(self.chat_template)
        names = [n for n in self._config if n.endswith("_token")]
        special = {name: self.special_token(name) for name in names if self.special_token(name) is not None}
        return self._compiled.render(
            messages=messages, add_generation_prompt=add_generation_prompt, **{**special, **variables}
        )


def _json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: expected JSON, found {error}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found a {type(data).__name__}")
    return data


class ChatTemplate:
    """A jinja template in a sandbox: it may not change what it is given, reach into Python, take long or grow large."""

    def __init__(self, source: str, seconds: float = 5.0, characters: int = 1 << 24):
        """Raises RequestError when the template is not one. seconds, characters: the limits of a rendering."""
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Environment(ImmutableSandboxedEnvironment):
            # One operation in C can't be interrupted and must not be large: those that multiply are looked at first.
            intercepted_binops = frozenset(("*", "**", "%"))

            def call_binop(self, context, operator, left, right):
                if not _small(operator, left, right, characters):
                    raise jinja2.sandbox.SecurityError(f"{operator} on these values is not allowed")
                return super().call_binop(context, operator, left, right)

        environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._seconds, self._characters = seconds, characters
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise RequestError(f"the model's chat template is not a jinja template: {error}") from error

    def render(self, **variables: Any) -> str:
        result: list = []

        def work():
            try:
                pieces, length = [], 0
                for piece in self._template.generate(**variables):
                    pieces.append(piece)
                    length += len(piece)
                    if length > self._characters:
                        raise ValueError(f"it wrote more than {self._characters} characters")
                result.append("".join(pieces))
            except BaseException as error:
                result.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self._seconds)
        if thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeoutError)
            )
            raise RequestError(f"the model's chat template took longer than {self._seconds} s; it was stopped")
        if isinstance(result[0], BaseException):
            raise RequestError(f"the model's chat template refuses these messages: {result[0]}") from result[0]
        return result[0]


def _small(operator: str, left: Any, right: Any, limit: int) -> bool:
    """Whether the result of an operation stays within the limit, as far as can be told without doing it."""
    if operator == "**":
        return False
    if isinstance(left, str | bytes) and operator == "%":  # formatting: widths are unbounded
        return not re.search(r"\d{4}|\*", str(left))
    sized = [x for x in (left, right) if hasattr(x, "__len__")]
    times = [x for x in (left, right) if isinstance(x, int)]
    return not sized or not times or len(sized[0]) * times[0] <= limit


def _raise_exception(message: str):
    import jinja2

    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
    """As transformers has it: jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Detokenizer:
    """The text of an answer as its tokens come: never half a character, and never a stop string.

    A decoder may look at neighbours (sentencepiece drops the first space, bytes join to characters), so a window of
    tokens is decoded again with each new one, starting a little before the text that is certain. What a decoder writes
    as U+FFFD at the end may become a character yet and is held back; so is what may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._decode = tokenizer.decode
        self._ids = [int(i) for i in prompt[-6:]]
        text = self._decode(self._ids) if self._ids else ""
        self._said = len(text.rstrip(_UNCERTAIN))  # characters of the window's text that were given out
        self._certain = len(self._ids)  # the window's tokens up to here made whole characters
        self._stop = StopStrings(stop) if stop else None
        self.stopped = False

    def push(self, token: int, may_stop: bool = True) -> str:
        """One more token -> the text that is certain now. Sets `stopped` if a stop string came up and may_stop."""
        self._ids.append(token)
        text = self._decode(self._ids)
        bare = text.rstrip(_UNCERTAIN)
        certain = len(bare)
        if len(self._ids) - self._certain > _LONGEST:  # a longer row of U+FFFD is what it says
            certain = max(certain, len(text) - _LONGEST)
        new, self._said = text[self._said : certain], max(self._said, certain)
        if bare is text or len(bare) == len(text):
            self._ids = self._ids[self._certain :]
            self._certain = len(self._ids)
            self._said = len(self._decode(self._ids))
        elif len(self._ids) > _WINDOW:
            self._shorten(len(text) - self._said)
        return self._through(new, may_stop)

    def _shorten(self, held: int) -> None:
        """Go on with a shorter window whose text ends in the same `held` characters, all of them U+FFFD."""
        ids = self._ids[-_WINDOW // 4 :]
        self._said = max(0, len(self._decode(ids)) - held)
        self._certain = max(0, self._certain - (len(self._ids) - len(ids)))
        self._ids = ids

    def flush(self) -> str:
        """The answer is over -> what was held back."""
        text = self._decode(self._ids)[self._said :] if self._ids else ""
        self._said += len(text)
        if self._stop is None or self.stopped:
            return "" if self.stopped else text
        text, self.stopped = self._stop.push(text)
        return text if self.stopped else text + self._stop.flush()

    def _through(self, text: str, may_stop: bool) -> str:
        if self._stop is None or (not text and not self._stop.held):
            return text
        if not may_stop:
            return self._stop.flush() + text
        text, self.stopped = self._stop.push(text)
        return text


class StopStrings:
    """Looks for stop strings in text that comes in pieces, however it is cut. The one that ends first counts."""

    def __init__(self, strings: Sequence[str]):
        self._strings = tuple(strings)
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """-> the text that is certain now, and whether a stop string ended it."""
        text = self.held + text
        found = [(at + len(s), at) for s in self._strings if (at := text.find(s)) >= 0]
        if found:
            self.held = ""
            return text[: min(found)[1]], True
        keep = max(_overlap(text, s) for s in self._strings)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """No stop string comes any more -> what was held back."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text that is a beginning of the stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
