"""Chat templates are code that came with a model: what they may not do, and what they cost at most."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import chat_tokenizers as made
import pytest
from chat_tokenizers import make_tokenizer, turns

from qrosa.data import rendering
from qrosa.data.chat_template import ChatTemplate
from qrosa.data.formats import Conversation
from qrosa.data.rendering import read_template
from qrosa.errors import InputError, StorageError

GROWS = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# Harmless for the few words that a template is first tried with, hostile for a row.
LATE = "{% if 'now' in messages[0].content %}HOSTILE{% endif %}" + made.CHATML


def render(template: str, text: str = "now") -> Any:
    return ChatTemplate(make_tokenizer(template)).render(Conversation(turns(text, "a")), "f:1")


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        (LOOPS, "ran for over"),
        (GROWS, " over "),  # of memory or of time, whichever comes first
        ("{{ 'x' * 10000000000 }}", "took over"),
        ("{{ 'x' * 3000000 }}", "writes 3,"),
        ("{{ 10 ** 10 ** 10 }}", "computes powers"),
        ("{{ range(10000000000) | list }}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ undefined.__globals__ }}", "refuses this conversation"),
        ("{% include '/etc/passwd' %}", "refuses this conversation"),
    ],
)
@pytest.mark.parametrize("late", [True, False])
def test_hostile_templates_are_refused_within_bounds(
    monkeypatch: pytest.MonkeyPatch, hostile: str, said: str, late: bool
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 3)
    monkeypatch.setattr(rendering, "EXTRA_BYTES", 2**28)
    template = LATE.replace("HOSTILE", hostile) if late else hostile + made.CHATML
    with pytest.raises(InputError) as caught:
        render(template)
    assert said in caught.value.message and caught.value.hint


def test_limits_are_gone_afterwards_and_others_timers_go_on() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)
    ours = signal.setitimer(signal.ITIMER_PROF, 500)
    render(made.CHATML)
    left, _ = signal.setitimer(signal.ITIMER_PROF, *ours)
    assert 400 < left < 501  # the kernel counts in ticks
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)) == before


def test_other_threads_may_render() -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(render(made.CHATML)))
    thread.start()
    thread.join()
    assert found[0].spans


def test_a_templates_words_cannot_move_the_terminal() -> None:
    template = "{{ raise_exception('\x1b]0;title\x07' ~ '\x1b[2J') }}"
    with pytest.raises(InputError) as caught:
        render(template)
    assert caught.value.message.isprintable()


class TestFiles:
    def test_a_template_and_a_config_that_holds_one(self, tmp_path: Path) -> None:
        (tmp_path / "a.jinja").write_text(made.CHATML)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": made.CHATML}))
        assert read_template(tmp_path / "a.jinja") == read_template(tmp_path / "tokenizer_config.json") == made.CHATML

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("a.jinja", "{% for message in messages %}", "not sound jinja"),
            ("a.jinja", "  \n", "holds no template"),
            ("a.json", '{"other": 1}', "holds no template"),
            ("a.json", "{", "holds no template"),
            ("a.jinja", "{{ 2 ** 3 }}", "computes powers"),
        ],
    )
    def test_files_that_hold_none(self, tmp_path: Path, name: str, content: str, said: str) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=said):
            read_template(tmp_path / name)

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            read_template(tmp_path / "none.jinja")
        (tmp_path / "a.jinja").write_bytes(b"\xff\xfe")
        with pytest.raises(StorageError, match="cannot be read"):
            read_template(tmp_path / "a.jinja")
