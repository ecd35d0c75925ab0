"""What goes in, when it stops, and that the pieces shown are the text that was made."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from qrosa.adapters.inject import quantized_linears
from qrosa.base.adapter_io import attach_adapter
from qrosa.base.load import load_base
from qrosa.config import AdapterConfig
from qrosa.data.encode import encode_prompt
from qrosa.errors import InputError
from qrosa.eval.generate import Answer, Chat, Sampling, encode_messages, end_tokens, generate, generate_ids
from qrosa.model.head import generating
from qrosa.sparse.csr import CsrDelta
from tests.conftest import TINY_FAMILIES
from tests.eval.conftest import LoadTiny

SHORT = Sampling(max_new_tokens=8)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_greedy_equals_the_argmax_of_whole_passes(family: str, tiny_model: LoadTiny, tiny_tokenizer: Any) -> None:
    model = tiny_model(family)
    ids = list(range(20, 31))
    answer = generate_ids(model, tiny_tokenizer, ids, SHORT)
    made: list[int] = []
    while len(made) < 8 and not (made and made[-1] in end_tokens(model, tiny_tokenizer)):
        with torch.no_grad():
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    assert answer.tokens == len(made) and answer.prompt_tokens == 11
    assert answer.text == tiny_tokenizer.decode(made, skip_special_tokens=True).strip()


def test_pieces_make_up_the_text(tiny_model: LoadTiny, tiny_tokenizer: Any) -> None:
    pieces: list[str] = []
    answer = generate(tiny_model("llama"), tiny_tokenizer, "hello", SHORT, on_text=pieces.append)
    assert "".join(pieces).strip() == answer.text and len(pieces) > 1


def test_a_character_in_several_tokens_is_shown_once_it_is_whole(tiny_tokenizer: Any) -> None:
    from qrosa.eval.generate import _Collector

    pieces: list[str] = []
    made = _Collector(tiny_tokenizer, pieces.append)
    made.put(torch.tensor([[1, 2]]))  # the prompt
    tokens = tiny_tokenizer("a é 漢", add_special_tokens=False)["input_ids"]
    assert len(tokens) > 5, "the tokenizer must split these characters for this test to say anything"
    for token in tokens:
        made.put(torch.tensor([token]))
    made.end()
    assert "".join(pieces) == "a é 漢" and not any("\ufffd" in piece for piece in pieces)


def test_the_prompt_goes_through_the_template_unless_raw(
    tiny_model: LoadTiny, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def record(model: Any, tokenizer: Any, ids: list[int], sampling: Any, on_text: Any) -> Answer:
        seen.append(list(ids))
        return Answer("ok", 1, len(ids), True, False)

    monkeypatch.setattr("qrosa.eval.generate.generate_ids", record)
    model = tiny_model("llama")
    generate(model, tiny_tokenizer, "hi")
    generate(model, tiny_tokenizer, "hi", system="be brief")
    generate(model, tiny_tokenizer, "hi", raw=True)
    shown = [tiny_tokenizer.decode(ids) for ids in seen]
    assert shown[0] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert shown[1].startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi")
    assert shown[2] == "hi"
    assert seen[0] == encode_prompt("hi", tiny_tokenizer), "the prompt differs from that of training rows"


def test_a_tokenizer_without_template(tiny_model: LoadTiny, tiny_tokenizer: Any) -> None:
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    model = tiny_model("llama")
    assert generate(model, plain, "hello there", SHORT).prompt_tokens == len(plain("hello there")["input_ids"])
    with pytest.raises(InputError, match="needs a chat template"):
        generate(model, plain, "hi", system="be brief")
    with pytest.raises(InputError, match="no chat template"):
        Chat(model, plain, SHORT)


def test_a_template_that_refuses(tiny_tokenizer: Any) -> None:
    strict = copy.deepcopy(tiny_tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(InputError, match="no system role"):
        encode_messages(strict, [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])


def test_sampling_is_repeatable_by_seed(tiny_model: LoadTiny, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    texts = [
        generate(model, tiny_tokenizer, "hello", Sampling(12, temperature=1.0, top_p=0.95, seed=seed)).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_defaults_of_a_checkpoint_do_not_apply(tiny_model: LoadTiny, tiny_tokenizer: Any) -> None:
    model = tiny_model("qwen3")
    plain = generate(model, tiny_tokenizer, "hello", SHORT).text
    before = copy.deepcopy(model.generation_config)
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    try:
        assert generate(model, tiny_tokenizer, "hello", SHORT).text == plain
    finally:
        model.generation_config = before


def test_every_named_end_token_ends(tiny_model: LoadTiny, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    first = generate_ids(model, tiny_tokenizer, [30, 31, 32], Sampling(1))
    with torch.no_grad():
        token = int(model(torch.tensor([[30, 31, 32]])).logits[0, -1].argmax())
    before = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = [2, token]
    try:
        answer = generate_ids(model, tiny_tokenizer, [30, 31, 32], SHORT)
    finally:
        model.generation_config = before
    assert not first.finished
    assert answer.finished and answer.tokens == 1


def test_chat_sees_its_history_and_forgets(tiny_model: LoadTiny, tiny_tokenizer: Any) -> None:
    chat = Chat(tiny_model("llama"), tiny_tokenizer, SHORT, system="be brief")
    first = chat.say("hello")
    second = chat.say("and now")
    assert [message["role"] for message in chat.history] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.history[2]["content"] == first.text and second.prompt_tokens > first.prompt_tokens
    chat.reset()
    assert chat.history == [{"role": "system", "content": "be brief"}]
    assert chat.say("hello").text == first.text


def test_ctrl_c_keeps_what_was_said(tiny_model: LoadTiny, tiny_tokenizer: Any) -> None:
    pieces: list[str] = []

    def interrupt(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    chat = Chat(tiny_model("llama"), tiny_tokenizer, Sampling(max_new_tokens=40))
    answer = chat.say("hello", interrupt)
    assert answer.interrupted and not answer.finished and 3 <= answer.tokens < 40
    assert chat.history[-1] == {"role": "assistant", "content": answer.text}


def test_too_long_a_prompt_leaves_the_history_alone(tiny_model: LoadTiny, tiny_tokenizer: Any) -> None:
    chat = Chat(tiny_model("llama"), tiny_tokenizer, SHORT)
    with pytest.raises(InputError, match="the model takes 256"):
        chat.say("x y z " * 200)
    assert chat.history == []
    with pytest.raises(InputError, match="prompt is empty"):
        generate_ids(tiny_model("llama"), tiny_tokenizer, [], SHORT)


def test_answers_stay_within_the_context(tiny_model: LoadTiny, tiny_tokenizer: Any) -> None:
    answer = generate_ids(tiny_model("llama"), tiny_tokenizer, [30] * 250, Sampling(max_new_tokens=100))
    assert answer.tokens <= 6


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
    ],
    ids=str,
)
def test_bad_sampling(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"range|above zero"):
        Sampling(**settings)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_attention_is_put_back(family: str, tiny_model: LoadTiny) -> None:
    """Fused while generating where the model has it (Gemma-2 caps its scores: it has not), as it was afterwards."""
    model = copy.deepcopy(tiny_model(family)).train()
    model.set_attn_implementation("eager")
    with pytest.raises(ZeroDivisionError), generating(model):
        assert model.config._attn_implementation == ("sdpa" if model._supports_sdpa else "eager")
        assert torch.is_inference_mode_enabled() and not model.training
        raise ZeroDivisionError
    assert model.config._attn_implementation == "eager" and model.training and not torch.is_inference_mode_enabled()


def test_a_quantised_model_decodes_what_it_computes_at_once(tiny_model_dir: Any, tiny_tokenizer: Any) -> None:
    """Token by token (few rows, cached keys) and all tokens at once give the same logits, within bf16's rounding."""
    model, _ = load_base(str(tiny_model_dir()))
    attach_adapter(model, AdapterConfig(rank=4, density=0.0))
    generator = torch.Generator().manual_seed(0)
    for layer in quantized_linears(model).values():
        layer.low_rank.B.data.normal_(0, 0.02, generator=generator)
        layer.set_sparse(CsrDelta.from_mask(torch.rand(layer.weight.shape, generator=generator) < 0.01))
        layer.sparse_values.data.normal_(0, 0.02, generator=generator)
    ids = torch.arange(20, 60)[None]
    with generating(model):
        whole = model(ids).logits[0].float()
        cache, parts = None, []
        for token in ids[0]:
            output = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits[0, 0].float())
    assert (torch.stack(parts) - whole).abs().max() <= 0.03 * whole.abs().max()
    answer = generate_ids(model, tiny_tokenizer, ids[0].tolist(), SHORT)
    assert answer.tokens > 0 and next(model.parameters()).is_inference() is False


def test_training_goes_on_after_generating(tiny_model_dir: Any, tiny_tokenizer: Any) -> None:
    model, _ = load_base(str(tiny_model_dir()))
    attach_adapter(model, AdapterConfig(rank=4, density=0.0))
    generate_ids(model, tiny_tokenizer, list(range(20, 40)), SHORT)
    ids = torch.arange(20, 60)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.low_rank.B.grad.abs().sum() > 0 for layer in quantized_linears(model).values())
