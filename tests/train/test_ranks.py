"""Ranks by sensitivity in a run: where they go, what is kept of them, and what never measures again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qrosa
from qrosa.adapters.budget import allocate
from qrosa.adapters.inject import linear_shapes, quantized_linears
from qrosa.adapters.rank_units import RankUnit
from qrosa.base.load import load_base
from qrosa.config import AdapterConfig, DataConfig, MaskConfig, TrainConfig, make_run_config, to_flat
from qrosa.errors import InputError, InterruptedRunError
from qrosa.masks.selection_rows import Sample
from qrosa.masks.sensitivity import measure_sensitivity
from qrosa.measure.card import hidden_bytes
from qrosa.measure.trace import Trace
from qrosa.measure.tracker import StorageTracker
from qrosa.model.modes import set_attention, set_checkpointing
from qrosa.train import ranks as ranks_module
from qrosa.train.run import finetune
from qrosa.train.selection import sample_loss
from tests.plans import plan
from tests.train.conftest import Recorder, losses

SMALL = {"rank_by": "sensitivity", "budget": "1%", "max_steps": 4}  # less than one rank everywhere


def stored_ranks(run):
    modules = json.loads((Path(run) / "adapter" / "adapter_config.json").read_text())["modules"]
    return {path: module["rank"] for path, module in modules.items() if module["rank"]}


def document(run, name):
    return json.loads((Path(run) / name).read_text())


def test_ranks_go_to_the_matrices_with_large_gradients(config, monkeypatch, tmp_path):
    seen = {}
    real = ranks_module.measure_sensitivity

    def keep(*arguments, **keywords):
        seen.update(real(*arguments, **keywords))
        return seen

    monkeypatch.setattr(ranks_module, "measure_sensitivity", keep)
    settings = config(**SMALL, sparse_share=0.0)
    recorder = Recorder()
    report = finetune(settings, callbacks=[recorder])
    found = stored_ranks(settings.output)

    model = load_base(settings.model)[0]
    shapes = {linear.path: linear for linear in linear_shapes(model)}
    assert set(seen) == set(shapes)
    best = max(shapes, key=lambda path: seen[path] / RankUnit((shapes[path],)).cost(1))
    without = {path for path in shapes if path not in found}
    assert best in found and without
    # Of two matrices that cost the same, one without a rank is not the more sensitive one.
    for path in without:
        for other in found:
            if RankUnit((shapes[other],)).cost(1) == RankUnit((shapes[path],)).cost(1):
                assert seen[other] >= seen[path]

    in_order = config(**SMALL | {"rank_by": "order"}, sparse_share=0.0, output=str(tmp_path / "order"))
    finetune(in_order)
    assert stored_ranks(in_order.output) != found
    assert report["where"] == document(settings.output, "plan.json")["budget"]["where"]
    assert report["where"][-1] == "ranks follow sensitivities measured on training rows"
    assert set(report["where"]) <= set(recorder.notices)
    assert report["where"][1] in (Path(settings.output) / "README.md").read_text()
    # Measuring is a phase of its own here, where no mask is selected.
    for kind in ("planned", "measured"):
        assert list(report["memory"][kind])[:2] == ["load", "select"]


def test_a_matrix_that_the_loss_cannot_feel_gets_no_rank(settings, tmp_path):
    values = settings(**SMALL, sparse_share=0.0)
    folder = tmp_path / "deaf"
    folder.mkdir()
    for source in Path(values["model"]).iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    deaf = "model.layers.1.self_attn."
    tensors[f"{deaf}o_proj.weight"] = torch.zeros_like(tensors[f"{deaf}o_proj.weight"])  # cuts q, k and v off
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    finetune(make_run_config({**values, "model": str(folder)}))
    found = stored_ranks(values["output"])
    assert found and not {f"{deaf}{kind}_proj" for kind in "qkv"} & set(found)


@pytest.mark.parametrize("at", [1, 3])  # before and after the masks are picked
def test_a_resumed_run_takes_the_ranks_of_its_checkpoint(config, monkeypatch, tmp_path, at):
    whole = config(**SMALL, output=str(tmp_path / "whole"))
    finetune(whole)
    broken = config(**SMALL, output=str(tmp_path / "broken"))

    class Stop(Recorder):
        def on_step(self, record):
            if record.step == at:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(InterruptedRunError):
        finetune(broken, callbacks=[Stop()])

    def never(*arguments, **keywords):
        raise AssertionError("measured again")

    monkeypatch.setattr(ranks_module, "measure_sensitivity", never)
    report = finetune(broken, resume=True)
    assert losses(broken.output) == losses(whole.output)
    for name in ("adapter.safetensors", "adapter_config.json"):
        one, other = ((Path(run.output) / "adapter" / name).read_bytes() for run in (broken, whole))
        assert one == other
    assert report["where"] == document(whole.output, "report.json")["where"]
    changed = make_run_config({**to_flat(broken), "rank_by": "order"})
    with pytest.raises(InputError, match="--rank-by was sensitivity"):
        finetune(changed, resume=True)


def test_ranks_given_back_leave_the_sparse_part_what_they_left_then(tiny_model_dir):
    model = load_base(str(tiny_model_dir()))[0]
    shapes, parameters = linear_shapes(model), model.num_parameters()
    settings = AdapterConfig(budget="1%", rank_by="sensitivity")
    sensitivity = {path: float(index) for index, path in enumerate(quantized_linears(model))}
    first = allocate(settings, shapes, parameters, sensitivity=sensitivity)
    kept = {path: rank for path, rank in first.ranks.items() if rank}
    assert allocate(settings, shapes, parameters, ranks=kept) == first
    assert allocate(settings, shapes, parameters) != first
    assert allocate(settings, shapes, parameters).trainable == first.trainable


def test_two_processes_have_the_ranks_of_one(settings, tmp_path):
    values = settings(**SMALL, dropout=0.0)
    finetune(make_run_config({**values, "output": str(tmp_path / "one")}))
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys, torch\n"
        "from qrosa.config import make_run_config\n"
        "from qrosa.train import ranks\n"
        "from qrosa.train.run import finetune\n"
        "torch.set_num_threads(1)\n"
        "real = ranks.measure_sensitivity\n"
        "def other_on_the_second(*a, **k):\n"
        "    found, second = real(*a, **k), torch.distributed.get_rank() == 1\n"
        "    return {path: float(number) for number, path in enumerate(found)} if second else found\n"
        "ranks.measure_sensitivity = other_on_the_second\n"
        "finetune(make_run_config(json.loads(sys.argv[1])))\n"
    )
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]), "ACCELERATE_USE_CPU": "true"
    }  # fmt: skip
    two = json.dumps({**values, "output": str(tmp_path / "two")})
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker), two]
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert stored_ranks(tmp_path / "two") == stored_ranks(tmp_path / "one")


@pytest.mark.parametrize("changes", [{"rank": 4, "density": 0.01}, {"sparse_share": 1.0}, {"rank_by": "importance"}])
def test_settings_that_leave_nothing_to_share_out(config, changes):
    with pytest.raises(InputError, match="--rank-by"):
        config(**{**SMALL, **changes})


def test_from_python_there_are_no_rows_to_measure_on(tiny_model_dir, tmp_path):
    with pytest.raises(InputError, match="there are none here") as refused:
        qrosa.load(tmp_path / "not even read", AdapterConfig(budget="1%", rank_by="sensitivity"))
    assert "qrosa finetune --rank-by sensitivity" in refused.value.hint


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_measuring_takes_what_is_planned(smollm2, checkpointing):
    """Tensors on the CPU, counted as they come and go, against the plan of a run without masks."""
    adapter = AdapterConfig(budget="0.3%", sparse_share=0, rank_by="sensitivity")
    train = TrainConfig(checkpointing=checkpointing, batch_size=1, micro_batch="1")
    made = plan(str(smollm2), adapter, MaskConfig(), DataConfig(seq_len=96), train, device="cpu")
    assert any("measured after loading; planned with the default order" in line for line in made.where)
    assert made.phases["select"].device["gradient_norms"] < made.phases["train"].device["optimizer"]

    trace = Trace(load_base(str(smollm2))[0], made.work, StorageTracker("cpu", hidden=hidden_bytes))
    set_attention(trace.model, made.work.attention)
    set_checkpointing(trace.model, made.work.checkpointing)
    trace.model.train()
    row = Sample(list(range(5, 101)), list(range(5, 101)))
    with trace.tracker, trace.tracker.watching(trace.model):
        trace._count_model()
        with trace.tracker.phase() as found:
            measure_sensitivity(trace.model, [row], loss=sample_loss(made.work.loss_chunk_tokens))
    assert 0.95 < made.phases["select"].tensor_total / found[0].total < 1.05
