"""A trainer's checkpoints of a model with adapters: the adapter alone, which the trainer reads back by itself.

transformers' ``Trainer`` resumes from ``model.safetensors`` or from an index of shards, by ``load_state_dict``. So the
adapter's folder gets an index that names the adapter's file as the one shard, and the model a hook that understands
it: names in a file become those of modules, and layers get the sparse parts that the file has before its values are
copied. Everything is copied in place, for the optimizer holds the parameters already.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qrosa.adapters.forms import PREFIX
from qrosa.adapters.inject import quantized_linears, saved_parts
from qrosa.adapters.linear import SPARSE_TENSORS
from qrosa.base.adapter_io import save_adapter
from qrosa.base.saving import SavesAdapter
from qrosa.files import write_json
from qrosa.sparse.store import ADAPTER_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX_FILE = "model.safetensors.index.json"
"""What transformers calls its index of shards (``SAFE_WEIGHTS_INDEX_NAME``)."""
_MARK = "qrosa_resumable"


def make_resumable(model: PreTrainedModel) -> None:
    """Have trainers save the adapter of ``model`` as a checkpoint, and load it back; a second call changes nothing."""
    if getattr(model, _MARK, False):
        return
    setattr(model, _MARK, True)
    model.save_pretrained = SavesAdapter(model, save_checkpoint)  # type: ignore[assignment]
    model.register_load_state_dict_pre_hook(_take_adapter)
    leave_base_out(model)


def leave_base_out(model: PreTrainedModel) -> None:
    """Say which tensors of the model a checkpoint's index does not name, or the trainer warns that they are missing."""
    named = _indexed(model)
    model._keys_to_ignore_on_save = [name for name in model.state_dict() if name not in named]


def save_checkpoint(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter, and last the index by which a trainer finds it.

    Raises:
        InputError: The model has no adapter.
        StorageError: The folder cannot be written.
    """
    save_adapter(model, folder)
    index = {"metadata": {"format": "pt"}, "weight_map": {name: ADAPTER_FILE for name in _indexed(model)}}
    write_json(Path(folder) / INDEX_FILE, index)


def _indexed(model: nn.Module) -> set[str]:
    """The low-rank tensors, which a fresh model has before it loads; the sparse ones where there are no others."""
    names = [f"{path}.{name}" for path, layer in quantized_linears(model).items() for name in layer.adapter_tensors()]
    low_rank = {_in_module(name) for name in names if _is_low_rank(name)}
    return low_rank or set(names)


def _is_low_rank(name: str) -> bool:
    return name.rpartition(".")[2].startswith(PREFIX)


def _in_module(name: str) -> str:
    """``path.low_rank_A``, as a file has it, as the module has it: ``path.low_rank.A``."""
    path, _, tensor = name.rpartition(".")
    return f"{path}.low_rank.{tensor.removeprefix(PREFIX)}"


def _take_adapter(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Make ``state``, an adapter's tensors by their names in a file, one of ``model`` by names and shapes.

    Raises:
        InputError: The adapter has sparse parts that break the layout's rules.
    """
    if prefix or not all(_is_low_rank(name) or name.endswith(SPARSE_TENSORS) for name in state):
        return  # no adapter's file: whatever it is, torch sees to it
    for path, layer in quantized_linears(model).items():
        tensors = {name: state[f"{path}.{name}"] for name in SPARSE_TENSORS if f"{path}.{name}" in state}
        delta = saved_parts(path, tensors, layer.weight.shape, layer.alpha).sparse
        if layer.nnz != (0 if delta is None else delta.nnz):
            layer.set_sparse(delta)
    for name in list(filter(_is_low_rank, state)):
        state[_in_module(name)] = state.pop(name)
