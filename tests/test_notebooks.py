"""Every notebook runs from top to bottom."""

import pathlib

import pytest

nbformat = pytest.importorskip("nbformat", reason="the test extra")
nbclient = pytest.importorskip("nbclient", reason="the test extra")

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_STEPS", "4")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {}}
    )
    client.execute()
    assert all(
        cell.get("execution_count")
        for cell in notebook.cells
        if cell.cell_type == "code"
    )
