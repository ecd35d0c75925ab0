"""The engine over flat masters, in one process: AdamW's own steps, states that come back, and what it takes."""

import builtins
import dataclasses
import gc
import os
import sys

import pytest
import torch

from qrosa.config import TrainConfig
from qrosa.errors import InputError
from qrosa.optim.zero.masters import Masters
from qrosa.optim.zero.settings import zero_settings

deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

CPU = torch.device("cpu")
BUCKET = 4096


def settings(stage="zero2", offload="none", bucket=BUCKET):
    made = zero_settings(TrainConfig(deepspeed=stage, offload=offload))
    small = {key: bucket for key in made.zero if "bucket" in key or "live" in key}
    if made.stage == 3:
        small["sub_group_size"] = 2 * bucket  # several sub-groups a part
    return dataclasses.replace(made, bucket=bucket, zero={**made.zero, **small})


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """An engine leaves the environment as it was; the kind of device is DeepSpeed's for good."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    before = dict(os.environ)
    yield
    assert {name: os.environ.get(name) for name in ("LOCAL_RANK", "RANK")} == {
        name: before.get(name) for name in ("LOCAL_RANK", "RANK")
    }


def masters(scale=BUCKET):
    """Neither part is a multiple of anything that matters."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"low_rank": 3 * scale + 101, "sparse": scale + 77}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def gradients(like, step):
    generator = torch.Generator().manual_seed(step + 1)
    return {name: torch.randn(flat.shape, generator=generator) for name, flat in like.items()}


def make(values, chosen):
    from qrosa.optim.zero.engine import ZeroEngine

    return ZeroEngine(values, chosen, device=CPU, weight_decay=0.01, max_grad_norm=1.0)


RATES = {"low_rank": 1e-2, "sparse": 1e-3}


def advance(engine, like, steps):
    return [engine.step(gradients(like, step), RATES) for step in steps]


def test_pieces_get_the_gradient_that_is_handed_over():
    values = masters()
    module = Masters(values, BUCKET, 1024)
    handed = gradients(values, 0)
    module(handed, 2.0).backward()
    for name, flat in handed.items():
        received = torch.cat([parameter.grad for parameter in module.of(name)])
        assert torch.equal(received[: flat.numel()], 2 * flat)
        assert not received[flat.numel() :].any()


@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_steps_are_adamws_and_go_on_bit_for_bit(stage, offload):
    values, chosen = masters(), settings(stage, offload)
    reference = {name: torch.nn.Parameter(flat.clone()) for name, flat in values.items()}
    adamw = torch.optim.AdamW(
        [{"params": [reference[name]], "lr": RATES[name]} for name in values], weight_decay=0.01, fused=True
    )
    engine = make(values, chosen)
    for step in range(3):
        norm = engine.step(gradients(values, step), RATES)
        for name, gradient in gradients(values, step).items():
            reference[name].grad = gradient
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(list(reference.values()), 1.0)), rel=1e-5)
        adamw.step()
    state = engine.state_tensors()
    for name, parameter in reference.items():
        # The clip's factor may round otherwise in its last bit.
        torch.testing.assert_close(state[f"{name}.master"], parameter.detach(), rtol=1e-5, atol=1e-6)
        assert state[f"{name}.step"] == 3
        assert torch.equal(torch.cat([piece.clone() for piece in engine.pieces(name)]), state[f"{name}.master"])
    advance(engine, values, range(3, 6))
    whole = engine.state_tensors()
    engine.close()

    again = make({name: state[f"{name}.master"] for name in values}, chosen)
    again.load_states(state)
    restored = again.state_tensors()
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], state[name]) for name in state)
    advance(again, values, range(3, 6))
    resumed = again.state_tensors()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert again.state_tensors(wanted=False) == {}
    again.close()


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_gradient_that_is_not_finite_changes_nothing(stage):
    values = masters()
    engine = make(values, settings(stage, "optimizer"))
    advance(engine, values, range(2))
    before = engine.state_tensors()
    assert engine.step({name: torch.full_like(flat, float("nan")) for name, flat in values.items()}, RATES) == float(
        "inf"
    )
    after = engine.state_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    engine.close()


def test_only_stage_2_has_flat_masters():
    for stage in ("zero2", "zero3"):
        engine = make(masters(), settings(stage))
        flat = engine.flat("sparse")
        assert (flat is not None) == (stage == "zero2")
        if flat is not None:
            before = flat.clone()
            advance(engine, masters(), range(1))
            assert flat.data_ptr() == engine.flat("sparse").data_ptr()
            assert not torch.equal(flat, before)
        engine.close()


def test_a_part_without_states_starts_from_nothing():
    """The sparse part is born when the low-rank part has taken steps."""
    values = masters()
    low = {"low_rank": values["low_rank"]}
    engine = make(low, settings())
    advance(engine, low, range(2))
    state = engine.state_tensors()
    engine.close()
    both = make({"low_rank": state["low_rank.master"], "sparse": values["sparse"]}, settings())
    both.load_states(state)
    advance(both, values, range(1))
    found = both.state_tensors()
    assert (found["low_rank.step"], found["sparse.step"]) == (3, 1)
    both.close()


