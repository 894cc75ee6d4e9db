"""How fast training and generation are, alone and beside other libraries.

    python -m experiments.benchmark workload --pairs 256 --out workload.jsonl
    python -m experiments.benchmark train --workload workload.jsonl --shape small --batch 8
    python -m experiments.benchmark generate --workload workload.jsonl --batch 32 --new 48
    python -m experiments.benchmark peers --workload workload.jsonl --peers torch --env torch=PYTHON

The last line printed is JSON. Compilations are cached only where JAX_COMPILATION_CACHE_DIR says.
"""

import json
import sys
from collections.abc import Sequence

from copg_jax import runtime
from copg_jax.errors import InputError
from experiments.benchmark.commands import make_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and prints its result."""
    args = make_parser("experiments.benchmark", __doc__).parse_args(argv)
    runtime.keep_freed_memory()  # as every stage does
    try:
        result = args.run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
