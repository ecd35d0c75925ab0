"""What was trained is what is exported: composition, range, layout of the folder, and loading without qrosa."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from qrosa.adapters.inject import quantized_linears
from qrosa.base.open import open_base
from qrosa.errors import InputError, StorageError
from qrosa.export.merge import merge
from qrosa.sparse.store import write_adapter
from tests.conftest import TINY_FAMILIES, save_tiny_model
from tests.export.conftest import MakeAdapter

IDS = torch.arange(5, 29).view(2, 12)

_LOAD_WITHOUT_QROSA = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "qrosa" or name.startswith("qrosa."):
            raise ImportError("qrosa is not installed here")
sys.meta_path.insert(0, Block())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert model.dtype == torch.float16, model.dtype
    assert AutoTokenizer.from_pretrained(folder).chat_template
    with torch.no_grad():
        logits = model.float()(torch.arange(5, 29).view(2, 12)).logits
    save_file({"logits": logits.contiguous()}, f"{folder}/{sys.argv[1]}")
assert "qrosa" not in sys.modules
"""


def _composed(model: Any) -> dict[str, torch.Tensor]:
    """The fp32 composition of base and adapter, by tensor name."""
    state = {
        name: tensor for name, tensor in model.named_parameters() if "low_rank" not in name and "sparse" not in name
    }
    return state | {f"{path}.weight": layer.effective_weight() for path, layer in quantized_linears(model).items()}


def _reference_logits(folder: Path, model: Any) -> torch.Tensor:
    """Logits of a plain fp32 transformers model that is given the composed weights."""
    from transformers import AutoConfig

    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    state = {name: tensor.float() for name, tensor in _composed(model).items()}
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not unexpected and all("lm_head" in name for name in missing)
    plain.tie_weights()
    with torch.no_grad():
        logits: torch.Tensor = plain(IDS).logits
    return logits


