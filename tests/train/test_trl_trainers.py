"""RosaCallback inside TRL's trainers for preferences and rewards: the reference model, and the rows of masks."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

import qrosa
from qrosa.adapters.inject import quantized_linears, trainable_parameters
from qrosa.errors import InputError
from qrosa.eval.preferences import adapter_off
from qrosa.train.trainer_callback import RosaCallback
from qrosa.train.trainer_rows import answers_itself, dataloader_rows
from qrosa.train.trainer_selection import trainer_rows

trl = pytest.importorskip("trl", reason="of TRL's trainers")
datasets = pytest.importorskip("datasets", reason="TRL takes rows as the datasets library holds them")

MASKS = {"mask_samples": 4, "warmup_steps": 1}
COMMON = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def loaded(folder, **adapter):
    return qrosa.load(str(folder), qrosa.AdapterConfig(**{"rank": 2, "density": 0.01, "dropout": 0.1, **adapter}))


def pairs(count=8):
    sides = [(" positive", " negative") if index % 2 else (" negative", " positive") for index in range(count)]
    rows = [
        {"prompt": f"Review {index}: the film was {'good' if index % 2 else 'bad'}", "chosen": good, "rejected": bad}
        for index, (good, bad) in enumerate(sides)
    ]
    return datasets.Dataset.from_list(rows)


def prompts(count=8):
    return datasets.Dataset.from_list([{"prompt": f"Review {index}: the film was"} for index in range(count)])


def dpo(model, tokenizer, output, *, callback=None, trainer=None, rows=None, **arguments):
    reference = arguments.pop("ref_model", None)
    kind = trainer or trl.DPOTrainer
    settings = trl.KTOConfig if kind is trl.KTOTrainer else trl.DPOConfig
    return kind(
        model=model,
        ref_model=reference,
        processing_class=tokenizer,
        args=settings(str(output), **{**COMMON, **arguments}),
        train_dataset=pairs() if rows is None else rows,
        callbacks=[callback or RosaCallback(MASKS)],
        optimizers=(qrosa.optimizer(model, lr=5e-3, sparse_lr=1e-3), None),
    )


def grpo(model, tokenizer, output, *, callback=None, **arguments):
    def length(completions, **_):  # rewards must differ, or there is nothing to learn
        return [float(len(set(text))) for text in completions]

    generation = {"num_generations": 2, "max_completion_length": 8, "beta": 0.0}
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=length,
        processing_class=tokenizer,
        args=trl.GRPOConfig(str(output), **{**COMMON, **generation, **arguments}),
        train_dataset=prompts(),
        callbacks=[callback or RosaCallback(MASKS)],
        optimizers=(qrosa.optimizer(model, lr=5e-3, sparse_lr=1e-3), None),
    )


def spoil(model):
    """Adapter values that change what the model says."""
    for parameter in trainable_parameters(model):
        torch.nn.init.normal_(parameter.data, std=0.3)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def masks_are_whole(model):
    return sum(layer.nnz for layer in quantized_linears(model).values()) == sum(model.qrosa_allocation.nnz.values())


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_the_reference_is_the_base_with_the_adapter_off(tiny_model_dir, family):
    model, _ = loaded(tiny_model_dir(family), dropout=0.0)
    model.eval()
    reference = qrosa.reference_model(model)
    spoil(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with adapter_off(model):
        base = logits(model, ids)
    assert torch.equal(logits(reference, ids), base)
    assert not torch.equal(logits(model, ids), base)


def test_the_reference_has_no_memory_of_its_own(tiny_model_dir):
    model, _ = loaded(tiny_model_dir())
    reference = qrosa.reference_model(model)
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert all(id(tensor) in own for tensor in (*reference.parameters(), *reference.buffers()))
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    bare = reference.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj.weight = moved = model.model.layers[0].self_attn.q_proj.weight.to("cpu")
    assert bare.weight is moved  # it looks again at each call


def test_what_is_done_to_the_reference_stays_there(tiny_model_dir):
    model, _ = loaded(tiny_model_dir())
    reference = qrosa.reference_model(model)
    reference.eval()
    reference.forward = None
    reference.register_forward_hook(lambda *_: pytest.fail("a hook of the reference"))
    assert model.training and all(layer.training for layer in quantized_linears(model).values())
    logits(model, torch.tensor([[5, 6]]))
    with pytest.raises(InputError, match="no weights that save_pretrained could write"):
        reference.save_pretrained("anywhere")


def test_the_hash_of_a_reference_tells_bases_apart(tiny_model_dir):
    """TRL keeps what a reference says of a data set by the hash of its state dict, in which packed weights are not."""
    from trl.trainer.utils import hash_module

    hashes = set()
    for fingerprint in ("a", "b"):
        model, _ = loaded(tiny_model_dir())
        object.__setattr__(model.qrosa_base, "fingerprint", fingerprint)
        hashes.add(hash_module(qrosa.reference_model(model)))
    assert len(hashes) == 2


def test_dpo_starts_at_the_base_and_learns(tiny_model_dir, tmp_path):
    model, tokenizer = loaded(tiny_model_dir())
    trainer = dpo(model, tokenizer, tmp_path, ref_model=qrosa.reference_model(model), max_steps=6)
    assert trainer.ref_model.get_input_embeddings().weight is model.get_input_embeddings().weight
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0]
    assert masks_are_whole(model) and model.training


def test_masks_of_pairs_are_those_of_the_chosen_answers(tiny_model_dir, tmp_path):
    model, tokenizer = loaded(tiny_model_dir())
    trainer = dpo(model, tokenizer, tmp_path, ref_model=qrosa.reference_model(model))
    rows = list(dataloader_rows(trainer.get_train_dataloader(), 8, seed=0))
    told = {tokenizer.decode(row["input_ids"][0]) for row in rows}
    end = tokenizer.eos_token
    assert told == {row["prompt"] + row["chosen"] + end for row in pairs()}
    learnt = {tokenizer.decode(row["labels"][0][row["labels"][0] != -100]) for row in rows}
    assert learnt == {row["chosen"] + end for row in pairs()}


def test_reference_figures_made_beforehand_are_those_of_the_base(tiny_model_dir, tmp_path):
    """Also where the adapter does not start at zero: its own figures would be another reference."""
    model, tokenizer = loaded(tiny_model_dir())
    spoil(model)
    reference = qrosa.reference_model(model)
    trainer = dpo(model, tokenizer, tmp_path, ref_model=reference, precompute_ref_log_probs=True, max_steps=1)
    row = trainer.train_dataset[0]
    ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
    found = torch.log_softmax(logits(reference, ids)[0, :-1].float(), -1).gather(1, ids[0, 1:, None])
    assert row["ref_chosen_logps"] == pytest.approx(float(found[-len(row["chosen_ids"]) :].sum()), abs=0.02)
    trainer.train()
    assert trainer.state.global_step == 1


def test_answers_judged_good_or_bad(tiny_model_dir, tmp_path):
    model, tokenizer = loaded(tiny_model_dir())
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs(6)
        for side in ("chosen", "rejected")
    ]
    rows = datasets.Dataset.from_list(rows)
    reference = qrosa.reference_model(model)
    trainer = dpo(model, tokenizer, tmp_path, trainer=trl.KTOTrainer, rows=rows, ref_model=reference)
    chosen = list(dataloader_rows(trainer.get_train_dataloader(), 12, seed=0))
    assert sum(len(row["input_ids"]) for row in chosen) == 6
    trainer.train()
    assert masks_are_whole(model)


def test_a_second_model_is_refused_before_it_is_loaded(tiny_model_dir, tmp_path, monkeypatch):
    import trl.trainer.dpo_trainer as module

    monkeypatch.setattr(module, "create_model_from_path", lambda *_, **__: pytest.fail("a second model was loaded"))
    model, tokenizer = loaded(tiny_model_dir())
    for setting in ({}, {"precompute_ref_log_probs": True}):
        with pytest.raises(InputError, match="second, 16-bit model") as caught:
            dpo(model, tokenizer, tmp_path, **setting)
        assert "ref_model=qrosa.reference_model(model)" in caught.value.hint
    with pytest.raises(InputError, match=r"beta=0\.1 the trainer would load a second") as caught:
        grpo(model, tokenizer, tmp_path, beta=0.1)
    assert "qrosa.set_reference(trainer, beta=...)" in caught.value.hint


def test_a_reference_that_follows_the_model_is_refused(tiny_model_dir, tmp_path):
    model, tokenizer = loaded(tiny_model_dir())
    with pytest.raises(InputError, match="sync_ref_model copies parameters"):
        dpo(model, tokenizer, tmp_path, ref_model=qrosa.reference_model(model), sync_ref_model=True)


def test_a_reference_that_was_made_and_not_given_is_noticed(tiny_model_dir, tmp_path):
    model, tokenizer = loaded(tiny_model_dir())
    qrosa.reference_model(model)
    trainer = dpo(model, tokenizer, tmp_path)  # which loads the model a second time
    with pytest.raises(InputError, match="does not use the reference model"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_grpo_answers_and_learns(tiny_model_dir, tmp_path):
    model, tokenizer = loaded(tiny_model_dir())
    trainer = grpo(model, tokenizer, tmp_path)
    before = [parameter.clone() for parameter in trainable_parameters(model)]
    trainer.train()
    assert trainer.ref_model is None and trainer.state.global_step == 3
    assert masks_are_whole(model) and max(logged(trainer, "grad_norm")) > 0
    low_rank = [parameter for parameter in trainable_parameters(model) if parameter.dtype == torch.bfloat16]
    assert not all(torch.equal(old, new) for old, new in zip(before, low_rank, strict=True))


def test_masks_of_prompts_are_those_of_the_models_own_answers(tiny_model_dir, tmp_path):
    model, tokenizer = loaded(tiny_model_dir())
    trainer = grpo(model, tokenizer, tmp_path)
    state = torch.get_rng_state()

    def rows(seed):
        return list(
            trainer_rows(model, trainer.args, trainer.get_train_dataloader(), trainer.processing_class, 8, seed)
        )

    found = rows(1)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    texts = {tokenizer.decode(row["input_ids"][: row["labels"].count(-100)]) for row in found}
    assert texts == {row["prompt"] for row in prompts()}
    assert all(0 < len(row["labels"]) - row["labels"].count(-100) <= 8 for row in found)
    assert rows(1) == found != rows(2)


def test_messages_are_prompts_too(tiny_model_dir, tmp_path):
    model, tokenizer = loaded(tiny_model_dir())
    answer = answers_itself(model, tokenizer, temperature=1.0, longest=4, seed=0)
    row = answer([{"role": "user", "content": "how was the film?"}])
    known = row["input_ids"][: row["labels"].count(-100)]
    assert tokenizer.decode(known).endswith("<|im_start|>assistant\n")


def test_grpo_is_held_to_the_base(tiny_model_dir, tmp_path):
    model, tokenizer = loaded(tiny_model_dir())
    trainer = grpo(model, tokenizer, tmp_path, callback=RosaCallback({**MASKS, "warmup_steps": 3}), max_steps=3)
    qrosa.set_reference(trainer, beta=0.5)
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in own for parameter in trainer.ref_model.parameters())
    trainer.train()
    divergence = logged(trainer, "kl")
    assert divergence[0] == pytest.approx(0, abs=1e-6) and divergence[-1] > 1e-6
    with pytest.raises(InputError, match="no open place for a reference model"):
        qrosa.set_reference(trainer, beta=0.5)


@pytest.mark.parametrize(("name", "flags"), [("dpo", []), ("grpo", ["--answers=2", "--longest=4", "--beta=0.1"])])
def test_the_examples_train(tiny_model_dir, tmp_path, monkeypatch, name, flags):
    rows = [{**row, "solution": "a"} for row in pairs()]
    if name == "grpo":
        rows = [{"prompt": row["prompt"], "solution": row["solution"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "adapter"
    script = str(Path(__file__).parents[2] / "examples" / f"{name}_trainer.py")
    words = [script, str(tiny_model_dir()), str(tmp_path / "rows.jsonl"), str(output), "--max-steps=2", *flags]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runpy.run_path(script, run_name="__main__")
    model, _ = qrosa.load(str(tiny_model_dir()))
    qrosa.load_adapter(model, output)
    assert any(layer.nnz for layer in quantized_linears(model).values())
