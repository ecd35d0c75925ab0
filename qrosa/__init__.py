"""qrosa: fine-tune 7-12B language models on one consumer card.

A frozen 4-bit base, bf16 low-rank adapters and a sparse delta on the same weights (RoSA, arXiv 2401.04679).

    model, tokenizer = qrosa.load("path/or/id", qrosa.AdapterConfig(budget="0.3%"))

Names are imported when they are first used, so that ``import qrosa`` and ``qrosa --help`` are quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "AdapterConfig": "qrosa.config",
    "MaskConfig": "qrosa.config",
    "QRosaLinear": "qrosa.adapters.linear",
    "CsrDelta": "qrosa.sparse.csr",
    "RunConfig": "qrosa.config",
    "Callback": "qrosa.train.callbacks",
    "RosaCallback": "qrosa.train.trainer_callback",
    "load": "qrosa.api",
    "finetune": "qrosa.api",
    "plan": "qrosa.api",
    "optimizer": "qrosa.api",
    "merge": "qrosa.export.merge",
    "save_adapter": "qrosa.base.adapter_io",
    "load_adapter": "qrosa.base.adapter_io",
    "select_masks": "qrosa.masks.apply",
    "reference_model": "qrosa.model.reference",
    "set_reference": "qrosa.train.trainer_reference",
}
__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from qrosa.adapters.linear import QRosaLinear as QRosaLinear
    from qrosa.api import finetune as finetune
    from qrosa.api import load as load
    from qrosa.api import optimizer as optimizer
    from qrosa.api import plan as plan
    from qrosa.base.adapter_io import load_adapter as load_adapter
    from qrosa.base.adapter_io import save_adapter as save_adapter
    from qrosa.config import AdapterConfig as AdapterConfig
    from qrosa.config import MaskConfig as MaskConfig
    from qrosa.config import RunConfig as RunConfig
    from qrosa.export.merge import merge as merge
    from qrosa.masks.apply import select_masks as select_masks
    from qrosa.model.reference import reference_model as reference_model
    from qrosa.sparse.csr import CsrDelta as CsrDelta
    from qrosa.train.callbacks import Callback as Callback
    from qrosa.train.trainer_callback import RosaCallback as RosaCallback
    from qrosa.train.trainer_reference import set_reference as set_reference


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'qrosa' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
