"""Bring the ``# Planned peak:`` comment of every recipe up to what the plan says now.

    python -m bench.refresh_configs            # rewrites configs/*.yaml where the figure has moved
    python -m bench.refresh_configs --check    # changes nothing, exits with 1 where one would

From the root of the repository. Nothing is downloaded: the models' config.json values are those of
bench/real_models.py, which tests/test_configs.py plans with too.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from bench.real_models import HUB
from qrosa.base.shape import from_config
from qrosa.config import make_run_config, read_yaml
from qrosa.planner.hardware import Here
from qrosa.planner.plan import Plan
from qrosa.planner.request import make_request
from qrosa.planner.search.alternatives import require_fit
from qrosa.planner.search.solve import solve
from qrosa.quantities import bytes_text

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
COMMENT = re.compile(r"^# Planned peak: .* on (a card|the CPU)\b.*$", re.MULTILINE)


def main() -> None:
    """Rewrite what has moved, or say what would."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 where a comment is old")
    check = parser.parse_args().check
    moved = False
    for path in sorted(CONFIGS.glob("*.yaml")):
        text = path.read_text()
        fresh = COMMENT.sub(lambda found, path=path: comment(planned(path, found[1] == "the CPU")), text)
        if fresh != text:
            moved = True
            print(f"{path.name}: {COMMENT.search(fresh)[0].removeprefix('# ')}")
            if not check:
                write(path, fresh)
    sys.exit(1 if check and moved else 0)


def planned(path: Path, on_cpu: bool) -> Plan:
    """The plan of a recipe as it is shipped."""
    config = make_run_config(read_yaml(path) | {"data": "rows.jsonl", "output": "run"})
    shape = from_config(config.model, HUB[config.model])
    device = "cpu" if on_cpu else "cuda"
    return solve(make_request(shape, config.groups, Here(card=None, host=0), device=device))


def comment(made: Plan) -> str:
    """The line for a plan; a streamed base is said to need host memory.

    Raises:
        DoesNotFitError: A recipe has to fit.
    """
    require_fit(made)
    where = "the CPU" if made.work.on_cpu else "a card"
    host_peak = max(memory.host_total for memory in made.phases.values())
    host = f", with {bytes_text(host_peak)} of host memory" if made.work.streamed else ""
    said = f"{bytes_text(made.peak)} of {made.request.cap / 2**30:g} GiB on {where}{host}"
    return f"# Planned peak: {said} ('qrosa plan --config' shows it by phase)."


def write(path: Path, text: str) -> None:
    """Replace a file at once."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
