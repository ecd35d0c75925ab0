"""Accuracy of an exported folder in plain transformers: what somebody without qrosa gets.

    python bench/reload.py FOLDER ROWS.jsonl RESULT.json

Each prompt is a user turn; of the completions that occur in the rows, the likeliest is the answer. The result goes to a
file, since libraries print to stdout what they like. Importing qrosa is made impossible first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.modules["qrosa"] = None  # type: ignore[assignment]  # any import of it fails from here on

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()

_BATCH = 16


@torch.inference_mode()
def accuracy(folder: str, rows_path: str) -> dict[str, float]:
    """Score the model in ``folder`` on prompt/completion rows whose completions differ in their first token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # In fp32: many processors have no fast products of the fp16 that the folder is stored in.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with open(rows_path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    labels = sorted({row["completion"] for row in rows})
    first = torch.tensor([tokenizer(label, add_special_tokens=False).input_ids[0] for label in labels])
    assert len(set(first.tolist())) == len(labels), "two labels start with the same token"
    encoded = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for row in rows
    ]
    order = sorted(range(len(rows)), key=lambda index: len(encoded[index]))
    right = 0
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        ends = torch.tensor([len(encoded[index]) - 1 for index in chosen])
        ids = torch.full((len(chosen), int(ends.max()) + 1), tokenizer.pad_token_id)
        for place, index in enumerate(chosen):
            ids[place, : len(encoded[index])] = torch.tensor(encoded[index])
        mask = torch.arange(ids.shape[1]) <= ends[:, None]
        hidden = model.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state  # [B, L, d]
        scores = model.lm_head(hidden[torch.arange(len(chosen)), ends])[:, first]  # [B, labels]
        answers = scores.argmax(dim=1).tolist()
        right += sum(labels[answer] == rows[index]["completion"] for answer, index in zip(answers, chosen, strict=True))
    return {"rows": len(rows), "accuracy": right / len(rows)}


if __name__ == "__main__":
    model_folder, rows_file, result_file = sys.argv[1:]
    result = accuracy(model_folder, rows_file)
    Path(result_file).write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(f"{result['rows']} rows, accuracy {result['accuracy']:.3f}")
