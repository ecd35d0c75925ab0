"""ZeRO over the adapter's flat fp32 masters: the only file that imports deepspeed.

DeepSpeed is given a tiny module whose parameters are pieces of the flat masters (``MasterPiece``), and never the
model. The model's layers compute from their own tensors; after each step the new masters are written into those.
A step hands DeepSpeed the flat gradients that this process has added up, and the engine does the rest: it sums them
over the processes bucket by bucket, keeps each process's share, clips by the common norm, runs AdamW on the share,
on the host or on a drive if asked, and gathers the result.

Why not wrap the model? The engine would hook every module, reduce after each micro-batch (processes have different
numbers of them) and flatten parameters of two dtypes with one dtype's buffers, and could not take in the sparse part
in the middle of a run. The price is an fp32 copy of the low-rank masters on each card under stage 2, four bytes a
parameter. It needs no wrapping either under stage 3, whose gathers then stay outside the forward pass.

Why not through accelerate's plugin? ``Accelerator.prepare`` takes one model with its optimizer, once, and takes over
``backward`` of the very model that computes the loss. Here the engine's module is not that model, and it is built
again when the sparse part is born. accelerate still starts the processes: its group is the one that DeepSpeed uses.

AdamW is torch's fused kernel wherever the share lies. It is the kernel of plain training, needs no compiler on the
user's machine (DeepSpeed's own CPU Adam is built on first use, for minutes), and is as much bound by memory.

Checkpoints are never DeepSpeed's, which are pickled: masters and states are gathered piece by piece, and are the same
tensors that plain training stores, so a run may go on with another stage or another number of processes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from qrosa.errors import InputError, install_hint
from qrosa.optim.kinds import BETAS, EPSILON
from qrosa.optim.zero.masters import Masters
from qrosa.optim.zero.settings import ZeroSettings
from qrosa.optim.zero.states import Accessors, SharedStates, quiet

# Elements that each process's share of a piece is a multiple of: stage 3 shares pieces out equally, and gradients that
# are not aligned to a drive's blocks (4096 bytes) come back from it wrong.
_ALIGNED = 1024
_OLDEST = (0, 19, 8)  # gradient norms under offload were wrong before


def check_available(settings: ZeroSettings, device_type: str) -> None:
    """Make sure that DeepSpeed is there and can do what was asked for, before anything is loaded.

    Raises:
        InputError: It is not installed, too old, or cannot reach a drive; the NVMe folder cannot be written.
    """
    deepspeed = _import(device_type)
    version = tuple(int(part) for part in deepspeed.__version__.split("+")[0].split(".")[:3] if part.isdigit())
    if version < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise InputError(
            f"deepspeed {deepspeed.__version__} is too old", f"{oldest} or newer is needed: {install_hint('deepspeed')}"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        raise InputError(
            "accelerate was told to run DeepSpeed itself, and qrosa starts its own engine",
            "run 'accelerate launch' without --use_deepspeed; --deepspeed of qrosa is enough",
        )
    if settings.offload == "nvme":
        assert settings.nvme is not None
        _check_drive(Path(settings.nvme).expanduser())


def _check_drive(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the NVMe folder {folder} cannot be made: {error.strerror}", "give another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"the NVMe folder {folder} cannot be written", "give another folder")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    absent = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if absent:
        raise InputError(
            f"NVMe offload needs DeepSpeed's async_io, compiled on first use, and {' and '.join(absent)} is missing",
            "install it (apt install g++; pip install ninja), or use --offload optimizer for host memory",
        )
    with quiet():
        found = AsyncIOBuilder().is_compatible(verbose=False)
    if not found:
        raise InputError(
            "NVMe offload needs DeepSpeed's async_io, which needs libaio and its header, and they are not here",
            "apt install libaio-dev (dnf: libaio-devel), or point CFLAGS and LDFLAGS to them; "
            "or use --offload optimizer for host memory",
        )


def _import(device_type: str) -> Any:
    """DeepSpeed, for the kind of device that the run computes on."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    try:
        with quiet():
            import deepspeed
            from deepspeed.utils import logger
    except ImportError as error:
        missing = "deepspeed" if error.name in (None, "deepspeed") else f"deepspeed's {error.name}"
        raise InputError(
            f"--deepspeed and --offload optimizer need {missing}, which is not installed",
            f"{install_hint('deepspeed')}, or leave them out",
        ) from None
    logger.setLevel("ERROR")
    return deepspeed


