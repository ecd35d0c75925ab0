"""What an error carries to people."""

from __future__ import annotations

from qrosa.errors import InputError


def test_an_endless_value_leaves_a_message_of_one_screen() -> None:
    error = InputError(f"rows.jsonl:3: {'9' * 5000} is no text", "quote it")
    assert len(error.message) < 1000 and str(error) == error.message
    assert error.message.startswith("rows.jsonl:3: 999") and error.message.endswith("is no text")


def test_other_messages_stay_as_they_are() -> None:
    assert InputError("rows.jsonl has no rows", "add some").message == "rows.jsonl has no rows"
