"""Score a merged model in lm_eval, without qrosa: python examples/lm_eval_harness.py FOLDER TASK[,TASK].

FOLDER comes from ``qrosa export RUN --output FOLDER``; ``qrosa eval RUN --tasks TASK`` scores the 4-bit base with the
adapter on it instead.
"""

import argparse

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def main() -> None:
    """Print each task's figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="what qrosa exported")
    parser.add_argument("tasks")
    parser.add_argument("--task-files", help="a folder of more tasks, as YAML files")
    parser.add_argument("--limit", type=int, help="rows of each task")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    options = parser.parse_args()

    found = simple_evaluate(
        model=HFLM(pretrained=options.folder, device=options.device),
        tasks=options.tasks.split(","),
        task_manager=TaskManager(include_path=options.task_files),
        limit=options.limit,
        log_samples=False,
    )
    for task, figures in found["results"].items():
        print(task, {name: value for name, value in figures.items() if isinstance(value, float)})


if __name__ == "__main__":
    main()
