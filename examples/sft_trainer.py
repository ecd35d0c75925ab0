"""Fine-tune with TRL's SFTTrainer: python examples/sft_trainer.py MODEL ROWS.jsonl OUTPUT."""

import argparse

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import qrosa


def main() -> None:
    """Train, save checkpoints of the adapter alone, and leave the adapter in OUTPUT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder or a Hugging Face id")
    parser.add_argument("rows", help="a .jsonl file of rows that TRL knows: messages, prompt and completion, or text")
    parser.add_argument("output", help="a folder for checkpoints and the adapter")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT")
    options = parser.parse_args()

    model, tokenizer = qrosa.load(options.model, qrosa.AdapterConfig(budget="0.3%"))
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.max_steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            warmup_steps=0.03,
            lr_scheduler_type="linear",
            save_steps=max(1, options.max_steps // 4),
            logging_steps=1,
            bf16=torch.cuda.is_available(),  # activations; masters are fp32 all the same
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=options.rows, split="train"),
        callbacks=[qrosa.RosaCallback()],
        optimizers=(qrosa.optimizer(model, steps=options.max_steps), None),
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()


if __name__ == "__main__":
    main()
