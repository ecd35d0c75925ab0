"""Model folders as people have them: plan and load read the same tensors, or refuse in the same words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qrosa.adapters.inject import quantized_linears
from qrosa.base.load import count_parameters, load_base
from qrosa.base.open import open_base
from qrosa.base.shape_source import read_shape
from qrosa.errors import QrosaError, StorageError
from qrosa.quant.nf4 import NF4Weight
from tests.conftest import save_tiny_model

IDS = torch.arange(5, 25).view(1, 20)
Tensors = dict[str, torch.Tensor]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def config_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return loaded


def set_config(folder: Path, **changes: Any) -> None:
    """Change config.json; a value of None removes the key."""
    config = config_of(folder) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change(load_file(folder / SINGLE))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})


def renamed(rule: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, lambda tensors: {rule(name): x for name, x in tensors.items()})


def added(**more: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: change_tensors(
        folder, lambda tensors: tensors | {k.replace("/", "."): v for k, v in more.items()}
    )


def without(*ends: str) -> Callable[[Path], None]:
    return lambda folder: change_tensors(
        folder, lambda tensors: {name: x for name, x in tensors.items() if not name.endswith(ends)}
    )


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, **changes)


def several(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def wrapped(kind: str, text_kind: str | None = None, **more: Any) -> Callable[[Path], None]:
    """The config of a wrapper around the text model."""

    def change(folder: Path) -> None:
        text = config_of(folder) | ({"model_type": text_kind} if text_kind else {})
        (folder / "config.json").write_text(json.dumps({"model_type": kind, "text_config": text, **more}))

    return change


def file_beside(name: str, content: dict[str, Any] | bytes | None = None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        if content is None:
            save_file({"other": torch.zeros(2)}, folder / name)
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return change


def moved(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / SINGLE).rename(folder / name)


def in_shards(*, index: bool, lost: int | None = None) -> Callable[[Path], None]:
    """Three shards, with or without their index, perhaps with one of them lost."""

    def change(folder: Path) -> None:
        tensors = list(load_file(folder / SINGLE).items())
        (folder / SINGLE).unlink()
        weight_map = {}
        for number in range(3):
            name = f"model-{number + 1:05d}-of-00003.safetensors"
            part = dict(tensors[number::3])
            weight_map |= dict.fromkeys(part, name)
            if number != lost:
                save_file(part, folder / name, {"format": "pt"})
        if index:
            (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return change


def in_nf4(*, head: bool = False, kind: str = "nf4") -> Callable[[Path], None]:
    """The decoder's matrices, and perhaps the head, in bitsandbytes' form."""

    def pack(tensors: Tensors) -> Tensors:
        made = dict(tensors)
        for name, tensor in tensors.items():
            if (name.endswith("proj.weight") or (head and name.startswith("lm_head"))) and tensor.ndim == 2:
                packed, state = NF4Weight.quantize(tensor).to_bnb()
                parts = state.as_dict(packed=True)
                made |= {name: packed} | {f"{name}.{key.replace('nf4', kind)}": part for key, part in parts.items()}
        return {name: tensor.clone() for name, tensor in made.items()}

    def change(folder: Path) -> None:
        change_tensors(folder, pack)
        set_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})

    return change


def vision(name: str) -> Callable[[Path], None]:
    return added(**{name: torch.ones(4, 4), name.replace("0", "1"): torch.ones(4, 4)})


QWEN_VL = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
LLAVA_OLD = several(
    wrapped("llava"), renamed(lambda name: f"language_model.{name}"), vision("vision_tower/layers/0/weight")
)
LLAVA_NEW = several(
    wrapped("llava"),
    renamed(lambda name: name.replace("model.", "model.language_model.", 1)),
    vision("model/vision_tower/layers/0/weight"),
)
IN_TEXT_MODEL = renamed(lambda name: name.replace("model.", "model.text_model.", 1))
SEES = vision("visual/0/weight")
# name -> (family, its settings, what is done to the folder, words of a note or None)
READ: dict[str, tuple[str, dict[str, Any], Callable[[Path], None], str | None]] = {
    "no prefix": ("llama", {"tie_word_embeddings": True}, renamed(lambda name: name.removeprefix("model.")), None),
    "a wrapper, old layout": ("llama", {}, LLAVA_OLD, "2 tensors of other parts"),
    "a wrapper, new layout": ("llama", {}, LLAVA_NEW, "2 tensors of other parts"),
    "mistral3": ("mistral", {}, several(wrapped("mistral3"), renamed(lambda n: f"language_model.{n}")), None),
    "idefics3": ("llama", {}, several(wrapped("idefics3"), IN_TEXT_MODEL), None),
    "qwen2-vl": ("qwen2", QWEN_VL, several(wrapped("qwen2_vl", "qwen2_vl_text"), SEES), "other parts"),
    "qwen3-vl": ("qwen3", QWEN_VL, wrapped("qwen3_vl", "qwen3_vl_text"), None),
    "a stale index": ("llama", {}, file_beside(INDEX, {"weight_map": {"x": "gone.safetensors"}}), "is left out"),
    "a file beside": ("llama", {}, file_beside("adapter_model.safetensors"), "not read"),
    "shards": ("llama", {}, in_shards(index=True), None),
    "shards without an index": ("llama", {}, in_shards(index=False), "is missing"),
    "another name": ("llama", {}, moved("weights.safetensors"), "taken for the model"),
    "a name in the config": (
        "llama", {}, several(moved("mine.safetensors"), config(transformers_weights="mine.safetensors")), "names"),
    "layers that are not built": (
        "llama", {}, added(**{"model/layers/2/eh_proj/weight": torch.ones(64, 128)}), "no place for"),
    "a pruned config": ("llama", {"num_hidden_layers": 3}, config(num_hidden_layers=2), "no place for"),
    "adapters inside": (
        "llama", {}, added(**{"model/layers/0/self_attn/q_proj/lora_A/weight": torch.ones(4, 64)}), "no place for"),
    "a rotation's buffer": ("llama", {}, added(**{"model/rotary_emb/inv_freq": torch.ones(8)}), None),
    "a tied head that differs": (
        "llama", {"tie_word_embeddings": False}, config(tie_word_embeddings=True), "stored with other values"),
    "a tied head that is the same": (
        "llama", {"tie_word_embeddings": True},
        lambda folder: change_tensors(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        None),
    "only the head of a tied pair": (
        "llama", {"tie_word_embeddings": True},
        renamed(lambda name: "lm_head.weight" if "embed_tokens" in name else name), "is both"),
    "heads of other names": ("gpt_neox", {}, lambda folder: None, None),
    "a head as older versions named it": (
        "gpt_neox", {}, renamed(lambda name: name.replace("lm_head", "embed_out")), None),
    "buffers of an activation": (
        "apertus", {}, lambda folder: change_tensors(
            folder, lambda t: {n: x * 3 if n.endswith("act_fn.beta") else x for n, x in t.items()}), None),
    "a quantised head": ("llama", {}, in_nf4(head=True), None),
    "fp64": ("llama", {}, lambda folder: change_tensors(folder, lambda t: {n: x.double() for n, x in t.items()}), None),
    "code that is named and not run": ("llama", {}, config(auto_map={"AutoConfig": "evil.Evil"}), "not run"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[..., tuple[Path, torch.Tensor]]:
    """A checkpoint as transformers saves it, and the logits of it loaded in 4 bits by plain bitsandbytes layout."""
    made: dict[str, Path] = {}

    def folder_of(family: str, settings: dict[str, Any]) -> Path:
        key = family + json.dumps(settings, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            save_tiny_model(family, made[key], tiny_tokenizer, **settings)
        return made[key]

    return folder_of


@pytest.mark.parametrize("name", READ)
def test_read_by_plan_and_load(name: str, whole: Any, tmp_path: Path) -> None:
    family, settings, change, note = READ[name]
    folder = tmp_path / "model"
    shutil.copytree(whole(family, settings), folder)
    change(folder)
    shape = read_shape(str(folder))
    model, _ = load_base(str(folder))
    assert shape.base_parameters == count_parameters(model)
    assert [linear.path for linear in shape.linears] == list(quantized_linears(model))
    if note is not None:
        assert any(note in line for line in shape.notes)
    assert shape.notes == open_base(str(folder)).notes
    tensors = _effective(model)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    plain = _effective(load_base(str(whole(family, settings)))[0])
    changed = {key for key in plain if key in tensors and not torch.equal(plain[key], tensors[key])}
    expected = {"buffers of an activation": {key for key in plain if key.endswith("act_fn.beta")}}
    expected["a quantised head"] = {"head", "lm_head.weight"}
    assert changed == expected.get(name, set())


def _effective(model: Any) -> Tensors:
    """Every tensor of a loaded base, its matrices dequantised, a head of its own or tied."""
    tensors = {f"{path}.weight": layer.weight.dequantize() for path, layer in quantized_linears(model).items()}
    tensors |= {name: x for name, x in model.named_parameters()} | dict(model.named_buffers())
    return tensors | {"head": model.get_output_embeddings().weight}


def _headless(architecture: str) -> Callable[[Path], None]:
    return several(
        config(architectures=[architecture]), without("lm_head.weight"), added(**{"score/weight": torch.ones(2, 64)})
    )


def _as_dtype(folder: Path, kind: str) -> None:
    """Another dtype of as many letters as the header leaves room for."""
    path = folder / SINGLE
    path.write_bytes(path.read_bytes().replace(b'"dtype":"BF16"', f'"dtype":"{kind}"  '.encode(), 1))


FP8 = {"model.layers.0.mlp.up_proj.weight"}
# name -> (family, its settings, what is done to the folder, what is said)
REFUSED: dict[str, tuple[str, dict[str, Any], Callable[[Path], None], str]] = {
    "an encoder": ("bert", {}, lambda folder: None, "an encoder"),
    "a decoder that reads to both sides": ("gemma3_text", {}, config(use_bidirectional_attention=True), "both sides"),
    "an encoder-decoder": ("llama", {}, config(model_type="t5", is_encoder_decoder=True), "encoder-decoder"),
    "a classifier": ("llama", {}, _headless("LlamaForSequenceClassification"), "predicts the next token"),
    "a reward model": ("llama", {}, _headless("LlamaModel"), "it holds score.weight instead"),
    "a mixture of experts": ("llama", {}, config(num_local_experts=8), "mixture of experts"),
    "fp8": ("llama", {}, lambda folder: change_tensors(
        folder, lambda t: {n: x.to(torch.float8_e4m3fn) if n in FP8 else x for n, x in t.items()}), "F8_E4M3"),
    "int8 by bitsandbytes": ("llama", {}, config(
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), "8 bits"),
    "gptq": ("llama", {}, config(quantization_config={"quant_method": "gptq"}), "gptq"),
    "fp4": ("llama", {}, in_nf4(kind="fp4"), "quantised to fp4"),
    "fp4 by the config": ("llama", {}, config(quantization_config={
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}), "bitsandbytes to fp4"),
    "a dtype of fewer than 8 bits": ("llama", {}, lambda folder: _as_dtype(folder, "F4"), "stores .* as F4"),
    "16 bits under a 4-bit config": ("llama", {}, config(
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "not quantised"),
    "an index outside its folder": ("llama", {}, several(
        moved("x.safetensors"), file_beside(INDEX, {"weight_map": {"a": "../x.safetensors"}})), "outside its folder"),
    "a file outside its folder": ("llama", {}, config(transformers_weights="../x.safetensors"), "outside its folder"),
    "a shard that is lost": ("llama", {}, in_shards(index=False, lost=1), "lacks model-00002-of-00003"),
    "an adapter": ("llama", {}, several(moved("adapter_model.safetensors"), file_beside("adapter_config.json", {})),
                   "is an adapter"),
    "another format": ("llama", {}, moved("consolidated.safetensors"), "consolidated.safetensors only"),
    "pickles": ("llama", {}, lambda folder: (folder / SINGLE).rename(folder / "pytorch_model.bin"), "no .safetensors"),
    "a tensor that is missing": ("llama", {}, without("layers.1.mlp.up_proj.weight"), "has no tensor"),
    "another size": ("llama", {}, config(hidden_size=128, head_dim=32), "has shape"),
    "another vocabulary": ("llama", {}, config(vocab_size=500), "has shape"),
    "more layers": ("llama", {}, config(num_hidden_layers=3), "has no tensor 'model.layers.2"),
    "no linear modules": ("gpt2", {}, lambda folder: None, "no linear layers"),
    "layers that read weights": ("mamba", {}, lambda folder: None, "does not run on quantised layers"),
    "a wrapper whose text model stands nowhere alone": ("llama", {}, wrapped("glm4v", "glm4v_text"), "causal LM"),
    "an unknown architecture": ("llama", {}, config(model_type="perceptron9"), "perceptron9"),
    "an architecture of its own code": ("llama", {}, config(
        model_type="evil", auto_map={"AutoConfig": "evil.Evil"}), "never run"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_plan_and_load_in_the_same_words(name: str, whole: Any, tmp_path: Path) -> None:
    family, settings, change, says = REFUSED[name]
    folder = tmp_path / "model"
    shutil.copytree(whole(family, settings), folder)
    change(folder)
    with pytest.raises(QrosaError, match=says) as planned:
        read_shape(str(folder))
    with pytest.raises(QrosaError) as loaded:
        open_base(str(folder))
    assert (loaded.value.message, loaded.value.hint) == (planned.value.message, planned.value.hint)
    assert "\n" not in loaded.value.message and loaded.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_named(name: str, value: float, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole("llama", {}), folder)

    def spoil(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[70 % tensors[name].numel()] = value
        return tensors

    change_tensors(folder, spoil)
    place = r"\[1, 6\]" if "up_proj" in name else r"\[6\]"
    with pytest.raises(StorageError, match=rf"{name}' of .* holds (nan|-inf) at {place}"):
        load_base(str(folder))


HOSTILE = 'import pathlib\npathlib.Path({mark!r}).write_text("ran")\nraise SystemExit("ran")\n'


@pytest.mark.parametrize("kind", ["llama", "evil"])
def test_code_in_a_model_folder_never_runs(
    kind: str, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    folder, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(whole("llama", {}), folder)
    (folder / "evil.py").write_text(HOSTILE.format(mark=str(mark)))
    names = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    set_config(folder, model_type=kind, auto_map=names, attn_implementation="evil/kernel")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    for read in (read_shape, load_base):
        if kind == "llama":
            read(str(folder))
        else:
            with pytest.raises(QrosaError, match="never run"):
                read(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize(("twin", "family"), [("qwen2_vl", "qwen2"), ("qwen2_5_vl", "qwen2"), ("qwen3_vl", "qwen3")])
def test_a_wrappers_text_model_computes_what_its_twin_computes(twin: str, family: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "pad_token_id": 0}  # fmt: skip
    look = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64}
    whole_config = CONFIG_MAPPING[twin](text_config=sizes | QWEN_VL, vision_config=look)
    torch.manual_seed(0)
    wrapper = AutoModelForImageTextToText.from_config(whole_config).eval()
    from qrosa.base.library_config import make_config
    from qrosa.base.model_config import model_config

    config = make_config(model_config(whole_config.to_dict(), "test").text, "test")
    assert config.model_type == family
    plain = AutoModelForCausalLM.from_config(config).eval()
    state = {name.replace("model.language_model.", "model."): x for name, x in wrapper.state_dict().items()}
    missing = plain.load_state_dict(state, strict=False).missing_keys
    assert not missing
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, wrapper(IDS).logits)


@pytest.mark.parametrize("family", ["olmo2", "gemma4_text", "lfm2"])
def test_a_family_without_an_entry_is_the_model_that_transformers_builds(family: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0}  # fmt: skip
    AutoConfig.for_model(family, **sizes).save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert shape.base_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert not shape.dims.known and shape.dims.counted is not None
    assert any(family in note and "no entry" in note for note in shape.all_notes)
