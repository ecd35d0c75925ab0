"""What ``--deepspeed`` and ``--offload optimizer`` ask for, as DeepSpeed's settings; torch-free, for plans to read.

ZeRO here shares out what belongs to the *adapter*: fp32 masters, their gradients and AdamW's states. Stage 2 keeps an
fp32 copy of all masters on every card and shares out the rest; stage 3 shares out that copy too, for two more gathers
a step. The packed base stays whole on every card (or on the host: ``--offload base``). It could be sharded, for
DeepSpeed gathers a frozen uint8 parameter bit for bit, but each gather is a collective *inside* the forward pass, so
all processes would have to run the same passes in lockstep. They do not: rows are cut into micro-batches by length,
each process halves its own when its memory runs out, evaluation shares rows unevenly, and the last step of a small
batch may leave a process without any; the others would wait for ever. ``offload_param`` would bring the same
collectives with a copy to the host. Base streaming does its work without them, a block ahead of the arithmetic, and
to the same bits, so ``offload_param`` is refused and streaming is named.

Buckets are small: DeepSpeed's default of 5e8 elements takes 2 GB in fp32, many times the adapter that goes through it.

Whatever a file says that qrosa decides elsewhere (batch sizes, optimizer, schedule, clipping, precision) may be absent
or ``"auto"``; anything else is refused rather than silently overruled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrosa.config import TrainConfig
from qrosa.errors import InputError
from qrosa.quantities import Offload, parse_offload

BUCKET = 1 << 22  # elements: 16 MiB in fp32
SUB_GROUP = 1 << 24  # elements that ZeRO-3 updates at once, which is what NVMe offload has in host memory at once
SWAP_BUFFERS = 5  # masters, gradients and two states of a sub-group, and one on its way
STAGES = {"zero2": 2, "zero3": 3}

# What DeepSpeed calls it -> what decides it here.
_DECIDED = {
    "train_batch_size": "--batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch",
    "gradient_accumulation_steps": "--batch-size and --micro-batch",
    "gradient_clipping": "--max-grad-norm",
    "optimizer": "--lr, --sparse-lr and --weight-decay",
    "scheduler": "--schedule and --lr-warmup",
    "fp16": "qrosa (bf16 adapters over fp32 masters)",
    "bf16": "qrosa (bf16 adapters over fp32 masters)",
    "amp": "qrosa (bf16 adapters over fp32 masters)",
    "zero_allow_untested_optimizer": "qrosa",
    "zero_force_ds_cpu_optimizer": "qrosa",
}
_PASSED_ON = ("aio", "comms_logger", "wall_clock_breakdown", "steps_per_print")
_BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters")
_ZERO_PASSED_ON = (
    *("overlap_comm", "contiguous_gradients", "reduce_scatter", "sub_group_size", "stage3_max_reuse_distance"),
    *_BUCKETS,
)
_OFFLOAD_PASSED_ON = ("pin_memory", "buffer_count", "pipeline_read", "pipeline_write")


@dataclass(frozen=True)
class ZeroSettings:
    """DeepSpeed as a run uses it.

    Attributes:
        stage: 2 or 3.
        offload: Where masters and optimizer states are kept: None for the device, ``cpu``, or ``nvme``.
        nvme: Folder on the drive, with ``nvme``.
        bucket: Elements that are reduced, gathered and handed over at once.
        zero: DeepSpeed's ``zero_optimization``, complete.
        other: What a file says beside it, as it stands there.
    """

    stage: int
    offload: str | None
    nvme: str | None
    bucket: int
    zero: dict[str, Any]
    other: dict[str, Any]

    @property
    def sub_group(self) -> int:
        """Elements that stage 3 updates at once."""
        return int(self.zero.get("sub_group_size", SUB_GROUP))

    @property
    def words(self) -> str:
        """As people read it: ``ZeRO-2, optimizer in host memory``."""
        where = {None: "", "cpu": ", optimizer in host memory", "nvme": f", optimizer on {self.nvme}"}
        return f"ZeRO-{self.stage}{where[self.offload]}"

    def config(self, processes: int, max_grad_norm: float, drive: str | None = None) -> dict[str, Any]:
        """The document that ``deepspeed.initialize`` takes.

        One micro-batch a step: what qrosa hands over is the sum of a step's gradients.

        Args:
            processes: That share the step.
            max_grad_norm: Norm that gradients are scaled down to.
            drive: Folder to offload to in place of ``nvme``.
        """
        zero = self.zero
        if drive is not None:
            zero = zero | {"offload_optimizer": zero["offload_optimizer"] | {"nvme_path": drive}}
        return {
            "steps_per_print": 1 << 60,
            **self.other,
            "train_batch_size": processes,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }


def zero_settings(train: TrainConfig) -> ZeroSettings | None:
    """What a run's settings ask of DeepSpeed; None where they do not ask for it.

    Raises:
        InputError: A file that is missing, no JSON, or asks for what qrosa does not do; settings that contradict.
    """
    asked = parse_offload(train.offload)
    if train.deepspeed is None:
        return _named(3 if asked.nvme else 2, asked) if asked.optimizer else None
    if train.deepspeed in STAGES:
        return _named(STAGES[train.deepspeed], asked)
    return _from_file(train.deepspeed, asked)


def _named(stage: int, asked: Offload) -> ZeroSettings:
    offload = "nvme" if asked.nvme else "cpu" if asked.optimizer else None
    return _made(stage, offload, asked.nvme, {}, {}, {}, f"--deepspeed zero{stage}")


def _made(
    stage: int,
    offload: str | None,
    nvme: str | None,
    zero: dict[str, Any],
    offload_keys: dict[str, Any],
    other: dict[str, Any],
    where: str,
) -> ZeroSettings:
    if offload == "nvme" and stage != 3:
        raise InputError(
            f"{where} cannot keep the optimizer on NVMe: DeepSpeed's ZeRO-2 takes host memory instead",
            "use --deepspeed zero3 for NVMe, or --offload optimizer for host memory",
        )
    if offload == "nvme" and not nvme:
        raise InputError(f"{where} offloads to NVMe without saying where", "add nvme_path, a folder on the drive")
    bucket = int(zero.get("reduce_bucket_size", BUCKET))
    complete: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": False,  # a second bucket, and nothing to overlap with: gradients come after the backward pass
        "contiguous_gradients": True,
    }
    if stage == 3:
        complete |= {
            "sub_group_size": SUB_GROUP,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": 2 * bucket,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
        }
    complete |= zero
    if offload is not None:
        complete["offload_optimizer"] = {"device": offload, "pin_memory": True, **offload_keys}
    if offload == "nvme":
        chosen = {"buffer_count": SWAP_BUFFERS, **complete["offload_optimizer"], "nvme_path": nvme}
        complete["offload_optimizer"] = chosen
    return ZeroSettings(stage, offload, nvme, bucket, complete, other)


def _from_file(path: str, asked: Offload) -> ZeroSettings:
    document = _read(path)
    other = {}
    for key, value in document.items():
        if key in _DECIDED and not _leaves_open(value):
            raise InputError(f"{path} sets {key}, which {_DECIDED[key]} decides", f"take {key} out, or write 'auto'")
        if key in _PASSED_ON:
            other[key] = value
        elif key not in _DECIDED and key != "zero_optimization":
            raise InputError(f"{path} sets {key}, which qrosa has no use for", f"take {key} out of it")
    zero = document.get("zero_optimization")
    if not isinstance(zero, dict):
        raise InputError(f"{path} has no zero_optimization", 'start from {"zero_optimization": {"stage": 2}}')
    stage = zero.get("stage")
    if stage not in (2, 3) or isinstance(stage, bool):
        raise InputError(f"{path} asks for ZeRO stage {stage!r}", 'write "stage": 2 or "stage": 3')
    offload, nvme, offload_keys = _offload_section(path, zero, asked)
    return _made(int(stage), offload, nvme, _zero_section(path, zero, int(stage)), offload_keys, other, path)


def _read(path: str) -> dict[str, Any]:
    try:
        document = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--deepspeed {path} does not exist", "use zero2, zero3, or a .json file's path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--deepspeed {path} cannot be read: {error}", "check the file and its permissions") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"--deepspeed {path} is not valid JSON: {error.msg} in line {error.lineno}", "correct it there"
        ) from None
    if not isinstance(document, dict):
        raise InputError(f"--deepspeed {path} is not a JSON object", 'start from {"zero_optimization": {"stage": 2}}')
    return document


def _leaves_open(value: Any) -> bool:
    return value == "auto" or (isinstance(value, dict) and value.get("enabled") in (False, "auto"))


def _zero_section(path: str, zero: dict[str, Any], stage: int) -> dict[str, Any]:
    """What of a file's ``zero_optimization`` is passed on; buckets are checked."""
    chosen = {}
    param = zero.get("offload_param") or {}
    if not isinstance(param, dict) or param.get("device", "cpu" if param else "none") != "none":
        raise InputError(
            f"{path} asks for offload_param, and the packed 4-bit base is no parameter that DeepSpeed could move",
            "take offload_param out of it and give --offload base, which streams the base from host memory",
        )
    for key, value in zero.items():
        if key in ("stage", "offload_param", "offload_optimizer") or value == "auto":
            continue
        if key not in _ZERO_PASSED_ON or (stage == 2 and key.startswith("stage3_")):
            raise InputError(f"{path} sets zero_optimization.{key}, which does not apply here", f"take {key} out of it")
        if key in (*_BUCKETS, "sub_group_size") and not _is_count(value):
            raise InputError(
                f"{path} has {key} {value!r}", "write a number of elements, at least 1024, such as 4194304"
            )
        chosen[key] = int(value) if _is_count(value) else value
    return chosen


