"""How groups are packed is known to a few modules of `models` alone, and no context is hidden."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from copg_jax.models.layout import Layout

ROOT = Path(__file__).resolve().parents[1]
PACKING = {f"copg_jax/models/{name}.py" for name in ("layout", "forward", "decoding")}
"""The modules that may speak of packing."""
FIELDS = {field.name for field in dataclasses.fields(Layout)} - {"prompt_sizes"}
"""What only those modules read of a layout. (`prompt_sizes` is a field of a shape too.)"""
USEFUL_SHARE = "experiments/benchmark/train.py"  # counts how much of what is computed is useful
WORDS = re.compile("slots?|buckets?|rooms?|places|blocks?")
# The same words for other things: blocks of a decoder, of rows and of scores that a kernel computes
# at a time, objects in a cloud's bucket, places that made-up posts speak of.
OTHERS = {
    "PLACES",
    "block",
    "block_parameters",
    "block_until_ready",
    "blocks",
    "bucket_errors",
}
KERNELS = {f"copg_jax/models/{name}.py" for name in ("attention", "kernels")}


def names(tree: ast.AST) -> Iterator[str]:
    """Every identifier of a program."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.keyword(arg=str(name)):
                yield name
            case ast.alias(name=name, asname=other):
                yield from (name.rpartition(".")[2], other or "")


def speaks_of_packing(name: str) -> bool:
    """Whether a word of an identifier, in snake or camel case, is one of packing."""
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return any(WORDS.fullmatch(word.lower()) for word in words)


PROGRAMS = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for part in ("copg_jax", "experiments")
    for path in sorted((ROOT / part).rglob("*.py"))
}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("token_slots", True),
        ("HfSlot", True),
        ("_MOST_BUCKETS", True),
        ("in_blocks", True),
        ("places", True),
        ("place_whole", False),
        ("roommate", False),
        ("layout", False),
    ],
)
def test_words_of_packing_are_found_in_identifiers(name, found):
    program = f"def f({name}): return g({name}={name}).{name}"
    assert list(map(speaks_of_packing, names(ast.parse(program)))).count(True) == 4 * found


def test_words_of_packing_stay_where_groups_are_packed():
    for path, program in PROGRAMS.items():
        found = set(filter(speaks_of_packing, names(program)))
        if path in KERNELS:
            found = {name for name in found if "block" not in name.lower()}
        allowed = OTHERS | (FIELDS | {"slots"} if path == USEFUL_SHARE else set())
        assert path in PACKING or not found - allowed, (path, found - allowed)


def test_nobody_looks_into_a_layout_but_the_modules_that_pack():
    for path, program in PROGRAMS.items():
        read = {node.attr for node in ast.walk(program) if isinstance(node, ast.Attribute)}
        assert path in PACKING | {USEFUL_SHARE} or not FIELDS & read, (path, FIELDS & read)


def test_what_is_computed_depends_on_arguments_and_on_no_hidden_context():
    hidden = {"contextvars", "ContextVar", "set_mesh", "use_mesh", "get_abstract_mesh"}
    assert hidden & set(names(ast.parse("from contextvars import ContextVar as C")))
    for path, program in PROGRAMS.items():
        assert not hidden & set(names(program)), path
