"""The model block by block against the model in one piece, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qrosa.base.blocks import Block, BlockwiseModel, Run
from qrosa.base.open import open_base
from tests.conftest import TINY_FAMILIES

IDS = torch.randint(0, 460, (5, 24), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_gives_the_whole_models_hidden_states(family: str, tiny_model_dir: Callable[..., Path]) -> None:
    folder = tiny_model_dir(family)
    blockwise = BlockwiseModel(open_base(str(folder)), CPU, micro_batch=2)  # 5 rows: 2, 2 and 1
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(blockwise.run(IDS), expected, rtol=1e-4, atol=1e-4)


def test_weights_are_there_during_a_visit_only(tiny_model_dir: Callable[..., Path]) -> None:
    blockwise = BlockwiseModel(open_base(str(tiny_model_dir("llama"))), CPU)
    seen: list[str] = []

    def visit(block: Block, run: Run) -> Tensor:
        assert all(not linear.weight.is_meta for linear in block.linears().values())
        others = [other for other in blockwise.blocks if other is not block]
        assert all(linear.weight.is_meta for other in others for linear in other.linears().values())
        assert torch.equal(run(), run())
        seen.extend(block.linears())
        return run()

    blockwise.run(IDS, visit)
    assert all(linear.weight.is_meta for block in blockwise.blocks for linear in block.linears().values())
    assert len(seen) == 14 and seen[0] == "model.layers.0.self_attn.q_proj"


def test_what_a_visit_returns_goes_on(tiny_model_dir: Callable[..., Path]) -> None:
    blockwise = BlockwiseModel(open_base(str(tiny_model_dir("llama"))), CPU)
    inputs: list[Tensor] = []

    def visit(block: Block, run: Run) -> Tensor:
        handle = block.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        output = run()
        handle.remove()
        return output * 0 if block.index == 0 else output

    blockwise.run(IDS, visit)
    assert float(inputs[0].abs().max()) > 0 and float(inputs[1].abs().max()) == 0