def _is_count(value: Any, least: int = 1024) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and value >= least and float(value).is_integer()
    )


def _offload_section(path: str, zero: dict[str, Any], asked: Offload) -> tuple[str | None, str | None, dict[str, Any]]:
    """Device, NVMe folder and the rest of a file's ``offload_optimizer``, joined with ``--offload``."""
    section = zero.get("offload_optimizer") or {}
    if not isinstance(section, dict):
        raise InputError(f"{path} has an offload_optimizer that is no object", 'write {"device": "cpu"}')
    for key in section:
        if key not in (*_OFFLOAD_PASSED_ON, "device", "nvme_path"):
            raise InputError(f"{path} sets offload_optimizer.{key}, which does not apply here", f"take {key} out of it")
    device = section.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        raise InputError(f"{path} offloads the optimizer to {device!r}", 'write "cpu", "nvme" or "none"')
    kept = {key: section[key] for key in _OFFLOAD_PASSED_ON if key in section and section[key] != "auto"}
    if not _is_count(kept.get("buffer_count", SWAP_BUFFERS), least=SWAP_BUFFERS - 1):
        raise InputError(
            f"{path} has buffer_count {kept['buffer_count']!r}", f"write a whole number, such as {SWAP_BUFFERS}"
        )
    if asked.nvme:
        return "nvme", asked.nvme, kept
    if device == "none":
        return ("cpu" if asked.optimizer else None), None, kept
    return device, str(section.get("nvme_path") or "") if device == "nvme" else None, kept
