"""Ways in: several sources and shares, other names for columns, splits of folders, every format that people have."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import chat_tokenizers as made
import pytest
from chat_tokenizers import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qrosa.data.columns import parse_columns
from qrosa.data.dataset import EVAL_SPLITS, Dataset, load_rows
from qrosa.data.files import SUFFIXES
from qrosa.data.sources import Draw, Source
from qrosa.errors import InputError

ROWS = [{"text": f"film number {n}"} for n in range(3)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts(source: Any, **how: Any) -> list[str]:
    tokenizer = make_tokenizer()
    data = load_rows(source, tokenizer, **{"seq_len": 64, **how})
    return [tokenizer.decode(row.input_ids).removesuffix("</s>") for row in data.rows]


def pack_zst(data: bytes) -> bytes:
    import pyarrow as arrow

    return bytes(arrow.Codec("zstd").compress(data, asbytes=True))


PLAIN = {
    ".jsonl": lines(ROWS),
    ".ndjson": lines(ROWS),
    ".json": json.dumps(ROWS).encode(),
    ".csv": b"text\n" + b"".join(f"{row['text']}\n".encode() for row in ROWS),
    ".tsv": b"id\ttext\n" + b"".join(f"7\t{row['text']}\n".encode() for row in ROWS),
}
PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": pack_zst}


@pytest.mark.parametrize("packing", [None, *PACKED])
@pytest.mark.parametrize("suffix", PLAIN)
def test_every_text_format_packed_or_not(tmp_path: Path, suffix: str, packing: str | None) -> None:
    path = tmp_path / f"rows{suffix}{packing or ''}"
    path.write_bytes(PACKED[packing](PLAIN[suffix]) if packing else PLAIN[suffix])
    assert texts(path) == [row["text"] for row in ROWS]
    assert texts(tmp_path) == [row["text"] for row in ROWS]  # found in a folder, too
    assert suffix in SUFFIXES


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"rubbish" + data])
def test_damaged_packings_are_one_clear_error(tmp_path: Path, packing: str, damage: Any) -> None:
    path = tmp_path / f"rows.jsonl{packing}"
    path.write_bytes(damage(PACKED[packing](lines(ROWS * 2000))))
    with pytest.raises(InputError, match=r"rows\.jsonl\.\w+ cannot be unpacked"):
        texts(path)


def test_a_packed_file_under_a_plain_name_is_told_how_to_be_named(tmp_path: Path) -> None:
    for packing, pack in PACKED.items():
        path = tmp_path / "rows.jsonl"
        path.write_bytes(pack(lines(ROWS)))
        with pytest.raises(InputError, match="is compressed") as caught:
            texts(path)
        assert f"rows.jsonl{packing}" in caught.value.hint


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("the film was good.\n\nthe film was bad.\n")
    assert texts(path) == ["the film was good.\n\nthe film was bad.\n"]


class TestSavedToDisk:
    """Folders and files that the ``datasets`` library writes."""

    def test_a_data_set_and_one_with_splits(self, tmp_path: Path) -> None:
        from datasets import Dataset as Saved
        from datasets import DatasetDict

        Saved.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
        DatasetDict({"train": Saved.from_list(ROWS[:2]), "test": Saved.from_list(ROWS[2:])}).save_to_disk(
            str(tmp_path / "two")
        )
        assert texts(tmp_path / "one") == [row["text"] for row in ROWS]
        assert texts(next((tmp_path / "one").glob("*.arrow"))) == [row["text"] for row in ROWS]
        assert texts(tmp_path / "two") == [row["text"] for row in ROWS[:2]]
        assert texts(tmp_path / "two", split="test") == [ROWS[2]["text"]]

    def test_files_of_its_cache_are_left_out(self, tmp_path: Path) -> None:
        from datasets import Dataset as Saved

        Saved.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
        data_file = next((tmp_path / "one").glob("*.arrow"))
        (tmp_path / "one" / "cache-1234.arrow").write_bytes(data_file.read_bytes())
        report = load_rows(tmp_path / "one", make_tokenizer(), seq_len=64).report
        assert report.rows == 3
        assert [(note.what, note.why) for note in report.unused] == [
            ("file cache-1234.arrow", "state.json does not name it")
        ]

    def test_messages_as_one_object_of_lists(self, tmp_path: Path) -> None:
        messages = {"role": ["user", "assistant"], "content": ["q", "a"]}
        path = tmp_path / "rows.jsonl"
        path.write_bytes(lines([{"messages": messages}]))
        assert load_rows(path, make_tokenizer(made.CHATML), seq_len=64).report.rows == 1


class TestFolders:
    @pytest.mark.parametrize(
        ("names", "read", "left"),
        [
            (["train.jsonl", "extra.jsonl"], ["train.jsonl"], ["extra.jsonl"]),
            (["reviews.jsonl", "dev_docs.jsonl", "test.jsonl"], ["reviews.jsonl"], ["dev_docs.jsonl", "test.jsonl"]),
            (["train.jsonl", "holdout.jsonl"], ["train.jsonl"], ["holdout.jsonl"]),
            (["a.jsonl", "b.jsonl.gz"], ["a.jsonl", "b.jsonl.gz"], []),
        ],
    )  # fmt: skip
    def test_files_that_are_read_and_files_that_are_not(
        self, tmp_path: Path, names: list[str], read: list[str], left: list[str]
    ) -> None:
        for name in names:
            (tmp_path / name).write_bytes(gzip.compress(lines(ROWS)) if name.endswith(".gz") else lines(ROWS))
        report = load_rows(tmp_path, make_tokenizer(), seq_len=64).report
        assert [Path(file).name for file in report.files] == read
        assert [note.what for note in report.unused] == [f"file {name}" for name in left]
        assert all(note.why and note.unit == "files" and note.first for note in report.unused)

    def test_files_that_hold_no_rows(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))
        for name in ("README.md", "photo.png", "requirements.txt"):
            (tmp_path / name).write_text("x")
        report = load_rows(tmp_path, make_tokenizer(), seq_len=64).report
        assert {(note.what, note.count) for note in report.unused} == {("other files", 2), ("text files", 1)}

    def test_rows_to_evaluate_on_fall_back_to_validation(self, tmp_path: Path) -> None:
        for number, name in enumerate(("train.jsonl", "validation.jsonl")):
            (tmp_path / name).write_bytes(lines([ROWS[number]]))
        assert texts(tmp_path, split=EVAL_SPLITS) == [ROWS[1]["text"]]
        (tmp_path / "test.jsonl").write_bytes(lines([ROWS[2]]))
        assert texts(tmp_path, split=EVAL_SPLITS) == [ROWS[2]["text"]]
        with pytest.raises(InputError, match="no train files"):
            (tmp_path / "train.jsonl").unlink()
            texts(tmp_path)


class TestSeveral:
    def load(self, tmp_path: Path, *names: str, **how: Any) -> Dataset:
        for number, letter in enumerate("ab"):
            rows = [{"text": f"{letter} {n}"} for n in range(100 * (number + 1))]
            (tmp_path / f"{letter}.jsonl").write_bytes(lines(rows))
        return load_rows([str(tmp_path / name) for name in names], make_tokenizer(), seq_len=64, **how)

    def test_all_are_read_in_their_order(self, tmp_path: Path) -> None:
        data = self.load(tmp_path, "a.jsonl", "b.jsonl")
        assert len(data) == data.report.read == 300
        assert data.rows[0].where.endswith("a.jsonl:1") and data.rows[100].where.endswith("b.jsonl:1")
        assert [Path(file).name for file in data.report.files] == ["a.jsonl", "b.jsonl"]

    @pytest.mark.parametrize(("share", "taken"), [("0.3", 60), ("30%", 60), ("1", 200), ("0.005", 1)])
    def test_a_share_is_exact_and_told(self, tmp_path: Path, share: str, taken: int) -> None:
        data = self.load(tmp_path, "a.jsonl", f"b.jsonl={share}")
        assert len(data) == 100 + taken and data.report.read == 300
        assert [note.count for note in data.report.unused] == ([200 - taken] if taken < 200 else [])

    def test_a_share_is_drawn_by_seed(self, tmp_path: Path) -> None:
        places = [[row.where for row in self.load(tmp_path, "b.jsonl=0.3", seed=seed).rows] for seed in (1, 1, 2)]
        assert places[0] == places[1] != places[2]

    def test_sources_may_be_of_different_kinds(self, tmp_path: Path) -> None:
        (tmp_path / "c.jsonl").write_bytes(lines([{"prompt": "p", "completion": "c"}]))
        data = self.load(tmp_path, "a.jsonl", "c.jsonl")
        assert data.report.kind == "text, prompt-completion" and len(data) == 101

    @pytest.mark.parametrize("name", ["a.jsonl=0", "a.jsonl=150%", "a.jsonl=-1"])
    def test_shares_that_are_none(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(InputError):
            self.load(tmp_path, name)

    def test_names_with_an_equals_sign(self, tmp_path: Path) -> None:
        (tmp_path / "lr=0.3").write_text("")
        assert Source.parse(str(tmp_path / "lr=0.3")) == Source(str(tmp_path / "lr=0.3"))
        assert Source.parse("run=b/rows.jsonl") == Source("run=b/rows.jsonl")
        assert Source.parse("run=b/rows.jsonl=0.5") == Source("run=b/rows.jsonl", 0.5)


@settings(deadline=None)
@given(share=st.floats(0.01, 1), blocks=st.lists(st.integers(1, 50), max_size=8), seed=st.integers(0, 9))
def test_a_draw_takes_its_share_of_all_blocks_together(share: float, blocks: list[int], seed: int) -> None:
    draw = Draw(share, (seed, 0))
    taken = [draw.places(rows) for rows in blocks]
    for places, rows in zip(taken, blocks, strict=True):
        assert places == sorted(set(places)) and all(place < rows for place in places)
    assert abs(sum(map(len, taken)) - share * sum(blocks)) <= 1


class TestColumns:
    def test_other_names(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(lines([{"question": "q", "answer": "a", "id": 1}]))
        data = load_rows(path, make_tokenizer(made.CHATML), seq_len=64, columns="prompt=question,completion=answer")
        assert data.report.kind == "prompt-completion"
        assert [note.what for note in data.report.unused] == ["column 'id'"]

    def test_columns_of_tables(self, tmp_path: Path) -> None:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        parquet.write_table(arrow.Table.from_pylist([{"body": "the film", "n": 1}] * 5), tmp_path / "t.parquet")
        data = load_rows(tmp_path / "t.parquet", make_tokenizer(), seq_len=64, columns="text=body")
        assert len(data) == 5
        assert [(note.what, note.count) for note in data.report.unused] == [("column 'n'", 5)]

    @pytest.mark.parametrize(
        ("columns", "said"),
        [
            ("prompt=q,completion=a", "--columns names 'q', and the row has 'question', 'answer'"),
            ("prompt", "is not a list of names"),
            ("=question", "is not a list of names"),
            ("head=question", "names 'head', which no kind of row has"),
            ("prompt=question,prompt=answer", "names 'prompt' twice"),
        ],
    )
    def test_names_that_are_not_there(self, tmp_path: Path, columns: str, said: str) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(lines([{"question": "q", "answer": "a"}]))
        with pytest.raises(InputError) as caught:
            load_rows(path, make_tokenizer(), seq_len=64, columns=columns)
        assert said in caught.value.message and caught.value.hint

    def test_unknown_rows_are_told_of_it(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(lines([{"question": "q", "answer": "a"}]))
        with pytest.raises(InputError, match="no known kind") as caught:
            load_rows(path, make_tokenizer(), seq_len=64)
        assert "--columns" in caught.value.hint and parse_columns("prompt=question") == {"prompt": "question"}


def test_a_long_text_is_every_token_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = "the film was good and the story was bad too " * 50
    path.write_bytes(lines([{"text": text}, {"text": "short"}]))
    for adds_bos in (False, True):
        tokenizer = make_tokenizer(adds_bos=adds_bos)
        whole = load_rows(path, tokenizer, seq_len=10_000).rows[0].input_ids
        for seq_len in (7, len(whole) - 1, len(whole)):
            data = load_rows(path, tokenizer, seq_len=seq_len)
            pieces = [row for row in data.rows if row.where.startswith(f"{path}:1")]
            assert [token for row in pieces for token in row.input_ids] == whole
            assert all(2 <= len(row.input_ids) <= seq_len for row in pieces)
            assert all(row.supervised_tokens == len(row.input_ids) - 1 for row in pieces)
            assert data.report.truncated == 0 and data.report.read == 2
