"""Constants that stand once in Python and once in C++ must be the same."""

from __future__ import annotations

import re
from pathlib import Path

import bitsandbytes.functional as bnb
import torch

from qrosa.ops import MAX_UINT16_COLUMNS, NESTED_BLOCK, NF4_TABLE

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def test_nf4_table() -> None:
    text = (CSRC / "nf4.h").read_text()
    body = re.search(r"#define QROSA_NF4_TABLE(.*?)\}", text, re.S)
    assert body is not None
    values = [float(v) for v in re.findall(r"(-?\d+\.\d+)f", body.group(1))]
    assert torch.equal(torch.tensor(values), torch.tensor(NF4_TABLE))
    assert torch.equal(torch.tensor(NF4_TABLE), bnb.get_4bit_type("nf4", device="cpu"))


def test_nested_block_and_column_limit() -> None:
    shift = re.search(r"kNestedShift = (\d+)", (CSRC / "nf4.h").read_text())
    limit = re.search(r"kMaxUint16Columns = (\d+)", (CSRC / "csr.h").read_text())
    assert shift is not None and limit is not None
    assert 1 << int(shift.group(1)) == NESTED_BLOCK
    assert int(limit.group(1)) == MAX_UINT16_COLUMNS


def test_dropout_hash() -> None:
    constants = [int(c, 16) for c in re.findall(r"0x([0-9A-F]+)u", (CSRC / "dropout.h").read_text())]
    source = (CSRC.parent / "qrosa" / "ops" / "dropout.py").read_text()
    assert all(f"0x{c:X}" in source for c in constants)
