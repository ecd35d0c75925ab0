"""Records out of files: every format, every encoding fault, folders and their splits."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from qrosa.data.sources import read_records
from qrosa.errors import InputError, QrosaError, StorageError

ROWS = [
    {"prompt": "a, b", "completion": "1"},
    {"prompt": 'line\none "quoted"', "completion": "zwölf 🙂"},
    {"prompt": "", "completion": "x"},
]
COLUMNS = {"prompt", "completion"}


def records(source: str | Path, split: str = "train") -> list[tuple[dict[str, Any], str]]:
    return list(read_records(source, split=split, columns=COLUMNS))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def as_jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    sources = [
        write(tmp_path / "a.jsonl", as_jsonl(ROWS)),
        write(tmp_path / "a.json", json.dumps(ROWS)),
        write(tmp_path / "b.json", json.dumps({"version": 1, "data": ROWS})),
        write(tmp_path / "lines.json", as_jsonl(ROWS)),
        as_csv(tmp_path / "a.csv", ROWS),
        as_parquet(tmp_path / "a.parquet", ROWS),
    ]
    for source in sources:
        assert [fields for fields, _ in records(source)] == ROWS, source


def test_bom_and_windows_line_ends_are_no_content(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    jsonl = write(tmp_path / "a.jsonl", bom + as_jsonl(ROWS).replace("\n", "\r\n").encode() + b"\r\n\r\n")
    plain = write(tmp_path / "b.json", bom + json.dumps(ROWS).encode())
    table = write(tmp_path / "c.csv", bom + as_csv(tmp_path / "c.csv", ROWS).read_bytes())
    for source in (jsonl, plain, table):
        assert [fields for fields, _ in records(source)] == ROWS, source


def test_places_are_lines_or_row_numbers(tmp_path: Path) -> None:
    jsonl = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert [where for _, where in records(jsonl)] == [f"{jsonl}:1", f"{jsonl}:3"]
    table = as_csv(tmp_path / "a.csv", ROWS)  # the second row spans two lines
    assert [where for _, where in records(table)] == [f"{table}:2", f"{table}:3", f"{table}:5"]
    for other in (as_parquet(tmp_path / "a.parquet", ROWS), write(tmp_path / "a.json", json.dumps(ROWS))):
        assert [where for _, where in records(other)] == [f"{other}, row {n}" for n in (1, 2, 3)]


def test_large_files_are_streamed(tmp_path: Path) -> None:
    """The first row comes although the file ends in rubbish."""
    jsonl = write(tmp_path / "a.jsonl", as_jsonl(ROWS) + "rubbish")
    table = write(tmp_path / "a.csv", "prompt,completion\na,b\n" + "x,y,z\n")
    for source in (jsonl, table):
        assert next(read_records(source, split="train", columns=COLUMNS))[0]["completion"] in ("1", "b")


def test_parquet_reads_only_known_columns_and_every_batch(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "completion": "c", "embedding": [0.0] * 8} for n in range(2500)]
    found = records(as_parquet(tmp_path / "a.parquet", rows))
    assert [fields for fields, _ in found] == [{"prompt": str(n), "completion": "c"} for n in range(2500)]
    assert found[-1][1].endswith("row 2500")


def test_csv_takes_long_cells(tmp_path: Path) -> None:
    text = "word " * 100_000
    assert records(write(tmp_path / "a.csv", f"prompt,completion\n{text},b\n"))[0][0]["prompt"] == text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl:2: a row is a list, not an object"),
        ("a.jsonl", '"text"\n', "a.jsonl:1: a row is a text"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe4"}\n', "a.jsonl:2: byte 0xe4 is not valid UTF-8"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "is UTF-16"),
        ("a.jsonl", b"\x1f\x8b\x08\x00rest", "is compressed"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1: not"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}\n", "a.jsonl:1: not readable JSON"),
        ("a.json", '[{"a": 1},\n{"a": }]', "a.json:2: not valid JSON"),
        ("a.json", '[{"a": 1}, 7]', "a.json, row 2: a row is a number"),
        ("a.json", '{"data": 3}', "holds a number, not rows"),
        ("a.json", '"just text"', "holds a text, not rows"),
        ("a.json", b'[{"a": "\xff"}]', "is not valid UTF-8"),
        ("a.json", '{"a": 1}\n{"a": 2\n', "a.json:2: not valid JSON"),
        ("a.csv", "prompt,completion\na,b\nc\n", "a.csv:3: 1 cells, but the header names 2 columns"),
        ("a.csv", "prompt,completion\na,b,c\n", "a.csv:2: 3 cells"),
        ("a.csv", 'prompt,completion\na,"b\n', "a.csv:2: not valid CSV"),
        ("a.csv", "prompt,prompt\na,b\n", "column 'prompt' stands twice"),
        ("a.csv", b"prompt,completion\na,\xe4\n", "byte 0xe4 is not valid UTF-8"),
        ("a.parquet", b"PAR1 no it is not", "is not a sound Parquet file"),
        ("a.parquet", b"", "is not a sound Parquet file"),
        ("a.xyz", "text", "is of no known format"),
    ],
)
def test_malformed_files_are_named_with_their_place(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as caught:
        records(path)
    assert said in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.hint and "\n" not in caught.value.message


def test_a_cut_parquet_file_is_one_clear_error(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "a.parquet", [{"prompt": str(n) * 50, "completion": "c"} for n in range(5000)])
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:100] + whole[-100:], whole[:4] + b"\x00" * (len(whole) - 12) + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(QrosaError, match=r"a\.parquet"):
            records(path)


@pytest.mark.parametrize("name", ["missing.jsonl", "./no/such/place", "/nowhere/at/all", "~/qrosa-no-such-folder/x"])
def test_a_missing_source_is_named(name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        records(name)


def test_a_hub_id_without_a_network_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="someone/something") as caught:
        records("someone/something")
    assert "network" in caught.value.hint


def test_a_hub_data_set_is_read_by_split_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        if split != "train":
            raise ValueError(f'Unknown split "{split}".')
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = records("owner/name:main")
    assert [fields for fields, _ in found] == ROWS
    assert found[1][1] == "owner/name:main, train row 2"
    assert asked == [("owner/name", "main", "train")]
    with pytest.raises(InputError, match="Unknown split"):
        records("owner/name", "test")


def test_an_unreadable_file_is_a_storage_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", as_jsonl(ROWS))

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        records(path)


class TestFolder:
    def test_splits_are_told_by_name(self, tmp_path: Path) -> None:
        for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation.jsonl", "my_test.jsonl"):
            write(tmp_path / name, as_jsonl([{"prompt": name}]))
        assert len(records(tmp_path)) == 2
        assert records(tmp_path, "validation")[0][0] == {"prompt": "validation.jsonl"}
        assert records(tmp_path, "test")[0][0] == {"prompt": "my_test.jsonl"}

    def test_splits_are_told_by_subfolder(self, tmp_path: Path) -> None:
        write(tmp_path / "train" / "a.jsonl", as_jsonl(ROWS))
        write(tmp_path / "dev" / "a.jsonl", as_jsonl(ROWS[:1]))
        assert (len(records(tmp_path)), len(records(tmp_path, "validation"))) == (3, 1)

    def test_files_without_a_split_are_for_training(self, tmp_path: Path) -> None:
        write(tmp_path / "reviews.jsonl", as_jsonl(ROWS))
        write(tmp_path / "test.jsonl", as_jsonl(ROWS[:1]))
        write(tmp_path / "latest.jsonl", as_jsonl(ROWS[:1]))  # "test" inside a word is no split
        assert len(records(tmp_path)) == 4

    def test_a_folder_that_names_no_split_serves_for_any(self, tmp_path: Path) -> None:
        write(tmp_path / "reviews.jsonl", as_jsonl(ROWS))
        assert len(records(tmp_path, "test")) == len(records(tmp_path, "train")) == 3

    def test_other_files_are_passed_over(self, tmp_path: Path) -> None:
        write(tmp_path / "a.jsonl", as_jsonl(ROWS))
        for name in ("README.md", "dataset_info.json", ".hidden.jsonl", ".cache/b.jsonl"):
            write(tmp_path / name, "rubbish")
        assert len(records(tmp_path)) == 3

    def test_an_empty_folder_and_a_missing_split_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="holds no data files"):
            records(tmp_path)
        write(tmp_path / "train.jsonl", as_jsonl(ROWS))
        with pytest.raises(InputError, match=r"no validation files \(found train.jsonl\)"):
            records(tmp_path, "validation")
