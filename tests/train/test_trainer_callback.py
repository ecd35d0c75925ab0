"""RosaCallback inside transformers' Trainer and TRL's SFTTrainer: phases, both rates, checkpoints, and refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed

import qrosa
from qrosa.adapters.inject import adapter_parameters, adapter_state, quantized_linears
from qrosa.errors import InputError, TrainingError
from qrosa.train.trainer_callback import RosaCallback
from qrosa.train.trainer_checkpoint import INDEX_FILE
from qrosa.train.trainer_rows import dataloader_rows

STEPS, WARMUP = 6, 2
MASKS = {"mask_samples": 6, "warmup_steps": WARMUP}


class Watch(TrainerCallback):
    """Keeps each step's rates and number of sparse values."""

    def __init__(self):
        self.rates, self.nnz = [], []

    def on_optimizer_step(self, args, state, control, optimizer=None, model=None, **_):
        self.rates.append([group["lr"] * group["scale"] for group in optimizer.param_groups])
        self.nnz.append(sum(layer.nnz for layer in quantized_linears(model).values()))


def encoded(tokenizer, count=12):
    """Rows whose prompts carry no loss."""
    rows = []
    for index in range(count):
        prompt = tokenizer(f"Review {index}: the film was {'good' if index % 2 else 'bad'}")["input_ids"]
        answer = tokenizer(" positive" if index % 2 else " negative")["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def loaded(folder, **adapter):
    return qrosa.load(str(folder), qrosa.AdapterConfig(**{"rank": 2, "density": 0.01, "dropout": 0.1, **adapter}))


def make_trainer(folder, output, *, model=None, callback=None, optimizer=None, watch=(), **arguments):
    """A trainer over the tiny model in ``folder``; two micro-batches of two rows a step."""
    set_seed(1)
    tokenizer = None
    if model is None:
        model, tokenizer = loaded(folder)
    else:
        model, tokenizer = model
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        **arguments,
    }
    return Trainer(
        model,
        TrainingArguments(str(output), **settings),
        train_dataset=encoded(tokenizer),
        eval_dataset=encoded(tokenizer, 4),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[callback or RosaCallback(MASKS), *watch],
        optimizers=(optimizer or qrosa.optimizer(model, lr=5e-3, sparse_lr=1e-3), None),
    )


def losses(trainer):
    return {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tiny_model_dir, tmp_path_factory):
    """A run from start to end: (trainer, output folder, what was watched)."""
    output, watch = tmp_path_factory.mktemp("whole"), Watch()
    trainer = make_trainer(tiny_model_dir(), output, watch=[watch], warmup_steps=2, lr_scheduler_type="linear")
    trainer.train()
    return trainer, output, watch


def test_masks_are_picked_after_warmup_and_both_parts_are_trained(whole):
    trainer, _, watch = whole
    wanted = sum(trainer.model.qrosa_allocation.nnz.values())
    assert watch.nnz == [0] * WARMUP + [wanted] * (STEPS - WARMUP)
    low_rank, sparse = adapter_parameters(trainer.model)
    assert trainer.optimizer.optimizer.inner.groups["low_rank"].master.dtype == torch.float32
    assert all(bool(values.any()) for values in sparse if values.numel())
    start = adapter_parameters(loaded(trainer.model.config.name_or_path)[0]).low_rank
    assert not any(torch.equal(a, b) for a, b in zip(low_rank, start, strict=True))
    assert losses(trainer)[STEPS] < losses(trainer)[1]


def test_one_schedule_turns_both_rates_and_the_sparse_one_rises_from_the_selection_on(whole):
    _, _, watch = whole
    factors = [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]  # the trainer's own: two steps of rise, then down to zero
    assert [rate[0] for rate in watch.rates] == pytest.approx([5e-3 * factor for factor in factors])
    rises = [1 / 3, 2 / 3, 1, 1]  # from the selection after step 2
    expected = [1e-3 * factor * rise for factor, rise in zip(factors[WARMUP:], rises, strict=True)]
    assert [rate[1] for rate in watch.rates[WARMUP:]] == pytest.approx(expected)


