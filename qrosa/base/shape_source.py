"""The shape of a base from wherever it is: a local folder, a ``.gguf`` file, or the config.json of a hub id.

Headers of a folder's safetensors files are best (a few kilobytes each); config.json alone has to do for a hub id, or
for a folder whose weights are not there yet. Torch-free for the families with an entry, so that a plan stays quick.
"""

from __future__ import annotations

from qrosa.base.checkpoint import Checkpoint, open_checkpoint
from qrosa.base.gguf_shape import read_gguf_shape
from qrosa.base.locate import is_gguf, locate
from qrosa.base.shape import ModelShape, from_structure
from qrosa.files import DTYPE_BYTES

_NESTED_PART = ".nested_absmax"


def read_shape(source: str) -> ModelShape:
    """Read the shape of a local folder, a ``.gguf`` file or a hub id.

    Raises:
        InputError: There is no such model, or it is of a kind that cannot be a base.
        StorageError: Its files are damaged.
    """
    path = locate(source, weights=False)
    if is_gguf(path):
        return read_gguf_shape(source, path)
    return checkpoint_shape(open_checkpoint(source, path, weights=False))


def checkpoint_shape(checkpoint: Checkpoint) -> ModelShape:
    """The shape of a folder that was read."""
    tensors, structure = checkpoint.tensors, checkpoint.structure
    stored = [DTYPE_BYTES[tensors[name].dtype] for name in structure.shapes if name in tensors]
    nested = not checkpoint.packed or any(name.endswith(_NESTED_PART) for name in tensors)
    return from_structure(
        checkpoint.source,
        checkpoint.kind,
        "headers" if tensors else "config",
        structure,
        stored_bytes=max([2, *stored]),
        nested=nested,
        notes=checkpoint.notes,
    )
