"""``qrosa generate``: one answer, or a chat, on the terminal as it is made.

The text goes to stdout and everything else to stderr, so that an answer can be piped on.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from qrosa.cli.answers import answers
from qrosa.cli.loading import base_option, load, offload_option, open_source
from qrosa.cli.options import device_option, emit_json, json_option, progress_console
from qrosa.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from qrosa.eval.generate import Answer, Chat

_EXAMPLES = """\b
Examples:
  qrosa generate run --prompt "Name three rivers."
  qrosa generate run --chat --system "Answer in one sentence." --temperature 0.7 --top-p 0.9
  qrosa generate ./base-model --raw --prompt "Once upon a time" --max-new-tokens 50
"""
_CHAT_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


@click.command(epilog=_EXAMPLES)
@click.argument("source", metavar="RUN-OR-MODEL")
@click.option("--prompt", metavar="TEXT", help="What to answer, or with --raw to go on from.")
@click.option("--chat", is_flag=True, help="Talk in turns; each answer sees all that was said before.")
@click.option("--system", metavar="TEXT", help="System message, for models whose template takes one.")
@click.option(
    "--chat-template", metavar="FILE", help="A chat template to use instead of the model's own.", default=None
)
@click.option("--raw", is_flag=True, help="Give the prompt to the model as it is, without the chat template.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True, metavar="N", help="Longest answer.")
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token; above 0 samples."
)
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample among the likeliest tokens only.")
@click.option("--seed", type=int, metavar="N", help="Makes sampling repeatable.")
@base_option
@device_option
@offload_option
@json_option
def command(
    source: str,
    prompt: str | None,
    chat: bool,
    system: str | None,
    chat_template: str | None,
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    base_model: str | None,
    device: str | None,
    offload: str,
    as_json: bool,
) -> None:
    """Answer a prompt, or chat.

    The prompt goes through the model's chat template where it has one.
    """
    _check(prompt, chat=chat, raw=raw, as_json=as_json)
    from qrosa.eval import generate
    from qrosa.eval.generate import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    console = progress_console()
    opened = open_source(source, base_model)
    tokenizer = opened.tokenizer(chat_template)
    model = load(opened, device, console, offload)
    if chat:
        _talk(generate.Chat(model, tokenizer, sampling, system), console)
        return
    started = time.monotonic()
    on_text = None if as_json else _print_piece
    answer = generate.generate(model, tokenizer, prompt or "", sampling, system=system, raw=raw, on_text=on_text)
    seconds = time.monotonic() - started
    if as_json:
        emit_json(_document(prompt, answer, seconds))
        return
    click.echo(file=answers())
    _say_speed(console, answer, seconds)
    if answer.interrupted:
        raise KeyboardInterrupt


def _check(prompt: str | None, *, chat: bool, raw: bool, as_json: bool) -> None:
    if chat and prompt is not None:
        raise InputError("--chat and --prompt contradict each other", "give one of them")
    if not chat and not prompt:
        raise InputError("there is nothing to answer", "give --prompt TEXT, or --chat")
    if chat and raw:
        raise InputError("--chat needs the chat template that --raw leaves out", "use --raw with --prompt")
    if chat and as_json:
        raise InputError("--chat cannot print one JSON document", "use --json with --prompt")


def _talk(chat: Chat, console: Console) -> None:
    """Turns from stdin until it ends; a fault in one turn does not end the conversation."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        console.print(_CHAT_HELP, style="dim", markup=False)
    while (said := _next_turn(at_terminal)) is not None:
        if not said:
            continue
        if said == "/exit":
            break
        if said == "/reset":
            chat.reset()
            console.print("the conversation is forgotten", style="dim")
            continue
        if said.startswith("/"):
            console.print(f"no such command {said.split()[0]!r}: {_CHAT_HELP}", markup=False)
            continue
        started = time.monotonic()
        try:
            answer = chat.say(said, _print_piece)
        except InputError as error:
            console.print(f"error: {error.message}\nhint: {error.hint}", markup=False)
            continue
        click.echo(file=answers())
        _say_speed(console, answer, time.monotonic() - started)


def _next_turn(at_terminal: bool) -> str | None:
    """A line, or None at the end of the input or on Ctrl-C."""
    try:
        return (input("> ") if at_terminal else input()).strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _print_piece(text: str) -> None:
    click.echo(text, nl=False, file=answers())
    answers().flush()


def _say_speed(console: Console, answer: Answer, seconds: float) -> None:
    if console.is_terminal and seconds > 0:
        console.print(f"{answer.tokens} tokens, {answer.tokens / seconds:.1f} tokens/s", style="dim")


def _document(prompt: str | None, answer: Answer, seconds: float) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": answer.text,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "finished": answer.finished,
        "seconds": seconds,
        "tokens_per_s": answer.tokens / seconds if seconds > 0 else None,
    }
