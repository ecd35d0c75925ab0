"""What is read of --deepspeed and --offload optimizer, and what is refused."""

import json
from pathlib import Path

import pytest

from qrosa.config import TrainConfig
from qrosa.errors import InputError
from qrosa.optim.zero.settings import BUCKET, zero_settings

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


def settings(**values):
    return zero_settings(TrainConfig(**values))


@pytest.fixture
def file(tmp_path):
    """``file({...})``: the path of a JSON file."""

    def write(document):
        path = tmp_path / "zero.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return str(path)

    return write


def test_nothing_asked_is_nothing():
    assert settings() is None
    assert settings(offload="activations,base") is None


@pytest.mark.parametrize(
    ("values", "stage", "offload"),
    [
        ({"deepspeed": "zero2"}, 2, None),
        ({"deepspeed": "zero3"}, 3, None),
        ({"deepspeed": "zero3", "offload": "auto,optimizer"}, 3, "cpu"),
        ({"offload": "optimizer"}, 2, "cpu"),
        ({"offload": "activations,optimizer"}, 2, "cpu"),
        ({"offload": "optimizer=nvme:/mnt/drive"}, 3, "nvme"),
    ],
)
def test_names_and_offload(values, stage, offload):
    made = settings(**values)
    assert (made.stage, made.offload) == (stage, offload)
    assert made.zero["stage"] == stage
    assert made.zero.get("offload_optimizer", {}).get("device") == offload
    assert made.nvme == ("/mnt/drive" if offload == "nvme" else None)


def test_buckets_are_small_by_default():
    """DeepSpeed's own default is 5e8 elements."""
    for stage in ("zero2", "zero3"):
        zero = settings(deepspeed=stage).zero
        assert all(value <= 2 * BUCKET for key, value in zero.items() if "bucket" in key or "live" in key)
        assert zero["reduce_bucket_size"] == BUCKET


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} == {"zero2", "zero2-cpu", "zero3", "zero3-nvme"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_its_name_does(path):
    made = settings(deepspeed=str(path))
    assert made.stage == int(path.stem[4])
    assert made.offload == (path.stem.partition("-")[2] or None)
    named = settings(deepspeed=f"zero{made.stage}", offload={"cpu": "optimizer"}.get(made.offload, "none"))
    assert made.bucket == named.bucket


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_deepspeed_takes_a_recipe(path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    document = settings(deepspeed=str(path)).config(2, 1.0)
    read = DeepSpeedZeroConfig(**document["zero_optimization"])
    assert read.stage == int(path.stem[4])
    assert read.reduce_bucket_size == document["zero_optimization"]["reduce_bucket_size"]


def test_what_a_file_leaves_open_is_decided_here(file):
    open_values = {
        "stage": 2,
        "reduce_bucket_size": "auto",
        "offload_optimizer": {"device": "cpu", "pin_memory": "auto"},
    }
    document = {"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": False}}
    made = settings(deepspeed=file(document | {"zero_optimization": open_values}))
    config = made.config(4, 0.5)
    assert made.bucket == BUCKET
    assert config["train_batch_size"] == 4
    assert config["gradient_clipping"] == 0.5
    assert "bf16" not in config
    assert made.zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


def test_a_files_buckets_and_drive_settings_are_kept(file):
    zero = {"stage": 3, "reduce_bucket_size": 2e6, "offload_optimizer": {"device": "nvme", "nvme_path": "/mnt/d"}}
    made = settings(deepspeed=file({"zero_optimization": zero, "aio": {"queue_depth": 4}}))
    assert made.bucket == made.zero["reduce_bucket_size"] == 2_000_000
    assert made.nvme == made.zero["offload_optimizer"]["nvme_path"] == "/mnt/d"
    assert made.config(1, 1.0)["aio"] == {"queue_depth": 4}


@pytest.mark.parametrize("device", ["none", "cpu"])
def test_a_drive_that_is_not_used_is_not_kept(file, device):
    section = {"stage": 3, "offload_optimizer": {"device": device, "nvme_path": 7}}
    path = file({"zero_optimization": section})
    for offload, place in (("none", None if device == "none" else device), ("optimizer", "cpu")):
        made = settings(deepspeed=path, offload=offload)
        assert (made.offload, made.nvme) == (place, None)


def zero(**values):
    return {"zero_optimization": {"stage": 3, **values}}


@pytest.mark.parametrize(
    ("document", "error", "hint"),
    [
        ("{", "not valid JSON", "correct it"),
        ("[]", "not a JSON object", "zero_optimization"),
        ({}, "no zero_optimization", "stage"),
        (zero(stage=1), "ZeRO stage 1", '"stage": 2'),
        (zero(stage=True), "ZeRO stage True", '"stage": 2'),
        (zero(offload_param={"device": "cpu"}), "offload_param", "--offload base"),
        (zero(offload_param={"device": "nvme", "nvme_path": "/d"}), "offload_param", "--offload base"),
        (zero(offload_optimizer={"device": "tape"}), "'tape'", "cpu"),
        (zero(offload_optimizer={"device": "nvme"}), "without saying where", "nvme_path"),
        (zero(stage=2, offload_optimizer={"device": "nvme", "nvme_path": "/d"}), "ZeRO-2 takes host", "zero3"),
        (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload_optimizer.ratio", "take ratio out"),
        (zero(reduce_bucket_size="big"), "reduce_bucket_size 'big'", "elements"),
        (zero(reduce_bucket_size=float("inf")), "reduce_bucket_size inf", "elements"),
        (
            zero(offload_optimizer={"device": "nvme", "nvme_path": "/d", "buffer_count": 3}),
            "buffer_count 3",
            "such as 5",
        ),
        (zero(offload_optimizer={"device": "cpu", "buffer_count": "many"}), "buffer_count 'many'", "whole number"),
        (zero(zero_quantized_weights=True), "zero_quantized_weights", "take zero_quantized_weights out"),
        (zero() | {"train_batch_size": 8}, "--batch-size decides", "auto"),
        (zero() | {"optimizer": {"type": "Adam"}}, "--lr, --sparse-lr", "auto"),
        (zero() | {"bf16": {"enabled": True}}, "bf16", "auto"),
        (zero() | {"moe": {}}, "no use for", "take moe out"),
    ],
)
def test_a_file_that_asks_for_something_else_is_refused(file, document, error, hint):
    with pytest.raises(InputError, match=error) as refused:
        settings(deepspeed=file(document))
    assert hint in refused.value.hint


@pytest.mark.parametrize(
    ("values", "error", "hint"),
    [
        ({"deepspeed": "zero9"}, "'zero9' is unknown", "zero2, zero3"),
        ({"deepspeed": "none.json"}, "does not exist", "zero2, zero3"),
        ({"deepspeed": "zero2", "offload": "optimizer=nvme:/d"}, "ZeRO-2 takes host memory", "zero3"),
        ({"deepspeed": "zero2", "optimizer": "adamw8bit"}, "--optimizer is adamw8bit", "adamw"),
        ({"offload": "optimizer", "optimizer": "paged-adamw8bit"}, "--offload optimizer runs", "adamw"),
        ({"offload": "none,optimizer"}, "none stands alone", "leave none out"),
        ({"offload": "optimizer=disk:/d"}, "is unknown", "optimizer=nvme"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, error, hint):
    with pytest.raises(InputError, match=error) as refused:
        settings(**values)
    assert hint in refused.value.hint
