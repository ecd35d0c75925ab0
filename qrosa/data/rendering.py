"""A chat template as code that came with a model: read for what it uses, and run within bounds.

transformers runs templates in jinja's sandbox, which keeps them from the file system and from Python's insides, but a
template may still run forever or fill the memory: two nested loops over ``range(99999)``, a text that doubles itself.
So each rendering has :data:`SECONDS` of the processor (where it runs in the main thread; a signal ends it) and
:data:`EXTRA_BYTES` of memory beyond what the process has, and may write :data:`MOST_CHARACTERS` for each character of
the row. Powers of numbers, the one operation that no signal can end, are not run at all; no template needs them.

Some templates (Llama 3, gpt-oss) write today's date. Here the clock stands still: the same rows must give the same
tokens tomorrow, or a run could not be resumed.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from qrosa.data.messages import Message
from qrosa.errors import InputError, StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
EXTRA_BYTES = 2**30
MOST_CHARACTERS = 64
_LEAST_CHARACTERS = 2**20  # what any row may become, system prompts and tools included
# Shadows the function of the same name that transformers gives to templates; the date is Llama 3's own default.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}"
    "{% if format == '%Y-%m-%d' %}2024-07-26{% else %}26 Jul 2024{% endif %}{% endmacro %}"
)


class RefusedError(InputError):
    """The template's own code did not take the messages: part of a conversation may be none to it."""


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: What is tokenised.
        spans: Character ranges of ``text`` that are learnt, ascending, none empty.
        add_bos: Whether BOS goes before it, if the tokenizer adds one.
        add_eos: Whether EOS goes behind it.
        skipped: Assistant turns that should have been learnt and could not be.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    add_bos: bool = False
    add_eos: bool = False
    skipped: int = 0


class Renderer:
    """Runs a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._sources: dict[bool, str] = {}

    def names(self, tools: list[Any] | None = None) -> frozenset[str]:
        """Every variable, attribute, key and text that the template's code mentions."""
        return _names(self.source(tools))

    def source(self, tools: list[Any] | None = None) -> str:
        """The template that serves rows with or without tools.

        Raises:
            InputError: There are several, none of them the default; or it cannot be run within bounds.
        """
        known = self._sources.get(tools is not None)
        if known is not None:
            return known
        try:
            source = self._tokenizer.get_chat_template(None, tools)
        except ValueError:
            message = "the model's tokenizer has several chat templates, none of them the default"
            raise InputError(message, "name one of them 'default', or give a template with --chat-template") from None
        _names(source)  # before it is compiled: compiling computes what is constant
        whole = _FIXED_DATE + source if "strftime_now" in source else source
        return self._sources.setdefault(tools is not None, whole)

    def render(self, messages: list[Message], tools: list[Any] | None, where: str, ask: bool = False) -> str:
        """The text of a conversation; with ``ask``, what asks for the next answer goes behind it.

        Raises:
            RefusedError: The template does not take these messages.
            InputError: It runs out of its bounds.
        """
        source = self.source(tools)
        with _bounded(where):
            text = self._tokenizer.apply_chat_template(
                messages, tools, chat_template=source, tokenize=False, add_generation_prompt=ask
            )
        return _not_too_long(str(text), messages, where)

    def attempt(self, messages: list[Message], tools: list[Any] | None, ask: bool = False) -> str | None:
        """As :meth:`render`; None where the template refuses."""
        try:
            return self.render(messages, tools, "a part of a row", ask)
        except RefusedError:
            return None

    def render_marked(
        self, messages: list[Message], tools: list[Any] | None, where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character ranges that the template's ``{% generation %}`` markers hold.

        Raises:
            RefusedError: The template does not take these messages.
            InputError: It runs out of its bounds.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {"chat_template": self.source(tools), "tools": tools}
        options.update(self._tokenizer.special_tokens_map)
        with _bounded(where):
            rendered: Any = render_jinja_template(
                [messages], return_assistant_tokens_mask=True, **options
            )  # annotated as text, in fact a pair: texts, character ranges
        [text], [marks] = rendered
        return _not_too_long(str(text), messages, where), [(start, end) for start, end in marks]


def read_template(path: str | Path) -> str:
    """A chat template out of a file: its text, or the ``chat_template`` of a ``tokenizer_config.json``.

    Raises:
        InputError: No such file, no template in it, or one that is no jinja.
        StorageError: It cannot be read.
    """
    import json

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"--chat-template {path} does not exist", "give a file that holds a jinja template") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"--chat-template {path} cannot be read: {error}", "check the file") from None
    if text.lstrip().startswith("{") and str(path).endswith(".json"):
        try:
            text = json.loads(text)["chat_template"]
        except (ValueError, KeyError, TypeError):
            text = ""
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"--chat-template {path} holds no template", "give a file that holds a jinja template")
    _names(text)
    return text


@lru_cache(maxsize=8)
def _names(source: str) -> frozenset[str]:
    from jinja2 import Environment, TemplateError, nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  jinja asks for it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        tree = Environment(extensions=[Generation, "jinja2.ext.loopcontrols"], autoescape=False).parse(source)
    except (TemplateError, RecursionError) as error:
        raise InputError(f"the chat template is not sound jinja: {_clean(error)}", "mend it, or give another") from None
    if tree.find(nodes.Pow):
        raise InputError("the chat template computes powers, which nothing bounds", "give another with --chat-template")
    found = {node.name for node in tree.find_all(nodes.Name)} | {node.attr for node in tree.find_all(nodes.Getattr)}
    return frozenset(found | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)})


@contextmanager
def _bounded(where: str) -> Iterator[None]:
    """Run a template's code: within its bounds, its own errors as refusals."""
    hint = "the template may be broken or hostile: give another with --chat-template"
    try:
        with _time_limit(), _memory_limit():
            yield
    except _OutOfTimeError:
        raise InputError(f"{where}: the chat template ran for over {SECONDS:g} seconds", hint) from None
    except MemoryError:
        raise InputError(f"{where}: the chat template took over {EXTRA_BYTES >> 20} MB", hint) from None
    except Exception as error:  # whatever a template's own code raises
        message = f"{where}: the model's chat template refuses this conversation: {_clean(error)}"
        advice = "check the roles and their order (most templates want user and assistant in turn)"
        raise RefusedError(message, f"{advice}, or give another template with --chat-template") from None


class _OutOfTimeError(BaseException):
    """Not an ``Exception``: nothing that a template calls may take it for its own."""


@contextmanager
def _time_limit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _OutOfTimeError

    before, begun = signal.signal(signal.SIGPROF, stop), time.process_time()
    left, interval = signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        if left:  # somebody else's timer, which has gone on running meanwhile
            signal.setitimer(signal.ITIMER_PROF, max(left - (time.process_time() - begun), 1e-3), interval)


@contextmanager
def _memory_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + EXTRA_BYTES
    if soft != resource.RLIM_INFINITY and soft <= limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    """Bytes of this process's address space, read without a file object: this runs twice a row."""
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(file, 64).split()[0]) * resource.getpagesize()
    finally:
        os.close(file)


def _not_too_long(text: str, messages: list[Message], where: str) -> str:
    if len(text) <= _LEAST_CHARACTERS:
        return text
    given = sum(len(str(message)) for message in messages)
    if len(text) > MOST_CHARACTERS * given:
        message = f"{where}: the chat template writes {len(text):,} characters for a row of {given:,}"
        raise InputError(message, "the template may be broken or hostile: give another with --chat-template")
    return text


def _clean(error: Exception) -> str:
    """A template's words on one line, without the control characters that a terminal would obey."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in text)[:300]
