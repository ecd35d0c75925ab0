"""Finding and loading the compiled libraries, and standing in for them where they are missing.

``_C_cpu`` and ``_C_cuda`` lie beside the package and register kernels for the ops of ``schema.py`` when loaded. A
device without a library gets the plain PyTorch composition, with one warning that names the fix: correct, but slow
and hungry.
"""

from __future__ import annotations

import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qrosa.ops import decode, devices, dropout, linear, reference, schema
from qrosa.ops.cuda_build import CudaBuild, Machine, Refusal

CPU_ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
"""The CPU's code paths, in the order of the codes that ``qrosa::cpu_isa`` speaks. ``QROSA_CPU_ISA`` names the best one
allowed; ``avx512`` in reports stands for the last three."""

SDDMM_WAYS = ("rule", "gather", "tiles")
"""The ways to a sparse gradient on a card, in the order of the codes that ``qrosa::sddmm_way`` speaks. The variable
``QROSA_SDDMM`` names the one to begin with."""

_PACKAGE = Path(__file__).resolve().parent.parent
fixes = {
    "cpu": "run `pip install --no-build-isolation -e .` in a clone of qrosa (needs a C++17 compiler)",
    "cuda": "rebuild with nvcc on the PATH: `pip install --no-build-isolation -e .` in a clone of qrosa",
}
"""What gives a device its library."""
_KERNELS = (
    *("dequant_add", "sddmm", "dequant_spmm", "score_accumulate"),
    *("rms_norm", "rms_norm_backward", "gate", "gate_backward"),
)

libraries: dict[str, Path | None] = {"cpu": None, "cuda": None}
"""The library that serves each device, if any."""
notes: dict[str, str] = {"cpu": "", "cuda": ""}
"""Why a device has no library."""
_warned_of: set[str] = set()


def _flat_dequant_add(*args: Any) -> None:
    nf4, csr, out = schema.DEQUANT_ADD.split(args)
    schema.check_nf4(nf4, *out.shape)
    schema.check_csr(csr, *out.shape)
    reference.dequant_add(nf4, csr, out)


def _flat_dequant_spmm(*args: Any) -> torch.Tensor:
    x, nf4, csr, out_features = schema.DEQUANT_SPMM.split(args)
    schema.check_nf4(nf4, out_features, x.shape[1])
    schema.check_csr(csr, out_features, x.shape[1])
    return reference.dequant_spmm(x, nf4, csr, out_features)


_COMPOSITIONS: dict[str, Callable[..., Any]] = {
    "dequant_add": _flat_dequant_add,
    "sddmm": reference.sddmm,
    "dequant_spmm": _flat_dequant_spmm,
    "score_accumulate": reference.score_accumulate,
    "rms_norm": reference.rms_norm,
    "rms_norm_backward": reference.rms_norm_backward,
    "gate": reference.gate,
    "gate_backward": reference.gate_backward,
}


def _warned(device: str, name: str) -> Callable[..., Any]:
    def composition(*args: Any) -> Any:
        _warn_once(device, name)
        return _COMPOSITIONS[name](*args)

    return composition


def _warn_once(device: str, name: str) -> None:
    if device not in _warned_of:
        _warned_of.add(device)
        reason = notes[device] or f"it is older than the package, without {name}"
        warnings.warn(
            f"qrosa: no compiled library for {device} ({reason}); plain PyTorch runs instead, slower and with "
            f"more memory. To fix it, {fixes[device]}.",
            stacklevel=2,
        )


def _find(stem: str) -> Path | None:
    suffix = sysconfig.get_config_var("SHLIB_SUFFIX") or ".so"
    return next(iter(sorted(_PACKAGE.glob(f"{stem}*{suffix}"))), None)


def _refusal(path: Path) -> Refusal | None:
    """Why the CUDA library at ``path`` would not run on this machine's driver and cards."""
    if torch.version.cuda is None:
        return Refusal("this PyTorch is not built for CUDA", "install a PyTorch for CUDA")
    build, machine = CudaBuild.read(path), Machine.here()
    return None if build is None or machine is None else build.refusal(machine.driver, machine.cards)


def _load(device: str, key: str) -> None:
    path = _find(f"_C_{device}")
    refusal = _refusal(path) if device == "cuda" and path is not None else None
    if path is None:
        notes[device] = "not built"
    elif refusal is not None:
        notes[device], fixes[device] = refusal.reason, refusal.fix
    else:
        try:
            torch.ops.load_library(str(path))
            libraries[device] = path
            devices.serve(device)
        except (OSError, RuntimeError) as error:
            notes[device] = f"{path.name} does not load: {str(error).splitlines()[0]}"
    for name in _KERNELS:  # those of a library that is missing, or older than the package
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"qrosa::{name}", key):
            schema.LIBRARY.impl(name, _warned(device, name), key)


def _flat_linear(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return linear.forward(*schema.LINEAR.split(args))


def _flat_decode_linear(*args: Any) -> torch.Tensor:
    x, nf4, out_features, bias, csr, a, b, scale = schema.DECODE_LINEAR.split(args)
    schema.check_linear(x, nf4, out_features, bias, csr, a, b)
    return decode.decode_linear(x, nf4, out_features, bias, csr, a, b, scale)


def _flat_linear_backward(*args: Any) -> linear.Gradients:
    return linear.backward(*schema.LINEAR_BACKWARD.split(args))


def load() -> None:
    """Registers the layer for all devices, and per device a compiled library or the composition."""
    schema.LIBRARY.impl("linear", _flat_linear, "CompositeExplicitAutograd")
    schema.LIBRARY.impl("linear_backward", _flat_linear_backward, "CompositeExplicitAutograd")
    schema.LIBRARY.impl("decode_linear", _flat_decode_linear, "CompositeExplicitAutograd")
    schema.LIBRARY.impl("dropout", dropout.dropout, "CompositeExplicitAutograd")
    _load("cpu", "CPU")
    if torch.cuda.is_available():
        _load("cuda", "CUDA")
    else:
        notes["cuda"] = "no CUDA device" if torch.version.cuda else "this PyTorch has no CUDA"


def cpu_isa() -> str:
    """What the CPU kernels use now: portable, avx2 or avx512 (its bf16 products and AMX tiles included)."""
    return CPU_ISAS[min(torch.ops.qrosa.cpu_isa(-1), CPU_ISAS.index("avx512"))] if libraries["cpu"] else "portable"


def force_cpu_isa(isa: str) -> str:
    """Makes the CPU kernels use ``isa``, or the best the machine has below it; returns what they use now."""
    if libraries["cpu"] is None:
        return "portable"
    return CPU_ISAS[torch.ops.qrosa.cpu_isa(CPU_ISAS.index(isa))]


def force_sddmm_way(way: str) -> str:
    """Makes the CUDA library compute sparse gradients by ``way``, one of SDDMM_WAYS; returns the way in use."""
    if libraries["cuda"] is None:
        return SDDMM_WAYS[0]
    return SDDMM_WAYS[torch.ops.qrosa.sddmm_way(SDDMM_WAYS.index(way))]
