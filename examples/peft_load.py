"""Use an adapter in plain PEFT, without qrosa: python examples/peft_load.py BASE ADAPTER "a prompt".

BASE comes from ``qrosa export RUN --output BASE --base-only``, once for all adapters of that base, and ADAPTER from
``qrosa export RUN --output ADAPTER --format peft``.
"""

import argparse

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Say the likeliest next token, then a whole answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="the decoded base")
    parser.add_argument("adapter", help="the adapter in PEFT's format")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.adapter)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(options.base), options.adapter).eval()
    inputs = tokenizer(options.prompt, return_tensors="pt")
    with torch.no_grad():
        print(f"next token: {tokenizer.decode(model(**inputs).logits[0, -1].argmax())!r}")
    answer = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    print(tokenizer.decode(answer[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
