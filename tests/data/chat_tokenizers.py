"""Small tokenizers and chat templates in the manner of the real ones."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>", "<pad>")
CORPUS = (
    "the film was good, positive\n\nthe film was bad, negative\n",
    "system user assistant question answer review sentiment: yes no",
    "what is the capital of france? the capital of france is paris.",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nbe kind<|im_end|>\n' }}{% endif %}" + CHATML
)
CHATML_MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The markers hold the answer but not the token that ends it.
CHATML_MARKED_SHORT = CHATML_MARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
)
# Llama 3: BOS in the template, trimmed contents, today's date, a system part always.
LLAMA = (
    "{{ bos_token }}{{ '<|start|>system<|stop|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '<|eot|>' }}"
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '<|stop|>\n\n' + message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
# Qwen 3: an empty thinking block in the last answer, the thinking of earlier answers dropped.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% set answer = message['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set thought = message['content'].split('</think>')[0].split('<think>')[-1] %}"
    "{% if '</think>' not in message['content'] %}{% set thought = '' %}{% endif %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ answer }}{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# DeepSeek-R1: the generation prompt opens a thinking block that no answer has.
OPEN_THOUGHT = CHATML.replace(
    "'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# Mistral: the system prompt stands in the last user turn, and only if nothing follows it.
SYSTEM_LAST = (
    "{{ bos_token }}{% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}"
    "{% if loop.index0 % 2 == 1 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.last and messages[0]['role'] == 'system' %}"
    "{{ '[INST]' + messages[0]['content'] + '\n\n' + message['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST]' + message['content'] + '[/INST]' }}{% endif %}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# Phi 3: the token that ends a turn, and EOS behind the whole.
EOS_LAST = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|eot|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# No token at all ends a turn.
PLAIN = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
SHAPES = {
    "chatml": CHATML,
    "default system": CHATML_DEFAULT_SYSTEM,
    "marked": CHATML_MARKED,
    "marked short": CHATML_MARKED_SHORT,
    "llama": LLAMA,
    "thinking": THINKING,
    "eos last": EOS_LAST,
}


def make_tokenizer(
    template: str | None = None, *, adds_bos: bool = False, pad_is_eos: bool = False, spaces: bool = False
) -> Any:
    """A byte-level BPE tokenizer; with ``spaces`` one of SentencePiece's kind, that puts a space before a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=spaces))
    alphabet: list[str] = []
    if spaces:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [*map(chr, range(32, 127)), "\n", "\u2581"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    eos = "<|im_end|>" if template is not None and "<|im_end|>" in template else "</s>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        pad_token=eos if pad_is_eos else "<pad>",
        extra_special_tokens=[AddedToken(token, special=True) for token in SPECIAL[2:7]],
        chat_template=template,
    )


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn, from the user on."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [
        {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)
    ]
