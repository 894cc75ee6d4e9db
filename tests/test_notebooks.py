"""The notebooks run from a clean kernel, are committed executed, and are in step with their
text."""

import ast
import re
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "notebooks"
PLOTS = {"fresh_data": 2, "several_rewards": 1, "theory": 8, "your_own_model": 1}  # at least
notebooks = pytest.mark.parametrize("name", PLOTS)


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.ipynb"


def text_of(name: str) -> str:
    return path_of(name).with_suffix(".py").read_text(encoding="utf-8")


def outputs(notebook: nbformat.NotebookNode) -> list:
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def num_plots(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in outputs(notebook))


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(PLOTS)


@notebooks
def test_notebook_and_its_text_have_the_same_cells(name):
    text = jupytext.read(path_of(name).with_suffix(".py"))
    notebook = nbformat.read(path_of(name), as_version=4)
    cells = lambda nb: [(cell.cell_type, cell.source) for cell in nb.cells]
    assert cells(notebook) == cells(text)


@notebooks
def test_committed_notebook_is_executed_small_and_names_no_folder(name):
    notebook = nbformat.read(path_of(name), as_version=4)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert num_plots(notebook) >= PLOTS[name]
    assert path_of(name).stat().st_size < 2_000_000
    text = printed(notebook)
    assert "nan" not in text
    assert "/home/" not in text and "/tmp/" not in text and "Traceback" not in text


def test_the_theory_notebook_defines_no_maths_of_its_own():
    """It may wrap calls for a figure, but takes logarithms and gradients of objectives from the
    package."""
    for word in ("logsumexp", "sigmoid(", "stop_gradient", "jnp.log1p", "optax"):
        assert word not in text_of("theory")


def test_a_model_of_ones_own_takes_40_lines_of_code_beside_its_imports_and_data():
    tree = ast.parse(text_of("your_own_model"))
    data = [node for node in tree.body if "PAIRS" in ast.unparse(node)[:5]]
    assert len(data) == 1
    lines: set[int] = set()
    for node in tree.body:
        if not isinstance(node, ast.Import | ast.ImportFrom) and node not in data:
            lines |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    text = text_of("your_own_model").splitlines()
    code = [text[n - 1] for n in sorted(lines) if text[n - 1].split("#")[0].strip()]
    assert len(code) <= 40


def test_a_model_of_ones_own_uses_nothing_below_the_top_of_the_package():
    tree = ast.parse(text_of("your_own_model"))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert {name for name in names if name.startswith("copg_jax")} == {"copg_jax"}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # 2026-11-21: raised inside jupyter_client
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its sockets
@notebooks
def test_notebook_runs_from_a_clean_kernel(name, monkeypatch):
    """Under two minutes on two idle cores; the limit leaves room for a busy machine."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for variable in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):  # one device, as a reader has
        monkeypatch.delenv(variable, raising=False)
    notebook = nbformat.read(path_of(name), as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert num_plots(notebook) >= PLOTS[name]
    if name == "your_own_model":  # it learns the scores, at both values of β
        r2 = [float(number) for number in re.findall(r"r² = ([\d.]+)", printed(notebook))]
        assert r2[0] < 0.95
        assert min(r2[1:]) > 0.99 and len(r2) == 3
