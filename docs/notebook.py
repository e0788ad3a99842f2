"""The notebook docs/lipcert.ipynb: `python -m docs.notebook` runs its cells and stores what they print and draw."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

NOTEBOOK = Path(__file__).resolve().parent / "lipcert.ipynb"


def run(cells: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Run the code cells in one namespace; give the outputs of each, as a notebook stores them."""
    mpl.use("Agg")
    from matplotlib import pyplot

    namespace: dict[str, Any] = {"__name__": "notebook"}
    try:
        for number, cell in enumerate(code_cells(cells), 1):
            text = io.StringIO()
            with contextlib.redirect_stdout(text), warnings.catch_warnings():
                # Where there is a display, `show` warns that this backend uses none.
                warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
                exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), namespace)
            lines = text.getvalue().splitlines(keepends=True)
            outputs = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
            for figure in map(pyplot.figure, pyplot.get_fignums()):
                file = io.BytesIO()
                # Without the version of the library, so that the same figure has the same bytes.
                figure.savefig(file, dpi=100, bbox_inches="tight", metadata={"Software": None})
                data = {"image/png": base64.b64encode(file.getvalue()).decode()}
                outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
            pyplot.close("all")
            yield outputs
    finally:
        # A cell that fails leaves no server.
        if (server := namespace.get("server")) is not None:
            server.kill()
            server.wait()
            server.stderr.close()


def code_cells(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells that are run."""
    return [cell for cell in cells if cell["cell_type"] == "code"]


def main() -> None:
    """Run the notebook and write its outputs."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    outputs = list(run(notebook["cells"]))
    for number, (cell, found) in enumerate(zip(code_cells(notebook["cells"]), outputs, strict=True), 1):
        cell |= {"execution_count": number, "outputs": found}
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
