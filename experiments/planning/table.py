"""Plans as a Markdown table: which device carries which model, and how full it is."""

import json
from pathlib import Path
from typing import Any

from copg_jax.errors import InputError

_COLUMNS = {
    "chips": "--:",
    "model": "---",
    "stage": "---",
    "trained": "---",
    "microbatches": "--:",
    "state and batch + the rest + frozen models = GiB": "--:",
    "of": "--:",
    "fits": "---",
    "step at least, s": "--:",
}


def read_plans(path: Path) -> list[dict[str, Any]]:
    """The plans in a file that `experiments.plan` wrote to; lines that are no JSON are passed over.

    Raises:
        InputError: no such file, or no plan in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"--table {path}: wanted a file with plans, got {error}") from error
    plans = [json.loads(line) for line in lines if line.startswith('{"topology": ')]
    if not plans:
        raise InputError(
            f"--table {path}: wanted the JSON lines that experiments.plan prints, got none. Fix: "
            f"python -m experiments.plan ... >> {path}"
        )
    return plans


def to_markdown(plans: list[dict[str, Any]]) -> str:
    """A row for every plan, in their order."""
    rows = [list(_COLUMNS), list(_COLUMNS.values()), *map(_row, plans)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(plan: dict[str, Any]) -> list[str]:
    parts = [plan["arguments_gib"], plan["temp_gib"], plan["frozen_gib"]]
    capacity, roofline = plan["hbm_gib_per_chip"], plan["roofline_step_s"]
    return [
        plan["topology"],
        plan["model"],
        plan["stage"],
        plan["trained"],
        str(plan["num_microbatches"]),
        f"{' + '.join(f'{part:.1f}' for part in parts)} = {sum(parts):.1f}",
        "-" if capacity is None else str(capacity),
        {True: "yes", False: "no", None: "-"}[plan["fits"]],
        f"{max(roofline.values()):.2f} ({plan['bound_by']})" if roofline else "-",
    ]
