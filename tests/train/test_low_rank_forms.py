"""A run with each form of the low-rank part: it resumes to the bit, and what is exported is what was trained."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qrosa.adapters.forms import FORMS, LORA
from qrosa.adapters.inject import quantized_linears
from qrosa.base.adapter_io import load_run_or_model
from qrosa.config import make_run_config
from qrosa.errors import InterruptedRunError
from qrosa.export.merge import merge
from qrosa.record.checkpoint import step_folder
from qrosa.sparse.store import read_adapter_config
from qrosa.train.run import finetune
from tests.train.conftest import losses
from tests.train.test_resume import Stop, adapter_bytes
from tests.train.test_trainer_callback import loaded, make_trainer, same

OTHERS = sorted(FORMS.keys() - {LORA.name})


@pytest.mark.parametrize("form", OTHERS)
def test_stopped_and_resumed_equals_one_go(settings, tmp_path, form):
    """SingLoRA's scale rises over ten steps: masks are picked and the run is stopped on the way."""
    values = settings(low_rank=form, alpha=8.0, max_steps=14, warmup_steps=4, dropout=0.1, eval_split="20%")
    whole, broken = (make_run_config({**values, "output": str(tmp_path / name)}) for name in ("whole", "broken"))
    finetune(whole)
    with pytest.raises(InterruptedRunError, match="after step 7"):
        finetune(broken, callbacks=[Stop(7)])
    modules = read_adapter_config(step_folder(tmp_path / "broken", 7))["modules"].values()
    risen = {"singlora": 0.7, "shared": 1.0}[form]
    assert [module["alpha"] for module in modules if module["rank"]] == pytest.approx([8 * risen] * len(modules))
    finetune(broken, resume=True)
    assert losses(broken.output) == losses(whole.output)
    assert adapter_bytes(broken.output) == adapter_bytes(whole.output)


@pytest.mark.parametrize("form", OTHERS)
def test_what_was_trained_is_what_is_exported(settings, tmp_path, form):
    run = tmp_path / "run"
    finetune(make_run_config({**settings(low_rank=form, max_steps=4, warmup_steps=2), "output": str(run)}))
    model, _, _ = load_run_or_model(str(run))
    merge(run, tmp_path / "merged", dtype="bf16")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    for path, layer in quantized_linears(model).items():
        assert torch.equal(state[f"{path}.weight"], layer.effective_weight(torch.bfloat16)), path


@pytest.mark.parametrize("form", OTHERS)
def test_a_trainer_resumes_too(tiny_model_dir, tmp_path, form):
    folder = tiny_model_dir()
    whole = make_trainer(folder, tmp_path, model=loaded(folder, low_rank=form))
    whole.train()
    resumed = make_trainer(folder, tmp_path / "resumed", model=loaded(folder, low_rank=form))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    alphas = {layer.alpha for layer in quantized_linears(whole.model).values() if layer.rank}
    assert alphas == {layer.alpha for layer in quantized_linears(resumed.model).values() if layer.rank} == {16.0}
