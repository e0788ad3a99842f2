"""Import of ONNX files of other origin: an artefact that is served, or every reason against it; never a traceback."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import Result, run_command
from graph_builder import GraphBuilder

from lipcert.__main__ import main
from service.artefact import importing
from service.artefact.card import read_card
from service.inference.classifier import Classifier
from service.network.reader import read
from service.network.writer import write

SAMPLES = Path(__file__).resolve().parents[2] / "samples_of_libraries"
Import = Callable[..., Result]


def dense(shape: tuple[int, ...], outputs: int = 3, batch: object = "N", operator: str = "Relu") -> bytes:
    """A network of float32 that reads its input as it lies in memory."""
    b = GraphBuilder(np.random.default_rng(1), np.float32)
    size = int(np.prod(shape))
    x = b.one("Flatten", "image", axis=1)
    hidden = b.one(operator, b.one("Gemm", x, b.constant(b.rng.normal(size=(size, 5)))))
    return b.model(shape, b.one("Gemm", hidden, b.constant(b.rng.normal(size=(5, outputs)))), outputs, batch)


@pytest.fixture
def run(run_apart: Import, monkeypatch: pytest.MonkeyPatch) -> Import:
    """Run the command without a process, which takes seconds to load its libraries."""
    monkeypatch.setattr(
        importing,
        "_in_a_process",
        lambda wish, _: json.loads(json.dumps(importing.converted(json.loads(json.dumps(wish))))),
    )
    return run_apart


@pytest.fixture
def run_apart(tmp_path: Path) -> Import:
    """Run the command on bytes, or on a file."""

    def run_import(content: bytes | Path, *arguments: str) -> Result:
        file = content if isinstance(content, Path) else tmp_path / "some net.onnx"
        if isinstance(content, bytes):
            file.write_bytes(content)
        return run_command(main, ["import", str(file), "--out", str(tmp_path / "models"), *arguments])

    return run_import


def logits(folder: Path, image_CHW: np.ndarray) -> np.ndarray:
    return Classifier.load(folder, "cpu", 1).classify(image_CHW[None])[0][0]


@pytest.mark.parametrize("sample", ["groupsort2", "resnet", "l2-pool-older"])
def test_a_model_of_another_library_is_served_with_radius_and_counterfactual(
    run: Import, tmp_path: Path, sample: str
) -> None:
    file = SAMPLES / f"{sample}.onnx"
    result = run(file, "--name", "foreign")
    assert result.exit_code == 0, result.output
    report, folder = json.loads(result.output), tmp_path / "models" / "foreign"
    card = read_card(folder)
    assert report["written"] == str(folder)
    assert card.origin is not None
    assert card.origin.model_dump() == {
        "file": file.name,
        "digest": f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}",
    }
    assert card.data == card.recipe == {}
    assert (folder / "model.onnx").read_bytes() == write(read(file.read_bytes()))
    classifier = Classifier.load(folder, "cpu", 1)
    assert list(classifier.labels) == [f"class {k}" for k in range(len(card.labels))]
    images = np.random.default_rng(0).integers(0, 256, (1, *card.input.shape)) / 255
    (prediction,) = classifier.predict(images)
    (found,) = classifier.counterfactual(images, [prediction], [None])
    assert found.distance >= prediction.radius >= 0.0


def test_a_dry_run_reports_the_same_and_writes_nothing(run_apart: Import, tmp_path: Path) -> None:
    run = run_apart
    dry = json.loads(run(dense((1, 2, 2)), "--labels", "a,b,c", "--dry-run").output)
    assert list(tmp_path.iterdir()) == [tmp_path / "some net.onnx"]
    written = json.loads(run(dense((1, 2, 2)), "--labels", "a,b,c").output)
    assert written == {**dry, "written": str(tmp_path / "models" / "some-net")}
    assert dry["labels"] == ["a", "b", "c"]
    assert dry["lipschitz_bound"] > 0.0 < dry["logit_error"]


def test_labels_are_the_lines_of_a_file(run: Import, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("grey cat\n\ndog, brown\nbird\n")
    result = run(dense((1, 2, 2)), "--labels", str(tmp_path / "labels.txt"))
    assert json.loads(result.output)["labels"] == ["grey cat", "dog, brown", "bird"]


def test_a_model_with_one_output_has_two_classes(run: Import) -> None:
    assert json.loads(run(dense((1, 2, 2), 1), "--dry-run").output)["labels"] == ["class 0", "class 1"]
    assert run(dense((1, 2, 2), 1), "--labels", "yes,no", "--dry-run").exit_code == 0


def test_all_reasons_are_told_at_once(run: Import, tmp_path: Path) -> None:
    b = GraphBuilder(dtype=np.float32)
    x = b.one("Sin", b.one("ThresholdedRelu", "image"))
    x = b.one("Det", b.one("Gemm", x, b.constant(np.ones((4, 2)))))
    result = run(b.model((4,), x, 2), "--labels", "a,b,c", "--dry-run")
    assert result.exit_code == 2
    lines = result.output.splitlines()
    assert all(line.startswith(f"{tmp_path / 'some net.onnx'}: ") for line in lines)
    for reason in ("Sin 't2': no proved rule", "jumps at its threshold", "--shape C,H,W, for example --shape 1,2,2"):
        assert sum(reason in line for line in lines) == 1, result.output


def test_labels_that_do_not_fit_are_a_reason_beside_the_others(run: Import) -> None:
    result = run(dense((4,)), "--labels", "a,b")
    assert result.exit_code == 2
    assert "2 labels, and 3 classes" in result.output
    assert "--shape C,H,W" in result.output


@pytest.mark.parametrize(
    ("labels", "message"), [("a,a,b", "labels repeat"), ("a,,b", "at least 1 character"), ("a,b", "give one label")]
)
def test_labels_that_no_card_may_have_are_refused(run: Import, labels: str, message: str) -> None:
    result = run(dense((1, 2, 2)), "--labels", labels)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(("shape", "batch"), [((12,), "N"), ((12,), 1), ((4, 3), "N"), ((1, 12), "N"), ((12, 1), 1)])
def test_a_flat_input_is_reshaped_from_images(
    run: Import, tmp_path: Path, shape: tuple[int, ...], batch: object
) -> None:
    model = dense(shape, batch=batch)
    refused = run(model)
    assert refused.exit_code == 2
    assert "--shape C,H,W" in refused.output
    assert not (tmp_path / "models").exists()
    assert run(model, "--shape", "3,2,2").exit_code == 0
    image = np.random.default_rng(0).integers(0, 256, (3, 2, 2)) / 255
    found = logits(tmp_path / "models" / "some-net", image)
    weights = [onnx.numpy_helper.to_array(one) for one in onnx.load_from_string(model).graph.initializer]
    expected = np.maximum(image.ravel() @ weights[0], 0.0) @ weights[1]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_an_input_with_the_channels_last_is_transposed(run: Import, tmp_path: Path) -> None:
    model = dense((2, 4, 3))
    assert run(model, "--shape", "3,2,4").exit_code == 0
    image = np.random.default_rng(0).integers(0, 256, (3, 2, 4)) / 255
    weights = [onnx.numpy_helper.to_array(one) for one in onnx.load_from_string(model).graph.initializer]
    expected = np.maximum(np.moveaxis(image, 0, -1).ravel() @ weights[0], 0.0) @ weights[1]
    np.testing.assert_allclose(logits(tmp_path / "models" / "some-net", image), expected, rtol=1e-5)
    written = (tmp_path / "models" / "some-net" / "model.onnx").read_bytes()
    assert write(read(written)) == written


@pytest.mark.parametrize(
    ("shape", "message"), [("3,4,2", "another arrangement"), ("3,5,5", "75 numbers"), ("2,4,3", None)]
)
def test_a_shape_that_would_scramble_the_pixels_is_refused(run: Import, shape: str, message: str | None) -> None:
    result = run(dense((2, 4, 3)), "--shape", shape, "--dry-run")
    assert result.exit_code == (0 if message is None else 2)
    assert message is None or message in result.output


def test_an_artefact_is_replaced_by_force_alone(run: Import, tmp_path: Path) -> None:
    assert run(dense((1, 2, 2))).exit_code == 0
    before = (tmp_path / "models" / "some-net" / "card.json").read_bytes()
    again = run(dense((1, 2, 2)), "--labels", "x,y,z")
    assert again.exit_code == 2
    assert "--force replaces it" in again.output
    assert (tmp_path / "models" / "some-net" / "card.json").read_bytes() == before
    assert run(dense((1, 2, 2)), "--labels", "x,y,z", "--force").exit_code == 0
    assert read_card(tmp_path / "models" / "some-net").labels == ["x", "y", "z"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["some-net"]


def test_a_folder_that_is_no_artefact_is_not_replaced(run: Import, tmp_path: Path) -> None:
    (tmp_path / "models" / "some-net").mkdir(parents=True)
    (tmp_path / "models" / "some-net" / "thesis.tex").touch()
    result = run(dense((1, 2, 2)), "--force")
    assert result.exit_code == 2
    assert "is no artefact" in result.output


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 100, b"not a model", dense((1, 2, 2))[:-40], dense((1, 2, 2)) + b"\xff" * 50],
    ids=["empty", "zeros", "text", "cut", "longer"],
)
def test_bytes_that_are_no_model_are_one_reason(run: Import, content: bytes) -> None:
    result = run(content)
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert "Traceback" not in result.output


def test_a_missing_file_and_a_folder_are_refused(run: Import, tmp_path: Path) -> None:
    for file in (tmp_path / "missing.onnx", tmp_path):
        result = run(file)
        assert result.exit_code == 2
        assert "cannot be read" in result.output


def test_a_folder_that_cannot_be_written_is_a_reason(run: Import, tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    result = run(dense((1, 2, 2)))
    assert result.exit_code == 2
    assert "cannot be written" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-seconds", "0.01"], "within 0.01 s (--max-seconds)"),
        (["--max-bytes", "20000000"], "--max-bytes"),
        (["--name", "../escape"], "name: "),
    ],
)
def test_a_limit_or_a_name_that_is_out_of_reach_is_a_reason(
    run_apart: Import, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run_apart(dense((1, 2, 2)), *arguments)
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert message in result.output
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    "option", [["--shape", "3,2"], ["--shape", "0,2,2"], ["--max-bytes", "-1"], ["--max-seconds", "x"]]
)
def test_an_option_that_is_no_number_is_refused(run: Import, option: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(dense((1, 2, 2)), *option)
    assert stopped.value.code == 2
