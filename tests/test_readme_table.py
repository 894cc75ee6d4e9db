"""The table of the theory in docs/theory.md names functions and tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def table_rows() -> list[tuple[str, str, str]]:
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    body = re.search(r"<!-- theory-table -->(.*?)<!-- /theory-table -->", page, re.DOTALL)
    assert body, "docs/theory.md lacks the markers of the theory table"
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in body.group(1).splitlines()
        if line.startswith("|")
    ]
    return [tuple(row) for row in rows[2:]]


def defined_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        names |= {t.id for t in targets if isinstance(t, ast.Name)}
    return names


def test_every_row_names_an_equation_a_function_and_a_test():
    rows = table_rows()
    assert len(rows) >= 12
    for row in rows:
        assert len(row) == 3 and all(row)
        assert "`" in row[1] and "`" in row[2]


@pytest.mark.parametrize("column", [1, 2])
def test_every_function_and_test_of_the_table_exists(column):
    for row in table_rows():
        for reference in re.findall(r"`([^`]+)`", row[column]):
            if column == 1:  # module.name, relative to copg_jax, or experiments.module.name
                module, name = reference.rsplit(".", 1)
                package = ROOT if module.startswith("experiments.") else ROOT / "copg_jax"
                path = package / (module.replace(".", "/") + ".py")
            else:  # file::test
                file, name = reference.split("::")
                path = ROOT / "tests" / file
            assert path.is_file(), f"{reference}: no file {path}"
            assert name in defined_in(path), f"{reference}: {path.name} does not define {name}"
