"""Rules of the house that no other tool checks: names, mesh axes, and which tests may skip."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import copg_jax
from tests.conftest import EIGHT_DEVICES, LONGEST

TESTS = Path(__file__).parent
PACKAGE = Path(copg_jax.__file__).parent
# Files that may skip a test: what these lack, no package brings.
MAY_SKIP = {
    "data/conftest.py": "real TL;DR rows",
    "models/test_kernels.py": "an NVIDIA GPU",
    "rewards/test_programs.py": "Linux",
    "test_disk.py": "the right to mount a small disk",
    "test_run_folder.py": "Linux",
    "test_run_gpu.py": "a machine without a GPU",
    "test_runtime.py": "Linux",
}


def trees(folder: Path) -> Iterator[tuple[str, ast.Module]]:
    """Name and syntax of every module of a folder."""
    for path in sorted(folder.rglob("*.py")):
        yield path.relative_to(folder).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_no_two_modules_share_a_name():
    homes = defaultdict(list)
    for name, _ in trees(PACKAGE):
        if not name.endswith("__init__.py"):
            homes[Path(name).stem].append(name)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_no_two_public_functions_or_classes_share_a_name():
    homes = defaultdict(list)
    for name, tree in trees(PACKAGE):
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                homes[node.name].append(name)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_only_sharding_names_a_mesh_axis():
    """As a string; `data` names other things too."""
    for name, tree in trees(PACKAGE):
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert bool(texts & {"fsdp", "tensor"}) == (name == "sharding.py"), name


def test_a_test_skips_for_an_oracle_or_for_what_no_package_brings():
    """A test of an oracle is marked, so that the tests of oracles can run it."""
    skips = {"skip", "skipif", "importorskip"}
    found = {
        name
        for name, tree in trees(TESTS)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in skips and name != "conftest.py"
    }
    assert found == set(MAY_SKIP)


def test_who_reads_json_never_splits_it_at_what_ends_a_line_elsewhere():
    """JSON Lines end in a newline; `splitlines` ends them inside of texts as well."""
    helpers = {name: tree for name, tree in trees(TESTS) if not Path(name).stem.startswith("test_")}
    scripts = dict(trees(PACKAGE.parent / "experiments"))
    for name, tree in (*trees(PACKAGE), *scripts.items(), *helpers.items()):
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not attributes >= {"loads", "splitlines"}, name


def test_the_files_that_the_session_treats_in_another_way_exist():
    assert [name for name in (*EIGHT_DEVICES, *LONGEST) if not (TESTS / name).exists()] == []
