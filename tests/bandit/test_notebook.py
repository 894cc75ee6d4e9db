"""The theory notebook runs from a clean kernel, is committed executed, and is in step with its
text."""

from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments" / "notebooks" / "theory.ipynb"


def test_notebook_and_its_text_have_the_same_cells():
    text = jupytext.read(NOTEBOOK.with_suffix(".py"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = lambda nb: [(cell.cell_type, cell.source) for cell in nb.cells]
    assert cells(notebook) == cells(text)


def test_committed_notebook_is_executed_small_and_names_no_folder():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert sum("image/png" in o.get("data", {}) for cell in code for o in cell.outputs) >= 7
    assert NOTEBOOK.stat().st_size < 2_000_000
    printed = [o.get("text", "") for cell in code for o in cell.outputs]
    for text in printed:
        assert "nan" not in text
        assert "/home/" not in text and "/tmp/" not in text and "Traceback" not in text


def test_notebook_defines_no_maths_of_its_own():
    """It may wrap calls for a figure, but takes logarithms and gradients of objectives from the
    package."""
    source = NOTEBOOK.with_suffix(".py").read_text(encoding="utf-8")
    for word in ("logsumexp", "sigmoid(", "stop_gradient", "jnp.log1p", "optax"):
        assert word not in source


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # 2026-11-21: raised inside jupyter_client
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its sockets
def test_notebook_runs_from_a_clean_kernel(monkeypatch):
    """Under two minutes on two idle cores; the limit leaves room for a busy machine."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    errors = [
        o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "error"
    ]
    assert not errors