def test_every_family_loads_without_qrosa_to_the_composed_logits(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    references = {}
    for family in TINY_FAMILIES:
        model, run = make_adapter(tiny_model_dir(family), name=f"run-{family}")
        merge(run, tmp_path / family)
        references[family] = _reference_logits(tmp_path / family, model)
    folders = [str(tmp_path / family) for family in TINY_FAMILIES]
    command = [sys.executable, "-I", "-c", _LOAD_WITHOUT_QROSA, "logits.bin", *folders]
    subprocess.run(command, check=True, timeout=300)
    for family, reference in references.items():
        logits = load_file(tmp_path / family / "logits.bin")["logits"]
        # fp16 keeps 11 bits of every weight: relative 2^-11 a weight, which some 10 layers of sums pass on.
        error = (logits - reference).norm() / reference.norm()
        assert error < 2e-3, f"{family}: {error}"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_weights_are_the_composition_rounded_once(
    dtype: str, tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, run = make_adapter(tiny_model_dir())
    report = merge(run, tmp_path / "out", dtype=dtype)
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = _composed(model)
    assert sorted(written) == sorted(expected)
    for name, tensor in expected.items():
        # The low-rank product may be summed in another order: one unit in the last place, rarely.
        difference = (written[name].float() - tensor.float()).abs()
        assert torch.all(difference <= tensor.float().abs() * torch.finfo(kind).eps + 1e-6), name
    assert report.tensors == len(expected) and report.bytes == sum(tensor.nbytes for tensor in written.values())


def test_exact_list_of_files_and_a_plain_config(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir())
    report = merge(run, tmp_path / "out", dtype="bf16")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert (
        files
        == report.files
        == [
            "README.md",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card and "NF4 round trip" in card and "library_name: transformers" in card


def test_a_tied_head_is_not_written(tiny_tokenizer: Any, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    for tied in (True, False):
        save_tiny_model("llama", tmp_path / f"base{tied}", tiny_tokenizer, tie_word_embeddings=tied)
        _, run = make_adapter(tmp_path / f"base{tied}", name=f"run{tied}")
        merge(run, tmp_path / f"out{tied}")
        assert ("lm_head.weight" in load_file(tmp_path / f"out{tied}" / "model.safetensors")) is not tied
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{tied}")
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


def test_sharded_export_of_a_sharded_base(tiny_tokenizer: Any, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    save_tiny_model("qwen2", tmp_path / "base", tiny_tokenizer, shard_size="100KB")
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    _, run = make_adapter(tmp_path / "base")
    merge(run, tmp_path / "one")
    merge(run, tmp_path / "many", max_shard_bytes=50_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_base_original_merges_into_the_16_bit_weights(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    model, run = make_adapter(tiny_model_dir())
    merge(run, tmp_path / "out", base="original", dtype="bf16")
    written = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(tiny_model_dir() / "model.safetensors")
    for path, layer in quantized_linears(model).items():
        name = f"{path}.weight"
        delta = layer.effective_weight() - layer.weight.dequantize(torch.float32)
        assert torch.allclose(written[name].float(), original[name].float() + delta, rtol=2**-7, atol=1e-6), name


def test_an_nf4_checkpoint_as_base(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _save_nf4(tiny_model_dir(), tmp_path / "nf4")
    model, run = make_adapter(tmp_path / "nf4")
    assert open_base(str(tmp_path / "nf4")).kind == "nf4"
    merge(run, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in _composed(model).items():
        assert torch.allclose(written[name].float(), tensor.float(), rtol=2**-10, atol=1e-6), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(InputError, match="already quantised"):
        merge(run, tmp_path / "original", base="original")


def _save_nf4(dense: Path, folder: Path) -> None:
    """The checkpoint as bitsandbytes saves it, packed by it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)


@pytest.mark.parametrize("part", ["low-rank", "sparse", "embedding"])
def test_fp16_overflow_is_refused_and_bf16_takes_it(
    part: str, tiny_model_dir: Callable[..., Path], tiny_tokenizer: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = tiny_model_dir()
    if part == "embedding":
        base = tmp_path / "base"
        save_tiny_model("llama", base, tiny_tokenizer)
        state = load_file(base / "model.safetensors")
        state["model.embed_tokens.weight"][3, 4] = 70_000
        save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    size = {"low-rank": 1e6, "sparse": 1e6, "embedding": 0.1}[part]
    _, run = make_adapter(base, size=size, low_rank=part != "sparse", sparse=part == "sparse")
    with pytest.raises(InputError, match=r"tensor '[\w.]+' reaches .* beyond fp16's 65504") as caught:
        merge(run, tmp_path / "out")
    assert "--dtype bf16" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*partial*"))
    merge(run, tmp_path / "out", dtype="bf16")


def test_weights_that_are_not_finite_are_refused(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir(), size=float("nan"))
    for dtype in ("fp16", "bf16"):
        with pytest.raises(InputError, match="not finite"):
            merge(run, tmp_path / "out", dtype=dtype)


def test_another_base_is_refused_and_a_moved_one_is_found(
    tiny_model_dir: Callable[..., Path], tiny_tokenizer: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    save_tiny_model("llama", tmp_path / "base", tiny_tokenizer)
    _, run = make_adapter(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="cannot be opened") as caught:
        merge(run, tmp_path / "out")
    assert "--model" in caught.value.hint
    with pytest.raises(InputError, match="another base"):
        merge(run, tmp_path / "out", model=str(tiny_model_dir("qwen3")))
    assert not (tmp_path / "out").exists()
    merge(run, tmp_path / "out", model=str(tmp_path / "moved"))


@pytest.mark.parametrize("settings", [{"dtype": "fp8"}, {"base": "int8"}], ids=["dtype", "base"])
def test_unknown_settings(settings: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is unknown"):
        merge(tmp_path, tmp_path / "out", **settings)  # type: ignore[arg-type]


def test_no_adapter_and_damaged_adapter(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="holds no adapter"):
        merge(tiny_model_dir(), tmp_path / "out")
    _, run = make_adapter(tiny_model_dir())
    path = run / "adapter" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StorageError):
        merge(run, tmp_path / "out")


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.users: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._watch(tensor)
        return result

    def _watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if not self.users[key]:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        self.users[key] += 1
        weakref.finalize(tensor, self._release, key)

    def _release(self, key: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            self.live -= self.sizes[key]


def test_live_tensors_stay_far_below_the_model(tiny_tokenizer: Any, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "base", tiny_tokenizer, num_hidden_layers=24, tie_word_embeddings=True)
    _, run = make_adapter(tmp_path / "base")
    with _LiveBytes() as tracked:
        report = merge(run, tmp_path / "out", max_shard_bytes=10**9)  # one file: the writer must not hold it
    largest = max(tensor.nbytes for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert report.bytes > 20 * largest
    # fp32 weight, its 16-bit source and result, 4-bit codes, and what quantising and composing need in passing.
    assert tracked.peak < 10 * largest, f"{tracked.peak} bytes alive, largest tensor {largest}"


_MEASURED_EXPORT = """
import resource, sys, threading
import torch
torch.set_num_threads(1)
from qrosa.export.merge import merge
from qrosa.sparse.store import write_adapter
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
merge(sys.argv[1], sys.argv[2])  # everything is imported and warm
before = peak()
merge(sys.argv[3], sys.argv[4], max_shard_bytes=10**9)
print(peak() - before)
"""


def test_peak_resident_memory_does_not_follow_the_model(
    tiny_model_dir: Callable[..., Path], tiny_tokenizer: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 20, "head_dim": 128}
    save_tiny_model("llama", tmp_path / "base", tiny_tokenizer, **shape)
    _, small = make_adapter(tiny_model_dir(), name="small")
    path, (rows, columns) = "model.layers.3.mlp.up_proj", (1536, 512)
    factors = {f"{path}.low_rank_A": torch.randn(2, columns), f"{path}.low_rank_B": torch.randn(rows, 2)}
    base = {"source": str(tmp_path / "base"), "fingerprint": open_base(str(tmp_path / "base")).fingerprint()}
    modules = {path: {"rank": 2, "alpha": 4.0, "nnz": 0, "shape": [rows, columns]}}
    write_adapter(
        tmp_path / "large",
        {name: factor.bfloat16() for name, factor in factors.items()},
        {"base": base, "adapter": {}, "modules": modules},
    )
    folders = [small, tmp_path / "a", tmp_path / "large", tmp_path / "b"]
    command = [sys.executable, "-c", _MEASURED_EXPORT, *map(str, folders)]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    size = sum(path.stat().st_size for path in (tmp_path / "b").glob("*.safetensors"))
    assert size > 120e6
    growth = int(done.stdout.strip().splitlines()[-1])
    assert growth < 50e6, f"resident memory grew by {growth / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
