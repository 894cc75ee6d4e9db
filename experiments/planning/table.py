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

_FIELDS = (
    "topology", "model", "stage", "trained", "num_microbatches", "arguments_gib", "temp_gib",
    "frozen_gib", "hbm_gib_per_chip", "roofline_step_s", "fits", "bound_by",
)  # fmt: skip


def read_plans(path: Path) -> list[dict[str, Any]]:
    """The plans in a file that `experiments.plan` wrote to; lines of its tables are passed over.

    Raises:
        InputError: no such file, no plan in it, or one that is cut short or of another version.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--table {path}: wanted a file with plans, got {error}") from error
    plans = [
        _read_plan(f"--table {path}:{number}", line)
        for number, line in enumerate(lines, start=1)
        if line.startswith('{"')
    ]
    if not plans:
        raise InputError(
            f"--table {path}: wanted the JSON lines that experiments.plan prints, got none. Fix: "
            f"python -m experiments.plan ... >> {path}"
        )
    return plans


def _read_plan(where: str, line: str) -> dict[str, Any]:
    fix = "Fix: delete the line and plan again."
    try:
        plan = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: wanted a whole plan, got a line cut short. {fix}") from error
    missing = [name for name in _FIELDS if name not in plan]
    if missing:
        raise InputError(
            f"{where}: wanted a plan of this version, got one without {', '.join(missing)}. {fix}"
        )
    try:
        _row(plan)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{where}: wanted a plan, got {line[:80]}: {error}. {fix}") from error
    return plan


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
