"""Learn from preferences with TRL's DPOTrainer: python examples/dpo_trainer.py MODEL PAIRS.jsonl OUTPUT.

The reference is the base with the adapter off: no second model in memory.
"""

import argparse

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

import qrosa


def main() -> None:
    """Train, and leave the adapter in OUTPUT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder or a Hugging Face id")
    parser.add_argument("rows", help="a .jsonl file of rows of prompt, chosen and rejected")
    parser.add_argument("output", help="a folder for checkpoints and the adapter")
    parser.add_argument("--max-steps", type=int, default=200)
    options = parser.parse_args()

    model, tokenizer = qrosa.load(options.model, qrosa.AdapterConfig(budget="0.3%"))
    trainer = DPOTrainer(
        model=model,
        ref_model=qrosa.reference_model(model),
        processing_class=tokenizer,
        args=DPOConfig(
            output_dir=options.output,
            max_steps=options.max_steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            warmup_steps=0.03,
            beta=0.1,
            save_strategy="no",
            logging_steps=1,
            bf16=torch.cuda.is_available(),  # activations; masters are fp32 all the same
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=options.rows, split="train"),
        callbacks=[qrosa.RosaCallback()],
        optimizers=(qrosa.optimizer(model, steps=options.max_steps), None),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
