"""Masters and AdamW's states that ZeRO has shared out, as whole flat tensors: gathered for a checkpoint, and put back.

Under stage 2 each process has one stretch of a part's masters, in process order. Under stage 3 every piece (of a
bucket's size) is shared out by itself, and DeepSpeed's own accessors gather it. Either way a bucket travels at a time,
and what comes out is named as plain training names it.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from qrosa.optim.zero.masters import Masters, padded
from qrosa.optim.zero.settings import ZeroSettings

_STATES = ("exp_avg", "exp_avg_sq")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's prints off stdout, which is for results, and torch's notes on its calls away from people."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Accessors:
    """DeepSpeed's functions on parameters that stage 3 has shared out; all are collectives.

    Attributes:
        full_master: Parameter -> its masters, whole.
        full_state: Parameter, name of a state -> the state, whole.
        set_full_state: Parameter, whole values, name of a state: each process keeps its share.
    """

    full_master: Callable[[nn.Parameter], Tensor]
    full_state: Callable[[nn.Parameter, str], Tensor]
    set_full_state: Callable[[nn.Parameter, Tensor, str], None]


class SharedStates:
    """The states of an engine; every method that moves tensors is called on all processes.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        module: The masters.
        sizes: Part -> number of masters.
        settings: Stage and bucket.
        device: Where processes exchange tensors.
        accessors: For stage 3.
    """

    def __init__(
        self,
        zero: Any,
        module: Masters,
        sizes: Mapping[str, int],
        settings: ZeroSettings,
        device: torch.device,
        accessors: Accessors,
    ) -> None:
        self._zero, self._module, self._sizes = zero, module, sizes
        self._settings, self._device, self._accessors = settings, device, accessors

    @property
    def adamw(self) -> torch.optim.Optimizer:
        """What updates this process's share."""
        inner = self._zero.optimizer
        assert isinstance(inner, torch.optim.Optimizer)
        return inner

    def gather(self, *, wanted: bool = True) -> dict[str, Tensor]:
        """Masters and states, whole, on the host: ``low_rank.master``, ``low_rank.exp_avg``, ``low_rank.step``...

        Args:
            wanted: False only takes part in the gathering and returns nothing.
        """
        found: dict[str, Tensor] = {}
        counts = {name: float(count) for name, count in self._step_counts()}
        for name in self._sizes:
            for key in (None, *_STATES) if name in counts else (None,):
                whole = self._whole(name, key, wanted=wanted)
                if whole is not None:
                    found[f"{name}.{key or 'master'}"] = whole
            if wanted and name in counts:
                found[f"{name}.step"] = torch.tensor(counts[name], dtype=torch.float32)
        return found

    def restore(self, states: Mapping[str, Tensor], counts: Mapping[str, float]) -> None:
        """Put back what ``gather`` gave, over states that exist; parts without a count start from nothing."""
        for name in counts:
            for key in _STATES:
                self._set(name, key, states[f"{name}.{key}"])
        for name, count in self._step_counts():
            count.fill_(counts.get(name, 0.0))

    def _whole(self, name: str, key: str | None, *, wanted: bool) -> Tensor | None:
        """A part's masters or one of its states, fp32 on the host; gathered a bucket at a time."""
        whole = torch.empty(self._sizes[name], dtype=torch.float32) if wanted else None
        for start, values in self._stretches(name, key) if self._settings.stage == 2 else self._pieces(name, key):
            if whole is not None and start < whole.numel():
                part = whole[start : start + values.numel()]
                part.copy_(values[: part.numel()])
        return whole

    def _pieces(self, name: str, key: str | None) -> Iterator[tuple[int, Tensor]]:
        """Stage 3: place and values, parameter by parameter."""
        access = self._accessors
        for index, parameter in enumerate(self._module.of(name)):
            with quiet():
                values = access.full_master(parameter) if key is None else access.full_state(parameter, key)
            yield index * self._module.piece, values

    def _stretches(self, name: str, key: str | None) -> Iterator[tuple[int, Tensor]]:
        """Stage 2: place and values; each process has one stretch of the flat masters.

        DeepSpeed's own accessors find no states here: they are linked after the first of several groups has stepped.
        """
        share = self._share(name)
        mine = share.detach() if key is None else self.adamw.state[share][key]
        processes = torch.distributed.get_world_size()
        most = max(1, self._settings.bucket // processes)
        for start in range(0, mine.numel(), most):
            sent = mine[start : start + most].to(self._device)
            received = sent.new_empty(processes * sent.numel())
            with quiet():
                torch.distributed.all_gather_into_tensor(received, sent)
            for process, values in enumerate(received.split(sent.numel())):
                yield process * mine.numel() + start, values

    def _share(self, name: str) -> Tensor:
        """Stage 2: this process's stretch of a part's masters, as AdamW updates it."""
        share = self._zero.single_partition_of_fp32_groups[list(self._sizes).index(name)]
        assert isinstance(share, Tensor)
        return share

    def _set(self, name: str, key: str, flat: Tensor) -> None:
        if self._settings.stage == 2:
            state = self.adamw.state[self._share(name)][key]
            first = torch.distributed.get_rank() * state.numel()
            mine = flat[first : first + state.numel()]
            state[: mine.numel()].copy_(mine)
            return
        for parameter, values in zip(self._module.of(name), flat.split(self._module.piece), strict=True):
            whole = padded(values.to(self._device), self._module.multiple)
            self._accessors.set_full_state(parameter, whole, key)

    def _step_counts(self) -> Iterator[tuple[str, Tensor]]:
        """AdamW's counters with the part that each belongs to; one for each tensor that AdamW updates."""
        zero, names = self._zero, list(self._sizes)
        if self._settings.stage == 3:
            shares = zero.fp32_partitioned_groups_flat
            owners = [names[zero.sub_group_to_group_id[index]] for index in range(len(shares))]
        else:
            shares, owners = zero.single_partition_of_fp32_groups, names
        for name, share in zip(owners, shares, strict=True):
            if "step" in self.adamw.state.get(share, {}):
                yield name, self.adamw.state[share]["step"]
