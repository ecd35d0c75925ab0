"""A data set: what is kept, cut, dropped and counted, and how it is split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_tokenizers as made
import pytest
from chat_tokenizers import make_tokenizer, turns

from qrosa.data.dataset import Dataset, load_rows
from qrosa.data.encode import IGNORE, EncodedRow
from qrosa.errors import InputError


@pytest.fixture
def rows_file(tmp_path: Path) -> Any:
    def write(*rows: dict[str, Any]) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def plain_rows(count: int) -> list[EncodedRow]:
    return [EncodedRow([n, n + 1, n + 2], [IGNORE, n + 1, n + 2], where=f"f:{n}") for n in range(count)]


def test_rows_are_counted(rows_file: Any) -> None:
    tokenizer = make_tokenizer(made.CHATML)
    path = rows_file(
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": "the film " * 100},
        {"prompt": "the film " * 100, "completion": "a"},
    )
    data = load_rows(path, tokenizer, seq_len=32)
    assert [row.where for row in data.rows] == [f"{path}:1", f"{path}:2"]
    report = data.report
    assert (report.rows, report.truncated, report.dropped, report.longest) == (2, 1, 1, 32)
    assert report.kind == "prompt-completion"
    assert report.tokens == sum(data.lengths) == sum(len(row.input_ids) for row in data.rows)
    assert report.supervised_tokens == sum(label != IGNORE for row in data.rows for label in row.labels)
    assert len(data) == 2


def test_turns_that_the_template_rewrites_are_counted(rows_file: Any) -> None:
    thought = "<think>\nhm\n</think>\n\n"
    path = rows_file({"messages": turns("q1", thought + "a1", "q2", "a2")})
    assert load_rows(path, make_tokenizer(made.THINKING), seq_len=99).report.skipped_turns == 1


def test_limit_and_more_rows_than_a_chunk(rows_file: Any) -> None:
    path = rows_file(*({"text": f"film number {n}"} for n in range(2500)))
    tokenizer = make_tokenizer()
    data = load_rows(path, tokenizer, seq_len=64)
    assert len(data) == 2500
    assert tokenizer.decode(data.rows[2400].input_ids) == "film number 2400</s>"
    assert len(load_rows(path, tokenizer, seq_len=64, limit=7)) == 7


def test_one_malformed_row_stops_the_load(rows_file: Any) -> None:
    path = rows_file(*[{"text": "film"}] * 3, {"text": 4})
    with pytest.raises(InputError, match=r"rows\.jsonl:4: 'text' is a number"):
        load_rows(path, make_tokenizer(), seq_len=64)


class TestNothingToLearn:
    def test_prompts_that_fill_the_row(self, rows_file: Any) -> None:
        path = rows_file({"prompt": "the film " * 99, "completion": "a"})
        with pytest.raises(InputError, match=r"none of 1 rows has a token to learn: .* fill 16 tokens") as caught:
            load_rows(path, make_tokenizer(), seq_len=16)
        assert "--seq-len" in caught.value.hint

    def test_chats_without_an_answer(self, rows_file: Any) -> None:
        path = rows_file({"messages": turns("q")}, {"messages": turns("q2")})
        with pytest.raises(InputError, match="they hold no answer"):
            load_rows(path, make_tokenizer(made.CHATML), seq_len=64)

    def test_a_template_that_drops_the_answers(self, rows_file: Any) -> None:
        """Its generation prompt never comes before an answer, nor is the answer's text kept."""
        source = made.OPEN_THOUGHT.replace("message['content']", "message['content'].split('</think>')[-1]")
        path = rows_file({"messages": turns("q", "<think>\nhm\n</think>a", "q2", "<think>\nhm\n</think>b")})
        report = load_rows(path, make_tokenizer(source), seq_len=64).report
        assert (
            report.rows == 1 and report.skipped_turns == 1
        )  # the last answer is put together, the first is not asked for


class TestSplit:
    def test_every_row_lands_on_one_side_in_order(self) -> None:
        data = Dataset.from_rows(plain_rows(100), "text", dropped=3)
        rest, held_out = data.split(0.05, seed=1)
        assert (len(rest), len(held_out)) == (95, 5)
        assert (rest.report.dropped, held_out.report.dropped) == (3, 0)
        numbers = [[row.input_ids[0] for row in part.rows] for part in (rest, held_out)]
        assert sorted(numbers[0] + numbers[1]) == list(range(100))
        assert all(part == sorted(part) for part in numbers)

    def test_the_seed_decides(self) -> None:
        data = Dataset.from_rows(plain_rows(50), "text")
        assert data.split(0.2, seed=1) == data.split(0.2, seed=1)
        assert data.split(0.2, seed=1) != data.split(0.2, seed=2)

    def test_a_small_share_holds_out_one_row(self) -> None:
        assert len(Dataset.from_rows(plain_rows(3), "text").split(0.01, seed=1)[1]) == 1

    @pytest.mark.parametrize(("count", "share"), [(1, 0.5), (2, 0.9), (10, 0.0), (10, 1.0)])
    def test_a_side_without_rows_is_refused(self, count: int, share: float) -> None:
        with pytest.raises(InputError, match="leaves none on one side"):
            Dataset.from_rows(plain_rows(count), "text").split(share, seed=1)


def test_the_fingerprint_sees_every_token_label_and_boundary() -> None:
    def fingerprint(*rows: tuple[list[int], list[int]]) -> str:
        return Dataset.from_rows([EncodedRow(ids, labels) for ids, labels in rows], "text").fingerprint()

    base = fingerprint(([1, 2, 3], [IGNORE, 2, 3]), ([4], [IGNORE]))
    assert base == fingerprint(([1, 2, 3], [IGNORE, 2, 3]), ([4], [IGNORE]))
    others = {
        fingerprint(([1, 2, 4], [IGNORE, 2, 4]), ([4], [IGNORE])),
        fingerprint(([1, 2, 3], [IGNORE, IGNORE, 3]), ([4], [IGNORE])),
        fingerprint(([4], [IGNORE]), ([1, 2, 3], [IGNORE, 2, 3])),
        fingerprint(([1, 2, 3, 4], [IGNORE, 2, 3, IGNORE])),
    }
    assert len(others) == 4 and base not in others
