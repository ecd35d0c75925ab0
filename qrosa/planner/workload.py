"""A run as far as its memory depends on it: the base, where parameters are trained, and the settings."""

from __future__ import annotations

from dataclasses import dataclass

from qrosa.adapters.budget import Allocation
from qrosa.base.shape import ModelShape
from qrosa.eval.objectives import OBJECTIVES, Objective
from qrosa.masks.scores import MASK_SCORES, MaskScore
from qrosa.optim.zero.settings import ZeroSettings
from qrosa.planner.hardware import UNMEASURED, Overhead

SAMPLE_TOKENS = 64  # most tokens of an answer that a run shows


@dataclass(frozen=True)
class Workload:
    """A run as far as memory depends on it.

    Attributes:
        shape: The base.
        allocation: Where the trained parameters are.
        device: ``cuda`` or ``cpu``.
        attention: ``sdpa`` or ``eager``.
        optimizer: Name of the optimizer.
        dropout: Of the low-rank part.
        mask_score: What ranks positions.
        mask_scope: ``matrix`` or ``global``.
        length: Longest row in tokens.
        rows: Most rows of a micro-batch.
        tokens: Most tokens of a micro-batch.
        eval_tokens: The same in evaluation.
        checkpointing: Activations are recomputed.
        loss_chunk_tokens: Positions whose logits exist at once.
        mask_group_bytes: Bound on the exact statistics that are collected together.
        checkpoints: Checkpoints on disk at once.
        offload_activations: Boundary activations are kept on the host.
        resident_blocks: Decoder blocks of the base that stay on the device; None where it is not streamed.
        base_on_disk: A streamed base is mapped from files.
        sparse_init: Where sparse values start; ``residual`` reads the quantisation error of each matrix.
        low_rank_init: Where the low-rank part starts; ``svd`` decomposes that error.
        rank_by: What gives out ranks; ``sensitivity`` runs rows through the bare base first.
        row_tokens: Tokens of all encoded rows, 0 where no rows are known.
        zero: What DeepSpeed does with the optimizer, None without it.
        processes: Cards that share the optimizer.
        mask_candidates: Streamed candidates for each position of the mask; 0 where statistics are exact.
        deterministic: Kernels give the same bits every time.
        overhead: What the process takes of a card beside tensors.
        feedback: The run makes its base with error feedback first.
        widens: Products of 16-bit floats are taken in fp32, as on a CPU that is slow at them.
        samples: Prompts that are answered before and after training.
        objective: What is learnt; some score rows before they are trained on.
        packed: Rows of a training micro-batch lie end to end, without padding.
        sync_every: Steps that machines take on their own between two exchanges; 1 where they do not.
    """

    shape: ModelShape
    allocation: Allocation
    device: str
    attention: str
    optimizer: str
    dropout: float
    mask_score: str
    mask_scope: str
    length: int
    rows: int
    tokens: int
    eval_tokens: int
    checkpointing: bool
    loss_chunk_tokens: int
    mask_group_bytes: int
    checkpoints: int
    offload_activations: bool = False
    resident_blocks: int | None = None
    base_on_disk: bool = False
    sparse_init: str = "residual"
    low_rank_init: str = "lora"
    rank_by: str = "order"
    row_tokens: int = 0
    zero: ZeroSettings | None = None
    processes: int = 1
    mask_candidates: int = 0
    deterministic: bool = True
    overhead: Overhead = UNMEASURED
    feedback: bool = False
    widens: bool = False
    objective: str = "sft"
    samples: int = 0
    packed: bool = False
    sync_every: int = 1

    @property
    def packed_lengths(self) -> list[int]:
        """Rows that fill a packed micro-batch: of the longest length, and the last of what is left."""
        full, left = divmod(self.tokens, self.length)
        lengths = [self.length] * full + ([left] if left else [])
        return lengths[: self.rows] or [self.length]

    @property
    def answered_length(self) -> int:
        """Tokens of the longest prompt with the longest answer that a run shows."""
        return min(self.length + SAMPLE_TOKENS, max(self.length, self.shape.dims.max_positions))

    @property
    def streamed(self) -> bool:
        """The base visits the device block by block."""
        return self.resident_blocks is not None

    @property
    def goal(self) -> Objective:
        """The objective, with all that depends on which one it is."""
        return OBJECTIVES[self.objective]

    @property
    def has_original(self) -> bool:
        """The 16-bit weights are there, so that a quantisation error can be read."""
        return self.shape.kind != "nf4"

    @property
    def score(self) -> MaskScore:
        """What ranks positions, with what it reads."""
        return MASK_SCORES[self.mask_score]

    @property
    def selects_by_gradients(self) -> bool:
        """Rows pass through the model to pick positions."""
        return bool(self.allocation.nnz_total) and self.score.reads_gradients

    @property
    def on_cpu(self) -> bool:
        """Device and host are the same memory."""
        return self.device == "cpu"
