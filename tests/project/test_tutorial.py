"""The six commands of docs/tutorial.md, one after the other, on a small set: dark spots in grey cells."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from live_server import LiveServer
from PIL import Image

pytest.importorskip("foolbox")

from service.api.app import create_app
from service.settings import read_settings

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```sh\n(.*)\n```", PAGE, re.MULTILINE)
FEW_STEPS = ["--threads", "1", "--set", "schedule.steps=60", "--set", "schedule.epochs=2"]


def draw_cells(folder: Path) -> None:
    random = np.random.default_rng(0)
    for label in ("parasitized", "uninfected"):
        (folder / "cells" / label).mkdir(parents=True)
        for n in range(60):
            pixels = random.integers(140, 180, (12, 12)).astype(np.uint8)
            if label == "parasitized":
                row, column = random.integers(0, 9, 2)
                pixels[row : row + 3, column : column + 3] = 20
            Image.fromarray(pixels).save(folder / "cells" / label / f"{n}.png")
    (folder / "new-cells").mkdir()
    for n, label in enumerate(["parasitized", "parasitized", "uninfected", "uninfected"], 1):
        (folder / "cells" / label / f"{n}.png").rename(folder / "new-cells" / f"cell-{n}.png")


def run(folder: Path, command: str, *more: str) -> str:
    """Run a command of `.venv/bin/lipcert` with this interpreter; return what it printed."""
    program, *arguments = shlex.split(command)
    assert program == ".venv/bin/lipcert"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LIPCERT_")}
    done = subprocess.run(
        [sys.executable, "-m", "lipcert", *arguments, *more],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_lead_from_a_folder_to_a_certified_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install, train, predict, serve, ask = COMMANDS
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in (install, serve):
        assert f"\n{target.split()[-1]}:" in makefile

    draw_cells(tmp_path)
    printed = run(tmp_path, train, *FEW_STEPS)
    assert re.search(r"artefacts/cells: accuracy [\d.]+%, certified [\d.]+% at 0\.05", printed)
    assert (tmp_path / "artefacts" / "cells" / "report.html").stat().st_size > 10_000

    shown = re.findall(r"^file .*", PAGE, re.MULTILINE)[0].split()
    title, *rows = run(tmp_path, predict).splitlines()
    assert title.split() == shown
    assert [row.split()[0] for row in rows[:4]] == [f"new-cells/cell-{n}.png" for n in range(1, 5)]
    assert "stable, not necessarily right" in rows[-1]
    assert list((tmp_path / "flipped").glob("*.png"))

    models = serve.removeprefix("LIPCERT_MODELS=").split()[0]
    (path,) = re.findall(r"localhost:8000(\S+)", ask)
    fields = dict(re.findall(r"-F (\w+)=(\S+)", ask))
    image = tmp_path / fields.pop("image").removeprefix("@")
    monkeypatch.setenv("LIPCERT_MODELS", str(tmp_path / models))
    with LiveServer(create_app(read_settings())) as server:
        address = f"http://127.0.0.1:{server.port}{path}"
        response = httpx.post(address, files={"image": image.read_bytes()}, data=fields, timeout=60)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["model"] == "cells"
    assert rows[0].split()[1] == answer["label"]
    assert float(rows[0].split()[2]) == pytest.approx(answer["certificate"]["radius"], abs=1e-4)
