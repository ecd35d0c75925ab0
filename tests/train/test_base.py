"""The base that a run trains on: made for it by error feedback, given, or refused."""

from __future__ import annotations

import json

import pytest

from qrosa.base.adapter_io import load_run_or_model
from qrosa.base.open import open_base
from qrosa.calibrate.quantize import quantize
from qrosa.calibrate.settings import QuantizeConfig
from qrosa.errors import InputError
from qrosa.train.run import finetune

ROWS = [[number % 400 + 5 for number in range(start, start + 200)] for start in range(8)]


def adapter_base(run):
    return json.loads((run / "adapter" / "adapter_config.json").read_text())["base"]


def test_a_run_makes_its_base_and_keeps_it(config, tmp_path):
    made = config(base_rounding="feedback", seed=3)
    report = finetune(made)
    run = tmp_path / "run"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("run")) == ["run"]
    kept = open_base(str(run / "base"))
    assert kept.kind == "nf4" and adapter_base(run)["source"] == str(run / "base")
    assert adapter_base(run)["fingerprint"] == kept.fingerprint()
    assert report["steps"] == 6
    memory = report["memory"]
    # No comparison: what is measured is the peak of this process, which other tests have filled.
    assert memory["measured"]["quantise"] > 0 and memory["planned"]["quantise"] > 0
    load_run_or_model(str(run))


def test_a_run_that_goes_on_keeps_its_base(config, tmp_path):
    made = config(base_rounding="feedback", save_every=3)
    whole = finetune(made)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run" / "base").glob("*.safetensors")}
    again = finetune(made, resume=True)
    assert again["loss"]["last"] == whole["loss"]["last"]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run" / "base").glob("*.safetensors")}
    assert not (tmp_path / "run.base").exists()


def test_a_run_takes_the_base_that_it_is_given(config, tmp_path, recorder):
    made = config(base=str(tmp_path / "better"), sparse_init="residual")
    quantize(QuantizeConfig(made.model, made.train.base, rows=6, length=32, held_out=2), ROWS)
    finetune(made, callbacks=[recorder])
    assert adapter_base(tmp_path / "run")["source"] == str(tmp_path / "better")
    # The 16-bit weights are --model's, so the sparse part starts at what the given base lost.
    assert not any("already quantised" in notice for notice in recorder.notices)


def test_a_base_of_another_model_is_refused(config, tmp_path, tiny_model_dir):
    other = str(tiny_model_dir("qwen3"))
    quantize(QuantizeConfig(other, str(tmp_path / "other"), rows=4, length=32, held_out=2), ROWS)
    with pytest.raises(InputError, match="was not made of"):
        finetune(config(base=str(tmp_path / "other")))
    with pytest.raises(InputError, match="not in 4 bits"):
        finetune(config(base=other))
    with pytest.raises(InputError, match="in 4 bits already"):
        finetune(config(model=str(tmp_path / "other"), base_rounding="feedback"))
    assert not (tmp_path / "run").exists()


def test_a_base_that_lacks_what_its_repair_holds_is_refused(config, tmp_path):
    made = config(base=str(tmp_path / "repaired"))
    quantize(QuantizeConfig(made.model, made.train.base, density=0.02, rows=6, length=32, held_out=2), ROWS)
    with pytest.raises(InputError, match="made for the repair beside it"):
        finetune(made)
    assert not (tmp_path / "run").exists()


def test_two_bases_contradict_each_other(config):
    with pytest.raises(InputError, match="contradict"):
        config(base="somewhere", base_rounding="feedback")
