"""Learn from rewards with TRL's GRPOTrainer: python examples/grpo_trainer.py MODEL ROWS.jsonl OUTPUT.

An answer is worth 1 where it holds the row's solution. With --beta the model is held to its base, which is the model
itself with the adapter off.
"""

import argparse
from typing import Any

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

import qrosa


def solved(completions: list[Any], solution: list[str], **_: Any) -> list[float]:
    """1 for each completion that holds the solution; completions are texts, or messages where the prompts are."""
    texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in completions]
    return [float(wanted in text) for text, wanted in zip(texts, solution, strict=True)]


def main() -> None:
    """Train, and leave the adapter in OUTPUT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder or a Hugging Face id")
    parser.add_argument("rows", help="a .jsonl file of rows of prompt and solution")
    parser.add_argument("output", help="a folder for the adapter")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--answers", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--longest", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the divergence from the base")
    options = parser.parse_args()

    model, tokenizer = qrosa.load(options.model, qrosa.AdapterConfig(budget="0.3%"))
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=solved,
        processing_class=tokenizer,
        args=GRPOConfig(
            output_dir=options.output,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.answers,
            num_generations=options.answers,
            max_completion_length=options.longest,
            warmup_steps=0.03,
            save_strategy="no",
            logging_steps=1,
            bf16=torch.cuda.is_available(),  # activations; masters are fp32 all the same
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=options.rows, split="train"),
        callbacks=[qrosa.RosaCallback({"warmup_steps": options.max_steps // 4})],
        optimizers=(qrosa.optimizer(model, steps=options.max_steps), None),
    )
    if options.beta:
        qrosa.set_reference(trainer, options.beta)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
