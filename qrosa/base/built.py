"""The structure of a family without an entry, from the model that transformers builds on the meta device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from qrosa.base.build import meta_model, structure_of
from qrosa.base.count import count_layer
from qrosa.base.dimensions import refuse_experts
from qrosa.base.library_config import make_config
from qrosa.base.structure import Structure


def built_structure(values: Mapping[str, Any], source: str) -> Structure:
    """The structure of a text model, with what its layers save for backward.

    Args:
        values: The text model's config.
        source: What the user named, for messages.

    Raises:
        InputError: Not a decoder that can be a base.
    """
    return _built(json.dumps(values, sort_keys=True, default=str), source)


@lru_cache(maxsize=4)  # a run asks twice, to plan and to load, and each time takes seconds
def _built(values: str, source: str) -> Structure:
    known = json.loads(values)
    refuse_experts(known, source)
    config = make_config(known, source)
    structure = structure_of(meta_model(config), source)
    return replace(structure, dims=replace(structure.dims, counted=count_layer(config, source)))
