"""A run as a ``.gguf`` file: the same tensors, sizes and tokens as the merged folder, by others' readers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qrosa.base.open import open_base
from qrosa.base.speech import Speech
from qrosa.data.encode import IGNORE, EncodedRow
from qrosa.errors import InputError
from qrosa.export.gguf import export_gguf
from qrosa.export.gguf_metadata import rope_factors
from qrosa.export.gguf_tokenizer import pre_tokenizer_name
from qrosa.export.llama_cpp import require_llama_cpp
from qrosa.export.merge import merge
from qrosa.export.verify import verify
from qrosa.sparse import store
from tests.conftest import TINY_FAMILIES, save_tiny_model
from tests.export.conftest import MakeAdapter

IDS = torch.arange(5, 29).view(2, 12)


@pytest.fixture
def base_of(tiny_model_dir: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path) -> Callable[[str], Path]:
    """A tiny base; Qwen3's with heads of 128, since transformers reads no other width from a GGUF file."""

    def make(family: str) -> Path:
        if family != "qwen3":
            return tiny_model_dir(family)
        save_tiny_model(family, tmp_path / "base", tiny_tokenizer, head_dim=128)
        return tmp_path / "base"

    return make


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tensors_are_those_of_the_merged_folder(
    family: str, base_of: Callable[[str], Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(base_of(family))
    merge(run, tmp_path / "merged")
    report = export_gguf(run, tmp_path / "gguf")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    read = open_base(str(tmp_path / "gguf" / "model.gguf"))  # names and order of rows by transformers' tables
    assert sorted(read.names()) == sorted(merged) and report.tensors == len(merged)
    for name, tensor in merged.items():
        # Vectors are fp32 here and fp16 there, and Gemma's norms pass through 1 + weight.
        exact = tensor.ndim > 1
        torch.testing.assert_close(
            read.read(name), tensor.float(), rtol=0 if exact else 1e-3, atol=0 if exact else 1e-6
        )
    assert report.bytes == sum(int(tensor.n_bytes) for tensor in _reader(tmp_path / "gguf").tensors)


def _reader(folder: Path) -> GGUFReader:
    return GGUFReader(folder / "model.gguf")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_transformers_computes_the_merged_model_s_logits_from_it(
    family: str, base_of: Callable[[str], Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(base_of(family))
    merge(run, tmp_path / "merged")
    export_gguf(run, tmp_path / "gguf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    config = AutoConfig.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(read(IDS).logits, merged(IDS).logits, rtol=1e-3, atol=1e-3)
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(config, key) == pytest.approx(getattr(merged.config, key)), key


def test_q8_0_is_the_merged_model_rounded_by_the_gguf_package(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir())
    merge(run, tmp_path / "merged", dtype="bf16")
    report = export_gguf(run, tmp_path / "gguf", quant="q8_0")
    kinds = {tensor.name: tensor.tensor_type for tensor in _reader(tmp_path / "gguf").tensors}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {GGMLQuantizationType.Q8_0}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {GGMLQuantizationType.F32}
    read = open_base(str(tmp_path / "gguf" / "model.gguf"))
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        # Half a step of 1/127 of the block's largest value, and bf16's rounding of the comparison.
        bound = tensor.float().abs().amax() * (0.5 / 127 + 2**-8)
        assert (read.read(name) - tensor.float()).abs().amax() <= bound, name
    assert (
        report.dtype == "q8_0"
        and report.bytes < sum(t.nbytes for t in load_file(run / "adapter" / store.ADAPTER_FILE).values()) + 10**6
    )


def test_the_tokenizer_and_its_template_are_in_the_file(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir())
    export_gguf(run, tmp_path / "gguf")
    original = AutoTokenizer.from_pretrained(tiny_model_dir())
    read = AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    for text in ("the film was good, positive", "two  spaces\n\tand 1234 é ", "<|im_start|>user\nwhat?<|im_end|>\n"):
        assert read(text).input_ids == original(text).input_ids, text
    fields = _reader(tmp_path / "gguf").fields
    assert fields["tokenizer.chat_template"].contents() == original.chat_template
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == original.eos_token_id
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 512  # as many as the embedding has rows
    assert fields["tokenizer.ggml.token_type"].contents()[original.eos_token_id] == gguf.TokenType.CONTROL
    assert (tmp_path / "gguf" / "Modelfile").read_text() == 'FROM ./model.gguf\nPARAMETER stop "<|im_end|>"\n'


def test_learnt_ends_and_template_travel(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir())
    config = store.read_adapter_config(run / "adapter")
    tensors = load_file(run / "adapter" / store.ADAPTER_FILE)
    store.write_adapter(run / "adapter", tensors, {**config, **Speech((3,), "{{ messages }}").to_config()})
    export_gguf(run, tmp_path / "gguf")
    fields = _reader(tmp_path / "gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 3
    assert 'PARAMETER stop "<|pad|>"' in (tmp_path / "gguf" / "Modelfile").read_text()


def test_a_gguf_base_gives_its_own_tokenizer(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    _, run = make_adapter(tiny_model_dir())
    export_gguf(run, tmp_path / "first")
    base = tmp_path / "base.gguf"
    shutil.copy(tmp_path / "first" / "model.gguf", base)
    _, second = make_adapter(base, name="second")
    merge(second, tmp_path / "merged")
    export_gguf(second, tmp_path / "gguf")
    old, new = _reader(tmp_path / "first").fields, _reader(tmp_path / "gguf").fields
    kept = [key for key in old if key.startswith("tokenizer.")]
    assert kept and all(new[key].contents() == old[key].contents() for key in kept)
    read, merged = (
        open_base(str(tmp_path / "gguf" / "model.gguf")),
        load_file(tmp_path / "merged" / "model.safetensors"),
    )
    assert all(torch.equal(read.read(name), merged[name].float()) for name in merged if merged[name].ndim > 1)


def test_llama_3_s_rotation_is_in_the_file(tiny_tokenizer: Any, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    save_tiny_model("llama", tmp_path / "base", tiny_tokenizer, rope_parameters=rope)
    _, run = make_adapter(tmp_path / "base")
    export_gguf(run, tmp_path / "gguf")
    factors = next(t.data for t in _reader(tmp_path / "gguf").tensors if t.name == "rope_freqs.weight")
    # The published rule by hand: short waves as they are, long ones 8 times slower, between them a blend.
    for index, found in enumerate(factors):
        wave = 2 * torch.pi * 10000.0 ** (index / 8)
        blend = (64 / wave - 1) / 3
        expected = 1.0 if wave < 16 else 8.0 if wave > 64 else 1 / ((1 - blend) / 8 + blend)
        assert found == pytest.approx(expected, rel=1e-5), index
    assert min(factors) == 1 and max(factors) == 8
    assert rope_factors(AutoConfig.from_pretrained(tmp_path / "base")) is not None


def test_what_cannot_be_said_in_the_file_is_refused(
    tiny_tokenizer: Any, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    save_tiny_model("llama", tmp_path / "base", tiny_tokenizer, rope_parameters=rope)
    _, run = make_adapter(tmp_path / "base")
    with pytest.raises(InputError, match="'yarn' is not written") as caught:
        export_gguf(run, tmp_path / "gguf")
    assert "convert_hf_to_gguf.py" in caught.value.hint and not (tmp_path / "gguf").exists()
    with pytest.raises(InputError, match="is unknown"):
        export_gguf(run, tmp_path / "gguf", quant="q2")


@pytest.mark.parametrize(
    "steps, name",
    [
        ([{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": "[a-z]+"}}, {"type": "ByteLevel", "use_regex": False}], None),
        ([{"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}], None),
        ([{"type": "Metaspace"}], None),
    ],
)
def test_ways_to_cut_text_have_llama_cpp_s_names_or_are_refused(steps: list[dict[str, Any]], name: str | None) -> None:
    state = json.loads(json.dumps({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}))
    if name is not None:
        assert pre_tokenizer_name(state) == name
    else:
        with pytest.raises(InputError, match="not known here"):
            pre_tokenizer_name(state)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_llama_cpp_predicts_what_was_trained(
    family: str, tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python, which is built from source, is not installed")
    _, run = make_adapter(tiny_model_dir(family))
    export_gguf(run, tmp_path / "gguf")
    ids = torch.arange(5, 45).tolist()
    rows = [EncodedRow(ids[start:], [IGNORE, *ids[start + 1 :]]) for start in range(4)]
    drift = verify(run, tmp_path / "gguf", rows)
    assert drift["top1_agreement"] > 0.97 and drift["mean_kl"] < 1e-4, drift
    # A rotation, a norm or an order of rows that is not the model's shows at once.
    state = load_file(run / "adapter" / store.ADAPTER_FILE)
    assert state and abs(drift["loss_difference"]) < 1e-2


def test_llama_cpp_cuts_text_into_the_same_tokens(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    _, run = make_adapter(tiny_model_dir())
    export_gguf(run, tmp_path / "gguf", quant="q8_0")
    model = llama_cpp.Llama(str(tmp_path / "gguf" / "model.gguf"), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir())
    for text in ("the film was good, positive", "two  spaces\n\tand 1234 é ", "<|im_start|>user\nwhat?<|im_end|>\n"):
        found = model.tokenize(text.encode(), add_bos=False, special=True)
        assert found == tokenizer(text, add_special_tokens=False).input_ids, text


def test_verify_without_llama_cpp_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match="llama-cpp-python") as caught:
        require_llama_cpp()
    assert "pip install" in caught.value.hint


def test_the_example_answers_as_the_merged_model(
    tiny_model_dir: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    _, run = make_adapter(tiny_model_dir())
    merge(run, tmp_path / "merged")
    export_gguf(run, tmp_path / "gguf")
    script = Path(__file__).parents[2] / "examples" / "ask_llama_cpp.py"
    command = [sys.executable, str(script), str(tmp_path / "gguf"), "what is good?", "--max-tokens", "4"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is good?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert done.stdout.strip() == tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_a_crash_of_llama_cpp_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some builds die on a block type; the export stays, and so do we."""
    from qrosa.errors import StorageError
    from qrosa.export import llama_cpp

    monkeypatch.setattr(llama_cpp, "_TRIAL", "import os; os.kill(os.getpid(), 11)")
    with pytest.raises(StorageError, match="crashes on it"):
        llama_cpp._refuse_crash(tmp_path / "model.gguf")
    monkeypatch.setattr(llama_cpp, "_TRIAL", "raise SystemExit(1)")
    llama_cpp._refuse_crash(tmp_path / "model.gguf")  # an error of its own is met, and told, when the file is loaded
