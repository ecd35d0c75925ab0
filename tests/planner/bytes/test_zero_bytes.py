"""What a plan says of ZeRO: its memory on card and host, what it sends, and when optimizer offload loses."""

import dataclasses

import pytest

from bench.real_models import MODELS
from qrosa.base.shape import from_config
from qrosa.config import AdapterConfig, DataConfig, MaskConfig, TrainConfig
from qrosa.planner.bytes.zero import drive_bytes, host_bytes, offload_seconds, resident_bytes, step_bytes
from qrosa.planner.cards import Machines, find_card, find_network
from qrosa.planner.reasons import reasons
from qrosa.planner.search.whatif import what_if
from qrosa.planner.time.estimate import all_reduce_bytes
from tests.plans import plan

LLAMA = from_config("Llama-3.1-8B", MODELS["Llama-3.1-8B"].config)
MIB = 2**20


def planned(vram="24GB", budget="0.3%", machines=None, seq_len=2048, **train):
    settings = TrainConfig(vram=vram, **train)
    adapter, data = AdapterConfig(budget=budget), DataConfig(seq_len=seq_len)
    return plan(LLAMA, adapter, MaskConfig(), data, settings, device="cuda", machines=machines)


def parameters(made):
    return made.allocation.low_rank_parameters, made.allocation.sparse_parameters


def test_one_process_keeps_all_of_it():
    made = planned(deepspeed="zero2")
    low, high = parameters(made)
    device = resident_bytes(made.work, low, high)
    # Low-rank masters once as DeepSpeed's working copy; then masters and two states of everything.
    assert device["optimizer"] == pytest.approx(4 * low + 12 * (low + high), rel=1e-3)
    assert host_bytes(made.work, low, high) == {}
    assert made.phases["train"].device["optimizer"] == device["optimizer"]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_processes_have_half_each(stage):
    work = planned(deepspeed=stage).work
    low, high = work.allocation.low_rank_parameters, work.allocation.sparse_parameters
    one, two = (resident_bytes(dataclasses.replace(work, processes=n), low, high)["optimizer"] for n in (1, 2))
    whole = 4 * low if stage == "zero2" else 0
    assert two - whole == pytest.approx((one - whole) / 2, rel=1e-3)


def test_offload_moves_states_to_the_host():
    here, there = planned(deepspeed="zero2"), planned(offload="auto,optimizer")
    low, high = parameters(here)
    freed = sum(resident_bytes(here.work, low, high).values()) - sum(resident_bytes(there.work, low, high).values())
    assert freed == pytest.approx(12 * (low + high) - 16 * MIB, rel=0.01)  # less the bucket that comes with it
    host = there.phases["train"].host["offloaded_optimizer"]
    # Five fp32 copies; torch rounds those that are pinned up to powers of two.
    assert 20 * (low + high) + 16 * MIB < host < 32 * (low + high) + 16 * MIB
    assert step_bytes(there.work, low, high) < step_bytes(here.work, low, high)


def test_selection_has_the_low_rank_states_on_the_host():
    """The optimizer of warm-up stays where it is while masks are picked."""
    made = planned(offload="auto,optimizer")
    low, _ = parameters(made)
    assert (
        made.phases["select"].host["offloaded_optimizer"]
        == host_bytes(made.work, low, 0)["offloaded_optimizer"]
        > 20 * low
    )
    paged = planned(optimizer="paged-adamw8bit")
    there = paged.phases["select"].host["paged_optimizer"]
    assert 0 < there < paged.phases["train"].host["paged_optimizer"]


def test_a_drive_leaves_buffers_on_the_host():
    made = planned(offload="auto,optimizer=nvme:/mnt/drive", budget="2%")
    low, high = parameters(made)
    host = host_bytes(made.work, low, high)["offloaded_optimizer"]
    assert host < 0.75 * 16 * (low + high)
    assert drive_bytes(made.work) == pytest.approx(16 * (low + high), rel=1e-3)


def test_large_buckets_are_counted(tmp_path):
    """DeepSpeed's default bucket of 5e8 elements would take 2 GB."""
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8}}')
    small, large = planned(deepspeed="zero3"), planned(deepspeed=str(path))
    name = "deepspeed_buckets"
    more = large.phases["train"].device[name] - small.phases["train"].device[name]
    assert more == 4 * (500_000_000 - 4_194_304)


def test_offload_loses_where_nothing_needs_the_memory():
    made = planned(offload="auto,optimizer")
    assert reasons(made)["deepspeed"].startswith("loses: the same settings fit without")
    assert made.settings["deepspeed"] == "ZeRO-2, optimizer in host memory"


def test_offload_pays_where_it_lets_more_fit():
    """A large budget on a card that is nearly full without it."""
    budget = "3%"
    full = next(gb for gb in range(8, 40) if planned(f"{gb}GB", budget, offload="optimizer", micro_batch="1").fits)
    made = planned(f"{full}GB", budget, offload="optimizer", micro_batch="1")
    assert not planned(f"{full}GB", budget, deepspeed="zero2", offload="none", micro_batch="1").fits
    assert reasons(made)["deepspeed"].endswith("without it nothing fits")


def test_offload_on_a_cpu_loses():
    made = plan(
        LLAMA, AdapterConfig(budget="0.3%"), MaskConfig(), DataConfig(seq_len=512),
        TrainConfig(vram="64GB", offload="optimizer"), device="cpu",
    )  # fmt: skip
    assert "one memory" in reasons(made)["deepspeed"]


def test_a_step_with_offload_takes_longer_by_copy_and_adam():
    work = planned(offload="optimizer").work
    card = find_card("rtx4090")
    trained = work.allocation.trainable
    seconds = offload_seconds(work, card.link, card.bandwidth)
    assert seconds > 8 * trained / card.link
    assert seconds < 0.2  # 24M parameters


def test_the_estimated_step_has_the_offloads_time_and_shares_it_out():
    card = find_card("rtx4090")
    one, four = Machines(card), Machines(card, 4)

    def optimizer(machines, **train):
        return planned(machines=machines, **train).estimate().seconds["optimizer"]

    plain = optimizer(one)
    assert optimizer(four) == optimizer(one, deepspeed="zero2") == plain
    assert optimizer(four, deepspeed="zero2") == pytest.approx(plain / 4)
    offloaded = planned(machines=one, offload="auto,optimizer")
    words = f"{offloaded.estimate().seconds['optimizer'] - plain:.2f} s a step"
    assert words in reasons(offloaded)["deepspeed"] and words != "0.00 s a step"
    shared = planned(machines=four, offload="auto,optimizer").estimate()
    assert shared.seconds["optimizer"] < 0.3 * offloaded.estimate().seconds["optimizer"]


def test_every_card_sends_masters_too():
    machines = Machines(find_card("rtx4090"), 1, 4, find_network("10gbe"))
    plain, zero2, zero3 = (
        all_reduce_bytes(planned(machines=machines, deepspeed=stage).work, 4) for stage in (None, "zero2", "zero3")
    )
    assert zero2 == pytest.approx(1.5 * plain)
    assert zero3 == pytest.approx(2 * plain)
    assert planned(machines=machines, deepspeed="zero2").work.processes == 4


def test_suggestions_and_what_if_rows_keep_the_optimizer_where_it_is():
    made = planned(offload="auto,optimizer")
    assert made.offload.endswith("optimizer")
    assert any(row.planned for row in what_if(made))
