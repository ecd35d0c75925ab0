"""Whole runs: what lies in the folder, the shapes of a run, and what is refused before anything is written."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qrosa.config import make_run_config, read_yaml, to_flat
from qrosa.errors import InputError, StorageError, TrainingError
from qrosa.record.checkpoint import checkpoint_steps
from qrosa.train import step as step_module
from qrosa.train.run import finetune
from tests.train.conftest import losses

METRICS = {
    "step", "phase", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "tokens_per_s", "memory"
}  # fmt: skip


def metrics(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_its_folder_is_complete(config, recorder):
    settings = config(max_steps=12, eval_split="25%", eval_every=5, save_every=4, keep=2)
    report = finetune(settings, callbacks=[recorder])
    run = Path(settings.output)

    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "plan.json", "metrics.jsonl", "eval.jsonl", "checkpoints", "adapter", "report.json",
        "report.html", "README.md", "run.json",
    }  # fmt: skip
    assert report["loss"]["last"] < 0.7 * report["loss"]["first"]
    assert report == json.loads((run / "report.json").read_text())
    assert set(report) >= {"steps", "seconds", "tokens_per_s", "loss", "eval", "memory", "micro_batch_changes"}
    assert set(report["memory"]["measured"]) == {"load", "select", "train", "eval", "save"}
    assert all(size > 0 for size in report["memory"]["measured"].values())
    assert set(report["eval"]) == {"rows", "supervised_tokens", "loss", "perplexity"}
    assert [step for step, _ in recorder.evaluations] == [5, 10, 12]
    assert checkpoint_steps(run) == [12, 8]
    assert [line.step for line in recorder.steps] == list(range(1, 13))

    lines = metrics(run)
    assert all(set(line) == METRICS for line in lines)
    assert [line["phase"] for line in lines] == ["warmup"] * 2 + ["select"] + ["train"] * 10
    assert lines[2]["step"] == 2
    assert all(line["tokens"] > line["supervised_tokens"] > 0 for line in lines)


def test_the_config_in_the_run_is_resolved_and_makes_the_same_run(config, tmp_path):
    settings = config(max_steps=3)
    finetune(settings)
    stored = read_yaml(Path(settings.output) / "config.yaml")
    assert stored["seq_len"] == 256  # the tiny model's limit
    assert stored["checkpointing"] in ("on", "off")
    assert stored["warmup_steps"] == 2
    assert int(stored["micro_batch"]) >= 1
    again = make_run_config({**stored, "output": str(tmp_path / "again")})
    finetune(again)
    assert losses(again.output) == losses(settings.output)
    assert {k: v for k, v in to_flat(again).items() if k != "output"} == {
        k: v for k, v in yaml.safe_load((tmp_path / "again" / "config.yaml").read_text()).items() if k != "output"
    }


def test_the_same_seed_gives_the_same_run_and_another_seed_another(config, tmp_path):
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finetune(config(max_steps=3, seed=seed, output=str(tmp_path / name)))
        runs[name] = (losses(tmp_path / name), (tmp_path / name / "adapter" / "adapter.safetensors").read_bytes())
    assert runs["a"] == runs["b"]
    assert runs["a"][0] != runs["c"][0]


@pytest.mark.parametrize(
    ("values", "phases", "tensors"),
    [
        ({"sparse_share": 0.0}, ["train"] * 3, {"low_rank_A", "low_rank_B"}),
        ({"sparse_share": 1.0}, ["select", *["train"] * 3], {"sparse_values", "sparse_col", "sparse_row_ptr"}),
        ({"warmup_steps": 0}, ["select", *["train"] * 3], {"low_rank_A", "sparse_values"}),
        ({"rank": 2, "density": "1%", "low_rank_init": "svd"}, ["warmup"] * 2 + ["select", "train"], {"low_rank_A"}),
        ({"mask_score": "residual", "mask_scope": "global"}, ["warmup"] * 2 + ["select", "train"], {"sparse_values"}),
        (
            {"mask_score": "curvature", "mask_selection": "stream"},
            ["warmup"] * 2 + ["select", "train"],
            {"sparse_values"},
        ),
        ({"mask_score": "random", "sparse_init": "zero"}, ["warmup"] * 2 + ["select", "train"], {"sparse_values"}),
        ({"optimizer": "adamw8bit", "checkpointing": "on"}, ["warmup"] * 2 + ["select", "train"], {"sparse_values"}),
    ],
)
def test_shapes_of_a_run(config, values, phases, tensors):
    settings = config(max_steps=3, **values)
    finetune(settings)
    assert [line["phase"] for line in metrics(settings.output)] == phases
    names = {name.rpartition(".")[2] for name in load_file(Path(settings.output) / "adapter" / "adapter.safetensors")}
    assert tensors <= names
    assert ("low_rank_A" in names) == (values.get("sparse_share") != 1.0)
    assert ("sparse_values" in names) == (values.get("sparse_share") != 0.0)


def test_checkpointing_changes_nothing_but_memory(config, tmp_path):
    found = []
    for mode in ("on", "off"):
        finetune(config(max_steps=4, checkpointing=mode, dropout=0.2, output=str(tmp_path / mode)))
        found.append(losses(tmp_path / mode))
    assert found[0] == found[1]


def inject(monkeypatch, act):
    """Let ``act(call number, batch)`` happen before each training forward pass; its answer scales the loss."""
    real, calls = step_module.model_loss, []

    def patched(model, batch, chunk_tokens):
        calls.append(batch)
        loss, count = real(model, batch, chunk_tokens)
        factor = act(len(calls), batch)
        return (loss if factor is None else loss * factor), count

    monkeypatch.setattr(step_module, "model_loss", patched)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(config, monkeypatch, value):
    settings = config(max_steps=8, save_every=2, micro_batch="6")
    inject(monkeypatch, lambda call, batch: value if call == 6 else None)
    with pytest.raises(TrainingError, match=r"diverged at step 6: the loss is (nan|inf)") as stopped:
        finetune(settings)
    assert stopped.value.exit_code == 4
    assert f"the last good checkpoint is {settings.output}/checkpoints/step-4" in stopped.value.hint
    assert max(losses(settings.output)) == 5
    assert not (Path(settings.output) / "adapter").exists()


def test_zero_gradients_fail_loudly(config, monkeypatch):
    inject(monkeypatch, lambda call, batch: 0.0)
    with pytest.raises(TrainingError, match="gradient of the low-rank part was exactly zero over its first 3 steps"):
        finetune(config(sparse_share=0.0))


def test_an_unchanged_adapter_fails_loudly(config):
    with pytest.raises(TrainingError, match="low-rank part has not changed"):
        finetune(config(lr=1e-60, sparse_share=0.0, max_steps=2))


def test_a_step_without_supervised_tokens_fails_loudly(config, monkeypatch):
    from qrosa.train import loop

    monkeypatch.setattr(loop, "supervised_tokens", lambda row: 0)
    with pytest.raises(InputError, match="no supervised token"):
        finetune(config())


def out_of_memory(most_rows):
    def act(call, batch):
        if len(batch.row_ids) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return act


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_effective_batch(config, monkeypatch, recorder, tmp_path):
    values = {"batch_size": 8, "max_steps": 4, "dropout": 0.0, "eval_split": "20%"}
    finetune(config(**values, micro_batch="8", output=str(tmp_path / "free")))
    inject(monkeypatch, out_of_memory(most_rows=2))
    report = finetune(config(**values, micro_batch="8", output=str(tmp_path / "tight")), callbacks=[recorder])
    assert [(change["step"], change["where"]) for change in report["micro_batch_changes"]] == [(1, "train")] * 2
    assert report["micro_batch"]["rows"] == 2
    assert sum("out of memory" in text for text in recorder.notices) == 2
    free, tight = losses(tmp_path / "free"), losses(tmp_path / "tight")
    # Same rows, same weights; only bf16 rounding of differently shaped products differs.
    assert tight.keys() == free.keys()
    assert all(abs(tight[step] - free[step]) < 0.03 * free[step] for step in free)


def test_out_of_memory_with_a_single_row_does_not_fit(config, monkeypatch):
    inject(monkeypatch, out_of_memory(most_rows=0))
    with pytest.raises(Exception, match=r"one row of .* tokens does not fit") as stopped:
        finetune(config())
    assert stopped.value.exit_code == 3


def test_out_of_memory_in_evaluation_leaves_training_alone(config, monkeypatch):
    from qrosa.train import evaluate as module

    real = module.evaluate_loss

    def tight(model, rows, *, max_tokens, **rest):
        if max_tokens > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, rows, max_tokens=max_tokens, **rest)

    monkeypatch.setattr(module, "evaluate_loss", tight)
    report = finetune(config(eval_split="30%", micro_batch="5"))
    assert {change["where"] for change in report["micro_batch_changes"]} == {"eval"}
    assert report["micro_batch"]["rows"] == 5
    assert report["eval"]["rows"] == 7


@pytest.mark.parametrize(
    "values",
    [
        {"data": "/nowhere/rows.jsonl"},
        {"budget": "250%"},
        {"budget": "0.0001%"},
        {"model": "/nowhere/model"},
        {"seq_len": 100_000},
        {"eval_data": "/nowhere/eval.jsonl"},
    ],
)
def test_bad_input_leaves_no_folder(settings, values):
    with pytest.raises(InputError):
        finetune(make_run_config(settings(**values)))
    assert not Path(settings()["output"]).exists()


def test_a_paged_optimizer_on_the_cpu_says_so(config, recorder):
    finetune(config(optimizer="paged-adamw8bit", max_steps=2), callbacks=[recorder])
    assert any("nothing to page" in text for text in recorder.notices) or torch.cuda.is_available()


def test_a_missing_tracker_is_named(config, monkeypatch):
    monkeypatch.setattr("qrosa.train.trackers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--log-to wandb needs the package wandb"):
        finetune(config(log_to="wandb"))
    assert not Path(config().output).exists()


def test_an_existing_output_is_refused(config, tmp_path):
    run = Path(config().output)
    run.mkdir()
    (run / "letters.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        finetune(config())
    with pytest.raises(InputError, match="is not a qrosa run"):
        finetune(config(), force=True)
    assert [p.name for p in run.iterdir()] == ["letters.txt"]
    with pytest.raises(InputError, match="no run to resume"):
        finetune(config(), resume=True)


def test_force_starts_over_and_leaves_other_files_alone(config):
    finetune(config(max_steps=3))
    run = Path(config().output)
    (run / "letters.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty") as refused:
        finetune(config(max_steps=2))
    assert refused.value.hint == "--resume goes on with it, --force starts over"
    finetune(config(max_steps=2, warmup_steps=1), force=True)
    assert list(losses(run)) == [1, 2]
    assert checkpoint_steps(run) == [2, 1]
    assert (run / "letters.txt").read_text() == "mine"


def test_an_output_below_a_file_or_without_permission_is_refused(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        finetune(config(output=str(tmp_path / "file")))
    with pytest.raises(InputError, match="lies below a file"):
        finetune(config(output=str(tmp_path / "file" / "run")))
    monkeypatch.setattr("qrosa.record.folder.os.access", lambda path, mode: False)
    with pytest.raises(StorageError, match="cannot be written"):
        finetune(config())


class Checker(HTMLParser):
    """Notes what a page would load, and whether its tags close."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.counts = [], [], {}

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_page_is_self_contained(config):
    settings = config(max_steps=5, eval_split="25%", eval_every=2)
    finetune(settings)
    text = (Path(settings.output) / "report.html").read_text()
    page = Checker()
    page.feed(text)
    assert page.open == []
    assert page.loads == []
    assert "script" not in page.counts
    assert "http" not in text
    assert page.counts["svg"] == 9  # the losses on two scales
    assert "prefers-color-scheme:dark" in text
    card = (Path(settings.output) / "README.md").read_text()
    assert "Use" in card and "fingerprint" in card and "None" not in card
