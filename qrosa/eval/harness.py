"""Tasks of the Language Model Evaluation Harness (lm_eval), scored on a model as it was trained, 4-bit base and all.

The harness has its own class for transformers' models, and takes one that is loaded; so prompts, few-shot examples,
metrics and seeds are those of its command line, and only the model is ours. This is the only file that imports it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qrosa.errors import InputError, install_hint
from qrosa.model.head import model_device

CARD_ROWS = 8
"""Rows at once on a card; a processor takes one at a time, which pads nothing."""

Figures = dict[str, float | int]


class Tasks:
    """Tasks of the harness, found and their rows loaded: what is wrong with them shows before a model is loaded.

    Args:
        names: Tasks, groups of tasks or tags.
        folder: More tasks, as YAML files; they may name Python code beside them, which runs.

    Raises:
        InputError: lm_eval is not installed, it knows no such task, or a task's rows cannot be had.
    """

    def __init__(self, names: Sequence[str], folder: str | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise InputError("--tasks needs lm_eval", install_hint("lm-eval")) from None
        if folder is not None and not Path(folder).is_dir():
            raise InputError(f"--task-files {folder} is no folder", "name the folder that the tasks' YAML files are in")
        self.names = list(names)
        self._manager = TaskManager(include_path=folder, include_defaults=folder is None)
        unknown = self._unknown()
        if unknown and folder is not None:  # the harness's own tasks are thousands of files, read only where asked for
            self._manager = TaskManager(include_path=folder)
            unknown = self._unknown()
        if unknown:
            raise InputError(
                f"lm_eval knows no task {unknown[0]!r}",
                "'lm_eval ls tasks' lists its own; --task-files DIR adds those of a folder",
            )
        try:
            self._manager.load(self.names)
        except Exception as error:  # data sets fail in many ways: no network, no file, no such split
            raise InputError(
                f"the rows of {', '.join(self.names)} cannot be loaded: {_first_line(error)}",
                "check the connection or the task's files; --task-files DIR takes tasks whose rows are local",
            ) from error

    def _unknown(self) -> list[str]:
        return [name for name in self.names if name not in self._manager.all_tasks]

    def score(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        limit: int | None = None,
        longest: int | None = None,
        as_chat: bool = False,
    ) -> dict[str, Figures]:
        """Run the tasks.

        Args:
            model: A transformers causal language model; it is left in eval mode.
            tokenizer: Its tokenizer.
            limit: Rows of each task; all where None.
            longest: Tokens of a prompt with its answer; the model's own limit where None.
            as_chat: Put prompts through the tokenizer's chat template.

        Returns:
            By task or group, each metric by the harness's name of it (``acc``, ``acc_stderr``, ``exact_match,filter``)
            and ``rows``, how many were scored.

        Raises:
            InputError: A chat template is asked for and there is none.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        if as_chat and not tokenizer.chat_template:
            raise InputError("the model's tokenizer has no chat template", "leave out --as-chat")
        rows = CARD_ROWS if model_device(model).type == "cuda" else 1
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=rows, max_length=longest),
            tasks=self.names,
            task_manager=self._manager,
            limit=limit,
            apply_chat_template=as_chat,
            log_samples=False,
        )
        counts = found["n-samples"]
        return {name: _figures(values, counts.get(name)) for name, values in found["results"].items()}


def _figures(values: Mapping[str, Any], count: Mapping[str, int] | None) -> Figures:
    """The numbers among what the harness says of a task; the filter that does nothing is not named."""
    numbers = {name.removesuffix(",none"): value for name, value in values.items() if isinstance(value, (int, float))}
    numbers.pop("sample_len", None)
    return numbers if count is None else {"rows": count["effective"], **numbers}


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
