"""Choosing settings under a cap: always within it, never wasteful, and honest when nothing fits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.real_models import LARGE, MODELS
from qrosa.base.shape import from_config
from qrosa.config import AdapterConfig, DataConfig, MaskConfig, TrainConfig
from qrosa.errors import DoesNotFitError, InputError
from qrosa.planner import hardware
from qrosa.planner.hardware import Here
from qrosa.planner.reasons import reasons
from qrosa.planner.search.alternatives import alternatives, require_fit
from qrosa.planner.search.solve import TIE
from qrosa.planner.show import document, memory_table, verdict
from tests.plans import made, plan

GB = 2**30
SHAPES = {name: from_config(name, model.config) for name, model in (MODELS | LARGE).items()}
SMOL = from_config(
    "smol",
    {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
     "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192},
)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_7_to_14b_model_trains_on_24_gb(name: str) -> None:
    found = made(SHAPES[name])
    assert found.fits and found.peak <= 24 * GB and alternatives(found) == []
    require_fit(found)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    gigabytes=st.floats(5, 80),
    seq_len=st.integers(16, 4096),
    batch=st.integers(1, 64),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    device=st.sampled_from(["cuda", "cpu"]),
)
def test_what_fits_is_within_the_cap(
    name: str, gigabytes: float, seq_len: int, batch: int, share: float, device: str
) -> None:
    cap = int(gigabytes * GB)
    found = made(SHAPES[name], cap, seq_len=seq_len, batch_size=batch, sparse_share=share, device=device)
    work = found.work
    if found.fits:
        assert max(found.bytes_of(memory) for memory in found.phases.values()) <= cap
    else:  # then nothing fits: no lever, tried by itself with a single row at a time
        for checkpointing, offload in itertools.product(("on", "off"), ("none", "activations", "activations,base")):
            levers = {"checkpointing": checkpointing, "offload": offload, "micro_batch": "1"}
            if offload == "none" or (device == "cuda" and checkpointing == "on"):
                tried = made(
                    SHAPES[name], cap, seq_len=seq_len, batch_size=batch, sparse_share=share, device=device, **levers
                )
                assert tried.peak > cap
    assert work.length <= work.tokens <= max(work.length, batch * work.length, 8192)
    assert 1 <= work.rows <= batch and 1 <= work.loss_chunk_tokens <= max(work.tokens, 64)
    for memory in found.phases.values():
        assert all(size > 0 for size in memory.device.values())


def test_more_memory_never_gives_slower_settings() -> None:
    speeds = []
    for gigabytes in (8, 12, 16, 24, 40, 80):
        work = made(SHAPES["Llama-3.1-8B"], gigabytes * GB).work
        speeds.append((not work.checkpointing, work.tokens))
    assert speeds == sorted(speeds)
    assert speeds[0][0] is False and speeds[-1][0] is True


def test_a_fixed_micro_batch_and_fixed_checkpointing_are_kept() -> None:
    work = made(SHAPES["Llama-3.1-8B"], 80 * GB, micro_batch="2", checkpointing="on", seq_len=1024).work
    assert (work.rows, work.tokens, work.checkpointing) == (2, 2048, True)


def test_short_rows_need_less_than_the_seq_len() -> None:
    long, short = made(SHAPES["Llama-3.1-8B"]), made(SHAPES["Llama-3.1-8B"], longest_row=200)
    assert short.work.length == 200 and short.settings["longest_row"] == 200 and long.work.length == 2048
    assert not short.work.checkpointing or short.work.tokens > 200
    assert made(SHAPES["Llama-3.1-8B"], longest_row=10**6).work.length == 2048


def test_what_does_not_fit_names_what_would() -> None:
    found = made(SHAPES["Llama-3.1-8B"], 8 * GB, offload="none")
    assert not found.fits
    ways = {way.setting: way for way in alternatives(found)}
    assert {"offload", "seq_len", "vram"} <= set(ways)
    assert made(SHAPES["Llama-3.1-8B"], 8 * GB, offload=ways["offload"].value).fits
    assert made(SHAPES["Llama-3.1-8B"], 8 * GB, offload="none", seq_len=int(ways["seq_len"].value)).fits
    assert made(SHAPES["Llama-3.1-8B"], int(float(ways["vram"].value[:-2]) * GB), offload="none").fits
    with pytest.raises(DoesNotFitError, match=r"8\.00 GiB") as caught:
        require_fit(found)
    assert "--seq-len" in caught.value.hint


def test_forced_settings_that_do_not_fit_are_the_first_to_give_way() -> None:
    found = made(SHAPES["Llama-3.1-8B"], 12 * GB, micro_batch="32", checkpointing="off")
    assert not found.fits
    assert alternatives(made(SHAPES["Llama-3.1-8B"], 11 * GB, micro_batch="16"))[0].setting == "micro_batch"
    big = made(SHAPES["Llama-3.1-8B"], 9 * GB, budget="5%")
    assert "budget" in {way.setting for way in alternatives(big)}


def test_levers_are_pulled_in_the_order_that_they_cost() -> None:
    pulled = []
    for gigabytes in (80, 24, 9, 7, 5):
        work = made(SHAPES["Llama-3.1-8B"], gigabytes * GB, seq_len=2048).work
        pulled.append((work.checkpointing, work.offload_activations, work.streamed))
    assert pulled == sorted(pulled)
    assert pulled[0] == (False, False, False) and pulled[-1] == (True, True, True)


def test_a_larger_card_keeps_more_of_a_streamed_base() -> None:
    llama = SHAPES["Llama-3.1-8B"]
    made_for = [made(llama, cap * GB, offload="activations,base", micro_batch="1") for cap in (5, 7, 9, 24)]
    resident = [found.work.resident_blocks for found in made_for]
    assert resident == sorted(resident) and resident[0] < resident[1] < resident[2] and resident[3] == 32
    assert all(found.fits for found in made_for)


def test_a_streamed_base_is_on_the_host_and_crosses_the_bus() -> None:
    streamed = made(SHAPES["Llama-3.1-8B"], 5 * GB, offload="base")
    whole = made(SHAPES["Llama-3.1-8B"], offload="none")
    train = streamed.phases["train"]
    assert streamed.offload == "base" and not streamed.work.offload_activations
    assert train.host["pinned_base"] >= whole.phases["train"].device["base"] > 3 * train.device["base"]
    assert document(streamed)["traffic"]["base"] > train.host["pinned_base"]
    mapped = made(SHAPES["Llama-3.1-8B"], 5 * GB, offload="base=disk:/scratch")
    assert mapped.offload == "base=disk:/scratch" and "pinned_base" not in mapped.phases["train"].host


def test_the_cpu_offloads_only_when_asked() -> None:
    assert made(SMOL, 1 * GB, device="cpu", seq_len=512).offload == "none"
    assert made(SMOL, 8 * GB, device="cpu", seq_len=512, offload="activations,base").offload == "activations,base"


def test_mask_groups_take_what_is_left_and_no_more_than_asked() -> None:
    exact = {"mask_selection": "exact"}
    small, large = (made(SHAPES["Llama-3.1-8B"], size * GB, **exact) for size in (8, 80))
    assert small.mask_passes > large.mask_passes == 1
    asked = made(SHAPES["Llama-3.1-8B"], 80 * GB, mask_memory="1GB", **exact)
    assert asked.work.mask_group_bytes == GB and asked.mask_passes > 1
    assert made(SHAPES["Llama-3.1-8B"], mask_score="random").mask_passes == 0


@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize(("name", "size"), [("Llama-3.1-8B", 8), ("Llama-3.1-8B", 24), ("Llama-3.1-70B", 24)])
def test_masks_are_selected_in_one_pass(name: str, size: int, scope: str) -> None:
    found = made(SHAPES[name], size * GB, mask_scope=scope)
    assert found.fits and found.mask_passes == 1
    assert found.settings["mask_selection"] == "stream" and 4 <= found.settings["mask_candidates"] <= 32
    assert "exact statistics take" in reasons(found)["mask_selection"]


def test_candidates_take_what_is_left_and_no_more_than_asked() -> None:
    few, many = (made(SHAPES["Llama-3.1-8B"], size * GB) for size in (8, 12))
    assert 4 <= few.work.mask_candidates < many.work.mask_candidates <= 32
    bound = made(SHAPES["Llama-3.1-8B"], 12 * GB, mask_memory="1GB")
    assert 0 < bound.phases["select"].device["mask_statistics"] <= GB
    assert bound.work.mask_candidates < many.work.mask_candidates
    assert made(SHAPES["Llama-3.1-8B"], 12 * GB, mask_memory="256MB").mask_selection == "exact"


def test_the_way_that_is_asked_for_is_planned() -> None:
    assert made(SHAPES["Llama-3.1-8B"], 80 * GB).mask_selection == "exact"
    streamed = made(SHAPES["Llama-3.1-8B"], 80 * GB, mask_selection="stream")
    assert streamed.mask_selection == "stream" and streamed.mask_passes == 1
    assert streamed.phases["select"].device_total < made(SHAPES["Llama-3.1-8B"], 80 * GB).phases["select"].device_total
    assert made(SHAPES["Llama-3.1-8B"], mask_selection="stream", mask_score="random").mask_selection is None


def test_the_cpu_counts_the_whole_process() -> None:
    found = made(SMOL, 8 * GB, device="cpu", seq_len=512)
    assert found.fits and found.settings["device"] == "cpu" and found.work.attention == "sdpa"
    assert made(SMOL, 8 * GB, device="cpu", seq_len=256).work.attention == "eager"
    train = found.phases["train"]
    assert found.planned["train"] == train.device_total + train.host_total


def test_without_a_cap_the_card_then_the_host_is_the_cap() -> None:
    on_host = made(SMOL, None, here=Here(card=None, host=16 * GB))
    assert (on_host.settings["device"], on_host.request.cap) == ("cpu", 16 * GB)
    on_card = made(SMOL, None, here=Here(card=12 * GB, host=16 * GB))
    assert (on_card.settings["device"], on_card.request.cap) == ("cuda", 12 * GB)
    assert (
        plan(SMOL, AdapterConfig(budget="1%"), MaskConfig(), DataConfig(), TrainConfig(vram="6GB")).request.cap
        == 6 * GB
    )


def test_this_machine_has_memory() -> None:
    assert hardware.host_memory() > 2**28
    assert hardware.card_memory() is None or hardware.card_memory() > 2**30


def test_the_document_adds_up_and_is_json() -> None:
    shown = json.loads(json.dumps(document(made(SHAPES["Mistral-7B"]))))
    assert {"model", "budget", "settings", "phases", "peak", "vram", "fits"} <= set(shown)
    assert {"trainable", "share", "rank", "density", "nnz"} <= set(shown["budget"])
    assert shown["budget"]["share"] <= 0.003
    for phase in shown["phases"].values():
        for side in ("device", "host"):
            assert phase[side]["total"] == sum(size for name, size in phase[side].items() if name != "total")
    assert shown["peak"] == max(phase["device"]["total"] for phase in shown["phases"].values())
    assert shown["vram"] == 24 * GB and shown["fits"] is True


def test_the_table_and_the_verdict_read_well() -> None:
    from rich.console import Console

    found = made(SHAPES["Mistral-7B"])
    console = Console(width=120, record=True, file=Path("/dev/null").open("w"))
    console.print(memory_table(found))
    text = console.export_text()
    assert all(word in text for word in ("base", "train", "export", "device", "disk"))
    assert verdict(found).startswith("fits:") and "at " in verdict(found)
    assert set(reasons(found)) <= set(found.settings)


def test_more_than_the_model_reads() -> None:
    with pytest.raises(InputError, match="more than the model reads"):
        made(SHAPES["Gemma-2-9B"], seq_len=10_000)


def test_capped_scores_need_plain_attention() -> None:
    assert made(SHAPES["Gemma-2-9B"], 48 * GB).work.attention == "eager"
    assert made(SHAPES["Qwen3-8B"]).work.attention == "sdpa"


def test_the_fastest_that_fits_is_chosen_and_the_reason_says_over_what() -> None:
    from qrosa.planner.cards import Machines, find_card
    from qrosa.planner.time.estimate import estimate

    card = Machines(find_card("rtx4060"))
    free = made(SHAPES["Llama-3.1-8B"], 7 * GB, seq_len=512, machines=card)
    times = []
    for offload in ("none", "activations", "activations,base"):
        for rows in ("1", "2", "4", "8", "16"):
            forced = made(SHAPES["Llama-3.1-8B"], 7 * GB, seq_len=512, machines=card, offload=offload, micro_batch=rows)
            if forced.fits:
                times.append(estimate(forced.work, 32, card).step_seconds)
    chosen = estimate(free.work, 32, card).step_seconds
    assert free.fits and times and chosen <= TIE * min(times)


def test_a_lever_that_is_pulled_for_speed_says_so() -> None:
    said = [
        reason
        for name in ("Llama-3.1-8B", "Qwen2.5-14B", "Mistral-Nemo-12B")
        for cap in range(5, 25)
        for setting, reason in reasons(made(SHAPES[name], cap * GB, seq_len=512)).items()
        if setting in ("checkpointing", "offload") and "faster than" in reason
    ]
    assert said and all("s a step against" in reason and "estimated on rtx" in reason for reason in said)


@pytest.mark.parametrize(("length", "offload"), [(33_000, "none"), (60_000, "activations")])
def test_long_rows_go_one_by_one_where_a_mask_would_not_fit(length: int, offload: str) -> None:
    """Two rows of half the length need a mask that a row alone does not; without it, fewer levers are pulled."""
    found = made(SHAPES["Llama-3.1-8B"], 23 * GB, seq_len=length)
    alone = made(SHAPES["Llama-3.1-8B"], 23 * GB, seq_len=length, micro_batch="1")
    assert found.fits and found.work.rows == 1 and found.layer_offload == alone.layer_offload == offload