def test_masks_are_those_of_the_trainers_own_rows(whole, tiny_model_dir, tmp_path):
    trainer, output, _ = whole
    before, _ = loaded(tiny_model_dir())
    qrosa.load_adapter(before, output / f"checkpoint-{WARMUP}")
    rows = list(dataloader_rows(trainer.get_train_dataloader(), MASKS["mask_samples"], seed=42))
    assert len(rows) == MASKS["mask_samples"]
    assert all(-100 in row["labels"].tolist()[0] for row in rows)
    others = list(dataloader_rows(trainer.get_train_dataloader(), MASKS["mask_samples"], seed=1))
    picked = {path: layer.sparse_delta().positions() for path, layer in quantized_linears(trainer.model).items()}

    def in_common(samples):
        chosen = qrosa.select_masks(before, samples, nnz=trainer.model.qrosa_allocation.nnz)
        both = sum(int(torch.isin(chosen[path], positions).sum()) for path, positions in picked.items())
        return both / sum(positions.numel() for positions in picked.values())

    # The trainer's loss is computed in chunks, so where two scores are nearly one the order may differ.
    shares = in_common(rows), in_common(others)
    assert shares[0] > 0.97 and shares[0] > shares[1] + 0.1, shares


def test_a_checkpoint_is_the_adapter_alone(whole):
    trainer, output, _ = whole
    folder = output / f"checkpoint-{STEPS}"
    weights = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    assert sorted(weights) == ["adapter.safetensors", "training_args.bin"]
    again, _ = qrosa.load(str(trainer.model.config.name_or_path))
    qrosa.load_adapter(again, folder)
    assert same(adapter_state(again), adapter_state(trainer.model))


@pytest.mark.parametrize("step", [1, WARMUP, WARMUP + 1, STEPS - 1])
def test_a_resumed_run_ends_where_the_whole_one_did(whole, tiny_model_dir, tmp_path, step, caplog):
    trainer, output, _ = whole
    again = make_trainer(tiny_model_dir(), tmp_path, warmup_steps=2, lr_scheduler_type="linear")
    again.train(resume_from_checkpoint=str(output / f"checkpoint-{step}"))
    assert losses(again) == losses(trainer)
    assert same(adapter_state(again.model), adapter_state(trainer.model))
    assert "keys in the checkpoint" not in caplog.text


def test_the_callback_itself_can_be_restored(whole, tiny_model_dir, tmp_path):
    trainer, output, _ = whole
    again = make_trainer(
        tiny_model_dir(),
        tmp_path,
        callback=RosaCallback(),  # of other settings: those of the checkpoint are taken
        warmup_steps=2,
        lr_scheduler_type="linear",
        restore_callback_states_from_checkpoint=True,
    )
    again.train(resume_from_checkpoint=str(output / "checkpoint-1"))
    assert same(adapter_state(again.model), adapter_state(trainer.model))


