"""What the peers' scripts share: arguments, rows, batches and the clock. It needs Python alone.

The scripts run in environments of their own, where this project is not installed: the workload
comes as JSON lines and the architecture as a config.json with Hugging Face names.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""prompt_ids [p], completion_ids [2][c_k] and rewards [2], reward units."""


def parse(description: str | None, *, training: bool) -> argparse.Namespace:
    """The arguments, the architecture (`arch`) and the rows that the script works on (`rows`)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workload", type=Path, required=True, help="JSON lines of token ids")
    parser.add_argument("--config", type=Path, required=True, help="config.json with the sizes")
    parser.add_argument("--batch", type=int, required=True, help="pairs of a step, or prompts")
    if training:
        parser.add_argument("--steps", type=int, required=True, help="steps to time")
        parser.add_argument("--warmup", type=int, required=True, help="steps before those")
    else:
        parser.add_argument("--new", type=int, required=True, help="tokens of each completion")
    parser.add_argument("--cuda", action="store_true", help="on a GPU, computing in bfloat16")
    args = parser.parse_args()
    args.arch = json.loads(args.config.read_text(encoding="utf-8"))
    with args.workload.open(encoding="utf-8") as file:
        lines = list(file)
    wanted = args.batch * (args.warmup + args.steps if training else 1)
    found = [json.loads(line) for line in lines]
    # Seen again where they are too few, as in ours.
    args.rows = [found[i % len(found)] for i in range(wanted)]
    if not training or all(len(row["completion_ids"]) == 2 for row in args.rows):
        return args
    parser.error(f"--workload {args.workload}: wanted two completions in every row")


def need(**packages: str) -> None:
    """Ends with what to install where a package is missing.

    Args:
        packages: importable name = name for pip.
    """
    missing = [pip for name, pip in packages.items() if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: {Path(sys.argv[0]).name} wants {', '.join(packages.values())} in its "
            f"environment, got none of: {', '.join(missing)}. Fix: {sys.executable} -m pip "
            f"install {' '.join(missing)}",
            file=sys.stderr,
        )
        sys.exit(2)


def chosen_first(row: Row) -> tuple[list[int], list[int]]:
    """Ids of the completion with the higher reward, then of the other."""
    first, second = row["completion_ids"]
    return (first, second) if row["rewards"][0] >= row["rewards"][1] else (second, first)


def show(**numbers: Any) -> None:
    """Prints the JSON line."""
    print(json.dumps(numbers))
