"""Claims about what the data room may import."""

import ast
from pathlib import Path

import copg_jax.data


def test_the_data_room_never_imports_jax():
    for file in Path(copg_jax.data.__file__).parent.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
        assert not names & {"jax", "flax", "optax", "orbax", "chex"}, file
