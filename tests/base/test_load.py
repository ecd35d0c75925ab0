"""Every family and format loads to the same 4-bit base, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qrosa.adapters.inject import quantized_linears
from qrosa.base.base_files import SafetensorsBase, read_original_weight
from qrosa.base.build import empty_model
from qrosa.base.load import load_base
from qrosa.base.open import open_base
from qrosa.errors import InputError, QrosaError, StorageError
from tests.conftest import TINY_FAMILIES, save_tiny_model

IDS = torch.arange(5, 25).view(1, 20)


def quantised_by_transformers(folder: Path) -> Any:
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16)
    return model


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_computes_what_bitsandbytes_computes(tiny_model_dir: Callable[..., Path], family: str) -> None:
    model, _ = load_base(str(tiny_model_dir(family)))
    theirs = quantised_by_transformers(tiny_model_dir(family))
    with torch.no_grad():
        ours, expected = model(IDS).logits.float(), theirs(IDS).logits.float()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # Same 4-bit weights; the products round in bf16 in another order.
    assert (ours - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_parameters_are_counted_as_transformers_counts_them(tiny_model_dir: Callable[..., Path], family: str) -> None:
    model, _ = load_base(str(tiny_model_dir(family)))
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_dir(family))
    assert model.qrosa_base.parameters == sum(parameter.numel() for parameter in dense.parameters())


def test_a_quantised_checkpoint_loads_to_the_same_bytes(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    quantised_by_transformers(tiny_model_dir()).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir() / name, tmp_path)
    dense, _ = load_base(str(tiny_model_dir()))
    quantised, _ = load_base(str(tmp_path))
    assert quantised.qrosa_base.kind == "nf4"
    for path, layer in quantized_linears(dense).items():
        other = quantized_linears(quantised)[path].weight.tensors()
        assert all(torch.equal(tensor, other[name]) for name, tensor in layer.weight.tensors().items())
    with pytest.raises(InputError, match="already quantised"):
        read_original_weight(open_base(str(tmp_path)), next(iter(quantized_linears(dense))))


def test_sharding_changes_neither_the_base_nor_its_fingerprint(
    tiny_model_dir: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    save_tiny_model("llama", tmp_path, tiny_tokenizer, shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, sharded = open_base(str(tiny_model_dir())), open_base(str(tmp_path))
    assert whole.fingerprint() == sharded.fingerprint()
    assert whole.names() != [] and sorted(whole.names()) == sorted(sharded.names())


def test_another_weight_is_another_fingerprint(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir(), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert open_base(str(tmp_path)).fingerprint() != open_base(str(tiny_model_dir())).fingerprint()


def test_another_rotation_is_another_fingerprint(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir(), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_base(str(tmp_path)).fingerprint() != open_base(str(tiny_model_dir())).fingerprint()


def test_the_text_model_of_a_multimodal_checkpoint_loads(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model_dir("gemma3_text"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("model.", "language_model.model.", 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((tmp_path / "config.json").read_text())
    wrapper = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    ours, _ = load_base(str(tmp_path))
    plain, _ = load_base(str(tiny_model_dir("gemma3_text")))
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, plain(IDS).logits)


def test_never_more_than_one_dense_matrix_is_read(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    alive: list[Any] = []
    most = 0
    read = SafetensorsBase.read

    def watched(self: SafetensorsBase, name: str) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        tensor = read(self, name)
        if name.endswith("proj.weight"):
            alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(SafetensorsBase, "read", watched)
    load_base(str(tiny_model_dir()))
    assert len(alive) == 14 and most == 0


def test_gguf_loads_as_transformers_loads_it(smollm2: Path) -> None:
    from bench.assets import smollm2_gguf

    path = smollm2_gguf()
    base_files, prepared = open_base(str(path)), open_base(str(smollm2))
    assert base_files.kind == "gguf"
    model = empty_model(base_files.config)
    for name in [
        *(name for name, _ in model.named_parameters()),
        *(f"{path}.weight" for path in quantized_linears(model)),
    ]:
        assert base_files.shape(name) == prepared.shape(name)
        if "layers.7." in name or "embed" in name:
            assert torch.equal(base_files.read(name).bfloat16(), prepared.read(name)), name


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


UNSUITABLE: dict[str, tuple[Callable[[Path], None], type[QrosaError]]] = {
    "no config": (_without("config.json"), InputError),
    "no weights": (_without("model.safetensors"), InputError),
    "no tokenizer": (_without("tokenizer.json"), InputError),
    "truncated weights": (_truncate, StorageError),
    "config is no json": (lambda folder: (folder / "config.json").write_text("{"), StorageError),
    "unknown architecture": (_config(model_type="perceptron9"), InputError),
    "no decoder": (_config(model_type="vit", architectures=["ViTModel"]), InputError),
    "another size": (_config(hidden_size=128, head_dim=32), StorageError),
    "more layers": (_config(num_hidden_layers=3), InputError),
    "gptq": (_config(quantization_config={"quant_method": "gptq", "bits": 4}), InputError),
}


@pytest.mark.parametrize(("change", "error"), UNSUITABLE.values(), ids=UNSUITABLE.keys())
def test_unsuitable_folders_are_refused(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, change: Callable[[Path], None], error: type[QrosaError]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir(), folder)
    change(folder)
    with pytest.raises(error) as caught:
        load_base(str(folder))
    assert "\n" not in caught.value.message and caught.value.hint


@pytest.mark.parametrize("source", ["/nowhere/model", "./nowhere", "nowhere.gguf", "some/unknown-model", "a b c", ""])
def test_unknown_sources_are_refused(source: str) -> None:
    with pytest.raises(InputError):
        open_base(source)
