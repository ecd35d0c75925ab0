"""Which stored tensor is which of the model's, and which are left over. Torch-free.

A checkpoint may name a tensor as the model does; by transformers' rule for older layouts; with a wrapper's prefix
before the text model; or without the prefix of the headless model. The model's own list of names decides: a rule counts
only where it leads to a name on the list, and the first rule that does wins.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from qrosa.base.structure import Structure

# Where wrappers keep their text model.
_TEXT_PREFIXES = ("model.language_model.", "language_model.", "model.text_model.", "text_model.", "thinker.")
_NF4_PART = re.compile(r"(.+\.weight)(\.(?:quant_state\..+|(?:nested_)?(?:absmax|quant_map)|SCB|weight_format))?")
NF4_STATE = ".quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class Matching:
    """The model's names for stored tensors.

    Attributes:
        names: Model's name -> stored name; the parts of a quantised weight come under the weight's name and a suffix.
        extra: Stored names that the model has no place for.
    """

    names: dict[str, str]
    extra: tuple[str, ...]


def match_names(stored: Collection[str], structure: Structure) -> Matching:
    """Find the model's name for each stored tensor."""
    wanted = {*structure.shapes, *structure.buffers, structure.head}
    ranked: dict[str, tuple[int, str]] = {}
    extra = []
    for full in sorted(stored):
        base, part = split_part(full)
        found = next(((rank, name) for rank, name in enumerate(_readings(base, structure)) if name in wanted), None)
        if found is None or (found[1] + part in ranked and ranked[found[1] + part][0] <= found[0]):
            extra.append(full)
            continue
        if found[1] + part in ranked:
            extra.append(ranked[found[1] + part][1])
        ranked[found[1] + part] = (found[0], full)
    ignored = [re.compile(pattern) for pattern in structure.ignored]
    left = tuple(name for name in extra if not any(pattern.search(name) for pattern in ignored))
    return Matching({name: full for name, (_, full) in ranked.items()}, left)


def split_part(stored: str) -> tuple[str, str]:
    """A stored name as the weight's name and the suffix of a quantised weight's part, empty for a plain tensor."""
    match = _NF4_PART.fullmatch(stored)
    return (match[1], match[2] or "") if match else (stored, "")


def _readings(stored: str, structure: Structure) -> Iterator[str]:
    """What a stored name may mean, the plainest first."""
    yield stored
    if structure.rename is not None:
        yield structure.rename(stored)
    yield f"{structure.prefix}.{stored}"
    for prefix in _TEXT_PREFIXES:
        if stored.startswith(prefix):
            inner = stored.removeprefix(prefix)
            yield inner
            yield f"{structure.prefix}.{inner}"
            if structure.rename is not None:
                yield structure.rename(inner)


def summary(names: Iterable[str], limit: int = 3) -> str:
    """Some names, and how many more: layers that differ only in their number stand together."""
    groups: dict[str, int] = {}
    for name in names:
        top = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        groups[top] = groups.get(top, 0) + 1
    shown = ", ".join(list(groups)[:limit])
    return shown + (f" and {len(groups) - limit} other kinds" if len(groups) > limit else "")