def _tensor_bytes():
    """Bytes of all plain tensors that are alive, each storage once; other tests may leave fake ones, without data."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_it_takes_what_the_plan_says(stage, offload):
    """Device and host are one here: both columns of the plan together."""
    from types import SimpleNamespace

    from qrosa.planner.bytes.zero import host_bytes, resident_bytes

    scale, chosen = 1 << 18, settings(stage, offload, bucket=1 << 16)
    values = masters(scale)
    low, high = (flat.numel() for flat in values.values())
    work = SimpleNamespace(zero=chosen, processes=1, on_cpu=True)
    before = _tensor_bytes()
    engine = make(values, chosen)
    engine.step(gradients(values, 0), RATES)
    taken = _tensor_bytes() - before
    planned = sum(resident_bytes(work, low, high).values()) + sum(host_bytes(work, low, high).values())
    planned += 4 * high if stage == "zero2" else 0  # which the plan counts as the model's own sparse values
    engine.close()
    assert taken == pytest.approx(planned, rel=0.03)


def test_without_deepspeed_there_is_an_error_with_a_remedy(monkeypatch):
    from qrosa.optim.zero.engine import check_available

    real = builtins.__import__

    def blocked(name, *arguments, **more):
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", blocked)
    monkeypatch.delitem(sys.modules, "deepspeed")
    with pytest.raises(InputError, match="deepspeed, which is not installed") as refused:
        check_available(settings(), "cpu")
    assert "pip install 'deepspeed>=" in refused.value.hint


def test_an_old_deepspeed_is_refused(monkeypatch):
    from qrosa.optim.zero.engine import check_available

    monkeypatch.setattr(deepspeed, "__version__", "0.19.7+abc")
    with pytest.raises(InputError, match="abc is too old"):
        check_available(settings(), "cpu")


def test_accelerates_own_deepspeed_is_refused(monkeypatch):
    from qrosa.optim.zero.engine import check_available

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="accelerate was told"):
        check_available(settings(), "cpu")


def nvme(folder, bucket=1 << 18):
    chosen = zero_settings(TrainConfig(offload=f"optimizer=nvme:{folder}"))
    small = {key: bucket for key in chosen.zero if "bucket" in key or "live" in key} | {"sub_group_size": 2 * bucket}
    return dataclasses.replace(chosen, bucket=bucket, zero={**chosen.zero, **small})


def test_a_drive_that_cannot_be_used_is_refused(tmp_path):
    from qrosa.optim.zero.engine import check_available

    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        check_available(nvme(tmp_path / "file" / "folder"), "cpu")


def test_without_libaio_a_drive_is_refused(tmp_path, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    from qrosa.optim.zero.engine import check_available

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(InputError, match="libaio and its header") as refused:
        check_available(nvme(tmp_path), "cpu")
    assert "libaio-dev" in refused.value.hint


def test_engines_on_one_drive_have_folders_of_their_own(tmp_path):
    """DeepSpeed's files are named by the order of parameters, which two runs have in common."""
    from qrosa.optim.zero.engine import _own_folder

    chosen = nvme(tmp_path / "drive")
    folders = [_own_folder(chosen) for _ in range(2)]
    assert len({*folders}) == 2 and {*folders} == {str(path) for path in (tmp_path / "drive").iterdir()}
    told = chosen.config(1, 1.0, folders[0])["zero_optimization"]["offload_optimizer"]
    assert told == {**chosen.zero["offload_optimizer"], "nvme_path": folders[0]}
    assert chosen.zero["offload_optimizer"]["nvme_path"] == str(tmp_path / "drive")
    assert _own_folder(settings(offload="optimizer")) is None


def test_a_closed_engine_takes_its_folder_with_it(tmp_path, monkeypatch):
    from qrosa.optim.zero import engine as offload

    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "1.tensor.swp").write_bytes(b"states")
    monkeypatch.setattr(offload, "_own_folder", lambda chosen: str(tmp_path / "own"))
    engine = make(masters(), settings(offload="optimizer"))
    assert (tmp_path / "own").exists()
    engine.close()
    assert list(tmp_path.iterdir()) == []


def _has_async_io():
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible(verbose=False)


@pytest.mark.skipif(not _has_async_io(), reason="libaio and its header are not installed (apt install libaio-dev)")
@pytest.mark.timeout(600)  # the first run builds async_io
def test_on_a_drive_steps_are_those_in_memory(tmp_path):
    values = masters(1 << 18)  # smaller tensors than 1 MB are not swapped
    here, there = make(values, settings("zero3", bucket=1 << 18)), None
    norms = advance(here, values, range(4))
    expected = here.state_tensors()
    here.close()
    there = make(values, nvme(tmp_path))
    assert advance(there, values, range(2)) == pytest.approx(norms[:2], rel=1e-5)
    assert any(path.stat().st_size for path in tmp_path.rglob("*.swp"))
    state = there.state_tensors()
    there.close()
    again = make({name: state[f"{name}.master"] for name in values}, nvme(tmp_path / "again"))
    again.load_states(state)
    advance(again, values, range(2, 4))
    found = again.state_tensors()
    again.close()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
