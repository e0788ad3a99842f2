"""The spread over seeds in a card: the same recipe and images alone are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from models.__main__ import main
from models.recipes import RECIPES
from service.artefact.card import Card, read_card, write_card

CARD: dict[str, Any] = {
    "name": "digits",
    "labels": ["zero", "eight"],
    "input": {"channels": 1, "height": 28, "width": 28},
    "graphs": {"model.onnx": "sha256:" + "0" * 64},
    "data": {"name": "MNIST", "sha256": {"images": "1"}},
    "recipe": RECIPES["mnist-0-8"].model_dump(mode="json"),
    "seed": 0,
    "accuracy": 0.99,
    "certified_accuracy": [{"epsilon": 1.0, "value": 0.9, "n": 1000}],
}


def run(folder: Path, **changes: Any) -> str:
    folder.mkdir()
    write_card(folder, Card.model_validate({**CARD, **changes}))
    return str(folder)


def test_the_card_states_the_other_seeds_and_the_table_their_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artefact = run(tmp_path / "a")
    runs = [
        run(
            tmp_path / str(seed),
            seed=seed,
            graphs={"model.onnx": f"sha256:{seed:064}"},
            accuracy=0.99 + 0.001 * seed,
            certified_accuracy=[{"epsilon": 1.0, "value": 0.9 - 0.01 * seed, "n": 1000}],
        )
        for seed in (1, 2)
    ]
    assert main(["seeds", artefact, *runs]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| | seed 0 | seed 1 | seed 2 | smallest to largest |",
        "|---|---|---|---|---|",
        "| clean | 99.00% | 99.10% | 99.20% | 99.00% to 99.20% |",
        "| certified at 1 | 90.00% | 89.00% | 88.00% | 88.00% to 90.00% |",
    ]
    card = read_card(tmp_path / "a")
    assert [(one.seed, one.model, one.accuracy) for one in card.seeds] == [
        (1, f"sha256:{1:064}", 0.991),
        (2, f"sha256:{2:064}", 0.992),
    ]
    assert card.accuracy == 0.99
    # Again: the runs are replaced.
    assert main(["seeds", artefact, runs[1]]) == 0
    assert [one.seed for one in read_card(tmp_path / "a").seeds] == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 0}, "the seeds 0, 0 repeat: train each run with another --seed"),
        ({"seed": None}, "states no seed or no accuracy"),
        ({"accuracy": None}, "states no seed or no accuracy"),
        ({"data": {"name": "MNIST", "sha256": {"images": "2"}}}, "has other images than"),
        ({"recipe": RECIPES["mnist"].model_dump(mode="json")}, "has another recipe than"),
        ({"recipe": {"name": "mnist-0-8", "digits": [0, 8]}}, "is not one of this version of lipcert"),
    ],
)
def test_a_run_that_cannot_be_compared_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artefact = run(tmp_path / "a")
    before = (tmp_path / "a" / "card.json").read_bytes()
    assert main(["seeds", artefact, run(tmp_path / "b", **{"seed": 1, **changes})]) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "a" / "card.json").read_bytes() == before


def test_a_run_that_is_no_artefact_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artefact = run(tmp_path / "a")
    assert main(["seeds", artefact, str(tmp_path / "missing")]) == 1
    assert f"{tmp_path / 'missing'} does not exist: name the folder of an artefact" in capsys.readouterr().err
