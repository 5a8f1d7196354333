"""The notebook: as it is committed, from top to bottom, and with another settings cell."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "pomona.ipynb"

SMALL = """
SOURCE = None
RENDERED = {"classes": 4, "images": 120}
LABEL = "parent"
OUT = "results"
WEIGHTS = None
IMAGE_SIZE = 64
COMPONENTS = 10
MASTER = "local[2]"
SPARK_UI_PORT = None
MLFLOW = None
EXPERIMENT = "pomona"
"""
"""Settings for a test: everything that the notebook's own cell sets."""


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def settings(notebook: Any) -> Any:
    (cell,) = [cell for cell in code(notebook) if "settings" in cell.metadata.get("tags", ())]
    return cell


def names_set(source: str) -> set[str]:
    targets = [
        t for node in ast.parse(source).body if isinstance(node, ast.Assign) for t in node.targets
    ]
    return {t.id for t in targets if isinstance(t, ast.Name)}


def with_settings(source: str) -> Any:
    """The notebook with nothing but its settings cell replaced."""
    notebook = read()
    settings(notebook).source = "import os\n" + source
    return notebook


# --- the file ----------------------------------------------------------------------------------


def test_file_is_valid_and_holds_no_outputs() -> None:
    notebook = read()
    nbformat.validate(notebook)
    assert {cell.cell_type for cell in notebook.cells} == {"code", "markdown"}
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code(notebook))
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_one_cell_holds_the_settings() -> None:
    notebook = read()
    cell = settings(notebook)
    assert cell is code(notebook)[0]
    assert names_set(cell.source) == names_set(SMALL)
    for other in code(notebook)[1:]:
        assert not re.search(r"POMONA_|os\.environ\.get|dbutils|/dbfs|s3://", other.source)


def test_sections() -> None:
    heads = re.findall(r"^## (.+)$", "\n".join(c.source for c in read().cells), re.M)
    assert heads == [
        *("Set-up", "Spark", "MLflow", "Loading", "Exploration", "Extraction", "Analysis"),
        *("Standardisation and PCA", "Variance", "Classifier", "Export", "Scaling", "Conclusion"),
    ]


# --- runs --------------------------------------------------------------------------------------


def run_here(source: str, into: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the cells in this process, where a session may be active. Returns their names."""
    import matplotlib as mpl

    mpl.use("agg")
    monkeypatch.chdir(into)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "")  # the notebook sets it: put back afterwards
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # set first: what isn't there isn't put back
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    names: dict[str, Any] = {"display": lambda *_: None, "__name__": "notebook"}
    for cell in code(with_settings(source)):
        exec(compile(cell.source, cell.id, "exec"), names)
    return names


def outputs(notebook: Any) -> dict[str, str]:
    """Each code cell's outputs as text, with the kinds of its pictures."""
    found = {}
    for cell in code(notebook):
        parts = [o.get("text") or str(dict(o.get("data", {}))) for o in cell.outputs]
        found[cell.id] = "\n".join(parts)
    return found


def test_runs_from_top_to_bottom_on_rendered_photos(tmp_path: Path) -> None:
    for module in ("ipykernel", "matplotlib", "mlflow", "sklearn"):
        pytest.importorskip(module)
    from nbclient import NotebookClient

    notebook = with_settings(SMALL)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    told = outputs(notebook)
    assert "UNTRAINED" in told["setup"]
    assert "local[2" in told["spark"]
    assert f"sqlite:///{tmp_path}/results/mlflow.db" in told["mlflow"]
    assert "124 photos, 4 labels" in told["exploration-counts"]
    assert "1 empty, 1 not_an_image" in told["extraction"]
    assert "random:0 (untrained)" in told["extraction"]
    assert "truncated_100.jpg" in told["rejected"]
    assert "120 photos, 1280 features" in told["analysis"]
    assert "88 Training photos" in told["reduction"]
    assert "Test" in told["answers"]
    equal = "120 photos with features = 120 rows of Parquet = 120 rows of CSV"
    assert equal in told["export"]
    assert re.search(r"MLflow: sqlite:.*, run [0-9a-f]{32}", told["export-mlflow"])
    for cell in ("exploration-plot", "exploration-photos", "variance", "variance-scatter"):
        assert "image/png" in told[cell], cell
    assert (tmp_path / "results" / "report" / "report.html").exists()
    from pomona.core.files import read_json

    stages = read_json(tmp_path / "results" / "manifest.json")["stages"]
    assert f"{stages['reduce']['variance_kept']:.1%}" in told["reduction"]
    assert f"{stages['reduce']['components_for_95']} components" in told["conclusion"]