def test_the_best_checkpoint_is_loaded_at_the_end(tiny_model_dir, tmp_path):
    trainer = make_trainer(
        tiny_model_dir(),
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worst, which comes before the masks
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert int(best.name.removeprefix("checkpoint-")) <= WARMUP
    again, _ = qrosa.load(str(tiny_model_dir()))
    qrosa.load_adapter(again, best)
    assert same(adapter_state(again), adapter_state(trainer.model))


def test_masks_that_are_there_are_kept(tiny_model_dir, tmp_path):
    model, tokenizer = loaded(tiny_model_dir())
    qrosa.select_masks(model, encoded(tokenizer))
    before = {path: layer.sparse_delta().positions() for path, layer in quantized_linears(model).items()}
    trainer = make_trainer(None, tmp_path, model=(model, tokenizer), max_steps=2)
    trainer.train()
    for path, layer in quantized_linears(model).items():
        assert torch.equal(before[path], layer.sparse_delta().positions())


def test_a_low_rank_adapter_alone_has_no_selection(tiny_model_dir, tmp_path):
    watch = Watch()
    trainer = make_trainer(
        None, tmp_path, model=loaded(tiny_model_dir(), density=0.0), watch=[watch], max_steps=2, save_strategy="no"
    )
    trainer.train()
    assert watch.nnz == [0, 0]


def test_packed_rows_are_taken_apart():
    packed = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
        "labels": torch.tensor([[-100, 6, -100, 8, 9]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
    }
    loader = torch.utils.data.DataLoader([packed], collate_fn=lambda rows: rows[0])
    rows = list(dataloader_rows(loader, 1, seed=0))
    assert [row["input_ids"].tolist() for row in rows] == [[5, 6], [7, 8, 9]]
    assert [row["labels"].tolist() for row in rows] == [[-100, 6], [-100, 8, 9]]


def test_a_streamed_data_set_gives_its_first_rows():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            number = 0
            while True:
                yield {"input_ids": torch.tensor([[number, 1]]), "labels": torch.tensor([[number, 1]])}
                number += 1

    loader = torch.utils.data.DataLoader(Endless(), collate_fn=lambda rows: rows[0])
    assert [int(row["input_ids"][0, 0]) for row in dataloader_rows(loader, 3, seed=0)] == [0, 1, 2]


def test_batches_without_labels_are_refused():
    loader = torch.utils.data.DataLoader([{"chosen": 1}], collate_fn=lambda rows: rows[0])
    with pytest.raises(InputError, match="the trainer's batches hold chosen"):
        list(dataloader_rows(loader, 1, seed=0))


def test_rows_of_another_objective_are_refused_before_the_first_step(tiny_model_dir, tmp_path):
    trainer = make_trainer(tiny_model_dir(), tmp_path)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {"completion_mask": (batch := collate(rows)).pop("labels") > 0, **batch}
    with pytest.raises(InputError, match="hold attention_mask, completion_mask, input_ids: no"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_of_which_nothing_would_train_is_refused(tiny_model_dir, tmp_path):
    optimizer = qrosa.optimizer(loaded(tiny_model_dir())[0])
    with pytest.raises(InputError, match="no adapter: nothing would train"):
        make_trainer(None, tmp_path, model=qrosa.load(str(tiny_model_dir())), optimizer=optimizer)
    model, tokenizer = loaded(tiny_model_dir())
    own = qrosa.optimizer(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="the adapter is frozen"):
        make_trainer(None, tmp_path, model=(model, tokenizer), optimizer=own)


def test_an_adapter_that_freezes_later_is_refused(tiny_model_dir, tmp_path):
    trainer = make_trainer(tiny_model_dir(), tmp_path)
    for parameter in trainer.model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises((InputError, TrainingError), match="frozen"):
        trainer.train()


def test_another_optimizer_is_refused(tiny_model_dir, tmp_path):
    trainer = make_trainer(tiny_model_dir(), tmp_path)
    trainer.optimizer = None  # as it is where a trainer is given none
    with pytest.raises(InputError, match="optimizes with AdamW, which has no fp32 masters"):
        trainer.train()
    other = qrosa.optimizer(loaded(tiny_model_dir())[0])
    with pytest.raises(InputError, match="of another adapter than its model's"):
        make_trainer(tiny_model_dir(), tmp_path, optimizer=other).train()


@pytest.mark.parametrize(
    ("name", "setting"),
    [("DeepSpeed", {"deepspeed_plugin": object()}), ("FSDP", {"fsdp": True}), ("several cards", {"_n_gpu": 2})],
)
def test_engines_that_take_parameters_apart_are_refused(tiny_model_dir, tmp_path, name, setting):
    trainer = make_trainer(tiny_model_dir(), tmp_path)
    vars(trainer.args).update(setting)
    with pytest.raises(InputError, match=f"a trainer with {name}"):
        RosaCallback().on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


@pytest.mark.parametrize("off", [True, False])
def test_trls_switch_for_dropout_reaches_the_low_rank_parts(tiny_model_dir, tmp_path, off):
    trainer = make_trainer(tiny_model_dir(), tmp_path)
    parts = [layer.low_rank for layer in quantized_linears(trainer.model).values() if layer.low_rank is not None]
    for part in parts:
        part.dropout = 0.1
    trainer.args.disable_dropout = off
    RosaCallback().on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert parts and {part.dropout for part in parts} == {0.0 if off else 0.1}


def test_a_launchers_engine_is_refused_too(tiny_model_dir, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model_dir(), tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="a trainer with FSDP"):
        RosaCallback().on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


# A trainer in one of two processes, from start to end and then again from the middle on; each leaves its own adapters.
_WORKER = """
import json, os, sys
import torch
from safetensors.torch import save_file
from tests.train.test_trainer_callback import adapter_state, loaded, losses, make_trainer

folder, output = sys.argv[1:]
torch.set_num_threads(1)
for name, resume in (("whole", None), ("resumed", f"{output}/checkpoint-3")):
    trainer = make_trainer(None, output, model=loaded(folder, dropout=0.0), gradient_accumulation_steps=1)
    trainer.train(resume_from_checkpoint=resume)
    save_file(adapter_state(trainer.model), f"{output}/{name}{os.environ['RANK']}.safetensors")
    if trainer.is_world_process_zero():
        open(f"{output}/{name}.json", "w").write(json.dumps(list(losses(trainer).values())))
"""


def test_two_processes_train_as_one_does(tiny_model_dir, tmp_path):
    one = make_trainer(None, tmp_path / "one", model=loaded(tiny_model_dir(), dropout=0.0))
    one.train()
    adapter, output = adapter_state(one.model), tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    surroundings = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [*torchrun, sys.executable, "-c", _WORKER, str(tiny_model_dir()), str(output)]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, *others = [load_file(output / f"{name}{rank}.safetensors") for name in ("whole", "resumed") for rank in "01"]
    assert all(same(whole, other) for other in others)
    together, resumed = (json.loads((output / f"{name}.json").read_text()) for name in ("whole", "resumed"))
    assert together == resumed
    # Gradients of half a step are rounded to bf16 apart.
    assert together == pytest.approx(list(losses(one).values()), rel=5e-3)
    columns = [name for name in adapter if name.endswith("sparse_col")]
    agreeing = sum(int((adapter[name] == whole[name]).sum()) for name in columns)
    assert agreeing > 0.9 * sum(adapter[name].numel() for name in columns) > 0


def test_a_checkpoint_of_another_base_is_refused(whole, tiny_model_dir, tmp_path):
    _, output, _ = whole
    folder = tmp_path / "checkpoint-3"
    subprocess.run(["cp", "-r", str(output / "checkpoint-3"), str(folder)], check=True)
    path = folder / "trainer_state.json"
    document = json.loads(path.read_text())
    document["stateful_callbacks"]["RosaCallback"]["attributes"]["base"] = "0" * 64
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="trained on another base"):
        make_trainer(tiny_model_dir(), tmp_path / "out").train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_without_the_optimizer_is_refused(tiny_model_dir, tmp_path):
    make_trainer(tiny_model_dir(), tmp_path, save_only_model=True, max_steps=3).train()
    with pytest.raises(InputError, match="no optimizer state"):
        make_trainer(tiny_model_dir(), tmp_path).train(resume_from_checkpoint=True)


def test_an_index_names_what_a_fresh_model_holds(whole, tiny_model_dir):
    _, output, _ = whole
    index = json.loads((output / f"checkpoint-{STEPS}" / INDEX_FILE).read_text())
    assert set(index["weight_map"]) <= set(loaded(tiny_model_dir())[0].state_dict())


def test_packed_rows_of_trl_are_trained_on(tiny_model_dir, tmp_path):
    trl = pytest.importorskip("trl", reason="of TRL's SFTTrainer")
    datasets = pytest.importorskip("datasets", reason="TRL takes rows as the datasets library holds them")
    model, tokenizer = loaded(tiny_model_dir())
    rows = [{"prompt": f"Review {index}: the film was good", "completion": " positive"} for index in range(16)]
    trainer = trl.SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=trl.SFTConfig(
            str(tmp_path), max_steps=3, packing=True, max_length=64, bf16=False, save_strategy="no", report_to="none"
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[RosaCallback({"mask_samples": 4, "warmup_steps": 1})],
        optimizers=(qrosa.optimizer(model), None),
    )
    taken_apart = list(dataloader_rows(trainer.get_train_dataloader(), len(rows), seed=0))
    longest = max(len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows) + 1  # and an end
    assert len(trainer.train_dataset) < len(taken_apart) == len(rows)
    assert all(len(row["input_ids"]) <= longest for row in taken_apart)
    trainer.train()
    assert sum(layer.nnz for layer in quantized_linears(model).values()) == sum(model.qrosa_allocation.nnz.values())


def test_the_example_trains_and_resumes_in_a_fresh_process(tiny_model_dir, tiny_rows, tmp_path):
    pytest.importorskip("trl", reason="the example is of TRL's SFTTrainer")

    def run(output, *arguments):
        script = Path(__file__).parents[2] / "examples" / "sft_trainer.py"
        command = [sys.executable, str(script), str(tiny_model_dir()), str(tiny_rows()), str(output), *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        model, _ = qrosa.load(str(tiny_model_dir()))
        qrosa.load_adapter(model, output)
        return adapter_state(model)

    whole = run(tmp_path / "run", "--max-steps", "4")
    assert any(name.endswith("sparse_values") for name in whole)
    for name in ("checkpoint-4", "adapter.safetensors"):
        subprocess.run(["rm", "-r", str(tmp_path / "run" / name)], check=True)
    assert same(run(tmp_path / "run", "--max-steps", "4", "--resume"), whole)
