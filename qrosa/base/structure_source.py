"""Where the structure of a base comes from: written down for the families with an entry, else built by transformers.

The first costs nothing (``dimensions``), the second some seconds: transformers builds the model on the meta device.
"""

from __future__ import annotations

from qrosa.base.dimensions import read_dimensions
from qrosa.base.families import FAMILIES
from qrosa.base.model_config import ModelConfig
from qrosa.base.structure import Structure, known_structure


def read_structure(config: ModelConfig, source: str) -> Structure:
    """The structure of the model that a config describes.

    Raises:
        InputError: Not a decoder that can be a base.
    """
    if config.family in FAMILIES:
        return known_structure(read_dimensions(config.text, source))
    from qrosa.base.built import built_structure

    return built_structure(config.text, source)