class ZeroEngine:
    """Masters, optimizer states and their updates, shared out over all processes.

    Every method is a collective: all processes call the same ones in the same order.

    Args:
        masters: Part -> flat fp32 values, the same on every process; at least one part, none of them empty.
        settings: What DeepSpeed is to do.
        device: Where gradients are and results are wanted.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Norm that the gradients are scaled down to.
    """

    def __init__(
        self,
        masters: Mapping[str, Tensor],
        settings: ZeroSettings,
        *,
        device: torch.device,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ) -> None:
        deepspeed = _import(device.type)
        self._gathered = deepspeed.zero.GatheredParameters
        self.settings = settings
        self.sizes = {name: flat.numel() for name, flat in masters.items()}
        # DeepSpeed insists on LOCAL_RANK. Left behind, accelerate would take this process for one of several.
        self._owns_rank = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", "0")
        self._owns_group = _join(deepspeed, device)
        self.processes = torch.distributed.get_world_size()
        multiple = self.processes * _ALIGNED
        piece = max(multiple, settings.bucket // multiple * multiple)
        self.module = Masters(masters, piece, multiple)
        groups = [{"params": self.module.of(name), "lr": 0.0} for name in masters]
        adamw = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON, weight_decay=weight_decay, fused=True)
        self._drive = _own_folder(settings)
        with quiet():
            self.engine, *_ = deepspeed.initialize(
                model=self.module,
                optimizer=adamw,
                config=settings.config(self.processes, max_grad_norm, self._drive),
                dist_init_required=False,
            )
        self._states = SharedStates(
            self.engine.optimizer, self.module, self.sizes, settings, self.engine.device, _accessors(deepspeed)
        )

    def step(self, gradients: Mapping[str, Tensor], rates: Mapping[str, float]) -> float:
        """Sum the processes' gradients, clip the sum and update the masters.

        Args:
            gradients: Part -> this process's flat fp32 gradient; not changed.
            rates: Part -> learning rate.

        Returns:
            The norm of the sum before clipping. Where it is not finite, nothing was updated.
        """
        for group, name in zip(self._states.adamw.param_groups, self.sizes, strict=True):
            group["lr"] = rates[name]
        with quiet():
            # DeepSpeed averages; a step's gradient is a sum.
            self.engine.backward(self.engine(gradients, float(self.processes)))
            self.engine.step()
        return float("inf") if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())

    def flat(self, name: str) -> Tensor | None:
        """A part's masters in one tensor that each step updates in place; None where they are shared out (stage 3)."""
        pieces = [parameter.data for parameter in self.module.of(name)]
        start, size = pieces[0].data_ptr(), self.sizes[name]
        for values in pieces:
            if values.numel() == 0 or values.data_ptr() != start:
                return None
            start += values.nbytes
        return pieces[0].as_strided((size,), (1,))

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A part's masters from the first to the last, in pieces that are whole on every process, one at a time."""
        left = self.sizes[name]
        for parameter in self.module.of(name):
            gather = self._gathered([parameter]) if self.settings.stage == 3 else contextlib.nullcontext()
            with quiet(), gather:
                yield parameter.data[:left]
            left -= self.module.piece

    def state_tensors(self, *, wanted: bool = True) -> dict[str, Tensor]:
        """Masters and AdamW's states, whole, on the host, named as plain training names them.

        Args:
            wanted: False only takes part in the gathering and returns nothing.
        """
        return self._states.gather(wanted=wanted)

    def load_states(self, states: Mapping[str, Tensor]) -> None:
        """Take AdamW's states back; the masters are those that the engine was built with.

        Args:
            states: ``low_rank.exp_avg``, ``low_rank.exp_avg_sq``, ``low_rank.step`` and so on; a part that is not
                there starts from nothing.
        """
        counts = {name: float(states[f"{name}.step"]) for name in self.sizes if f"{name}.step" in states}
        if not counts:
            return
        # States are born in a first step. One of gradient zero at rate zero leaves the masters as they are.
        with quiet():
            blank = {name: self.module.of(name)[0].new_zeros(size) for name, size in self.sizes.items()}
            self.step(blank, dict.fromkeys(self.sizes, 0.0))
            self._states.restore(states, counts)

    def close(self) -> None:
        """Give everything back; the engine cannot be used after."""
        with quiet():
            self.engine.destroy()
        del self.engine, self._states
        if self._drive is not None:
            shutil.rmtree(self._drive, ignore_errors=True)
        if self._owns_rank:
            os.environ.pop("LOCAL_RANK", None)
        if self._owns_group:
            import deepspeed.comm

            deepspeed.comm.destroy_process_group()


def _own_folder(settings: ZeroSettings) -> str | None:
    """A folder on the drive for this engine alone; None without a drive.

    DeepSpeed names its files by the order of parameters, so two runs in one folder would read each other's states. It
    also leaves them there; this folder goes with the engine.
    """
    if settings.offload != "nvme":
        return None
    assert settings.nvme is not None
    drive = Path(settings.nvme).expanduser()
    drive.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix="qrosa-", dir=drive)


def _accessors(deepspeed: Any) -> Accessors:
    found = deepspeed.utils
    return Accessors(
        found.safe_get_full_fp32_param, found.safe_get_full_optimizer_state, found.safe_set_full_optimizer_state
    )


def _join(deepspeed: Any, device: torch.device) -> bool:
    """Give DeepSpeed the group that accelerate made; a single process makes one for itself.

    Returns:
        Whether a group was made here.
    """
    alone = not torch.distributed.is_initialized()
    if alone:
        from torch.distributed import HashStore  # type: ignore[attr-defined]

        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    # Its shared-memory all-reduce serves inference only, and would be compiled here, for half a minute, on a CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with quiet():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return alone
