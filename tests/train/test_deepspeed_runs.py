"""DeepSpeed for real, on CPU processes: the same run as without it, killed and resumed to the same bits, exported."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import _review_row
from tests.train.conftest import losses
from tests.train.launch import adapter, launch, ranks

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def values(tiny_model_dir, tmp_path_factory):
    """``values("name", deepspeed="zero2")``: settings of a short run with an uneven batch, in a folder of its own."""
    folder = tmp_path_factory.mktemp("deepspeed")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(_review_row(index)) + "\n" for index in range(24)))

    def make(name, **changes):
        return {
            "model": str(tiny_model_dir()),
            "data": str(rows),
            "output": str(folder / name),
            "budget": "4%",
            "batch_size": 7,
            "max_steps": 6,
            "save_every": 2,
            "warmup_steps": 2,
            "mask_samples": 8,
            "lr": 5e-3,
            "sparse_lr": 1e-3,
            "dropout": 0.0,
            "eval_split": "20%",
            **changes,
        }

    return make


def run(values, **options):
    done = launch(values, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(values["output"])


@pytest.fixture(scope="module")
def plain(values):
    """The run without DeepSpeed, in one process."""
    return run(values("plain"))


@pytest.mark.parametrize(
    ("stage", "offload", "processes"),
    [("zero2", "none", 1), ("zero2", "optimizer", 2), ("zero3", "none", 2), ("zero3", "optimizer", 1)],
)
def test_the_run_is_that_of_plain_training(values, plain, tmp_path, stage, offload, processes):
    made = run(values(f"{stage}-{offload}", deepspeed=stage, offload=offload), processes=processes)
    one, other = losses(plain), losses(made)
    assert one.keys() == other.keys()
    # The same gradients in another order of adding up: fp32 rounding, then bf16 rounding of the low-rank part.
    tolerance = 1e-3 if processes == 1 else 1e-2
    assert all(abs(other[step] - one[step]) < tolerance * one[step] for step in one)
    # Masks come from the main process; values from sums that every process has a share of.
    assert len(ranks(made)) == processes
    assert len(set(ranks(made))) == 1
    first, second = adapter(plain), adapter(made)
    assert first.keys() == second.keys()
    if processes == 1:
        assert all(torch.equal(first[name], second[name]) for name in first if "sparse_col" in name)
    reports = [json.loads((path / "report.json").read_text()) for path in (plain, made)]
    assert reports[0]["tokens"] == reports[1]["tokens"]
    assert reports[0]["eval"]["supervised_tokens"] == reports[1]["eval"]["supervised_tokens"]
    if stage == "zero3":
        check_export(made, tmp_path / "exported")


def check_export(made, folder):
    """The merged model loads in plain transformers."""
    from transformers import AutoModelForCausalLM

    from qrosa.export.merge import merge

    merge(made, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("stage", "offload", "processes", "warmup"),
    [("zero2", "optimizer", 1, 5), ("zero3", "none", 2, 1)],
    ids=["stopped in warm-up", "stopped in joint training"],
)
def test_killed_and_resumed_equals_one_go(values, stage, offload, processes, warmup):
    settings = {"deepspeed": stage, "offload": offload, "warmup_steps": warmup, "dropout": 0.1}
    whole = run(values(f"whole-{stage}", **settings), processes=processes)
    broken = values(f"broken-{stage}", **settings)
    assert launch(broken, processes=processes, kill_at=5).returncode != 0
    assert max(losses(broken["output"])) == 5  # one step was done that no checkpoint knows of
    resumed = run(broken, processes=processes, resume=True)
    assert losses(resumed) == losses(whole)
    first, second = adapter(whole), adapter(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_zero3_run_goes_on_without_deepspeed(values, plain):
    """Checkpoints hold whole tensors under plain training's names."""
    settings = values("changed")
    assert launch({**settings, "deepspeed": "zero3"}, processes=2, kill_at=5).returncode != 0
    made = run(settings, resume=True)
    one, other = losses(plain), losses(made)
    assert all(abs(other[step] - one[step]) < 1e-2 * one[step] for step in one)
