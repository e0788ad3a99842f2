"""From a folder of images to an artefact that the service serves; a training that must fail is refused at its start."""

from __future__ import annotations

import errno
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_command
from PIL import Image

pytest.importorskip("foolbox")

from models import runs
from models.__main__ import main
from models.evaluation import attacks, precision
from models.evaluation.page import read_history
from models.nets.networks import LipschitzNetwork
from models.recipes import RECIPES, ImageRecipe
from models.runs import class_weights
from models.training.errors import TrainingError
from models.training.loop import Run, Trained
from models.training.nodes import ALONE, Nodes
from service.artefact.card import read_card
from service.inference.classifier import Classifier
from service.pixels.images import decode_image, to_unit

SMALL = [
    'network.stem=[{"channels":8}]',
    "network.pool=none",
    "network.widths=[16]",
    "schedule.epochs=6",
    "schedule.batch_size=16",
    "schedule.precision=32-true",
    "validation_images=0",
    "epsilons=[0.05,0.5]",
    "augment=null",
    "name=small",
]


def write_folder(folder: Path, classes: dict[str, int], *, colour: bool = False, seed: int = 0) -> Path:
    """Write images of 13 x 18 pixels with a bright bar whose place decides the class, as PNG and JPEG."""
    random = np.random.default_rng(seed)
    for k, (label, count) in enumerate(classes.items()):
        (folder / label).mkdir(parents=True)
        for n in range(count):
            pixels = random.integers(0, 60, (13, 18, 3) if colour else (13, 18)).astype(np.uint8)
            pixels[4 * k : 4 * k + 4] += 180
            Image.fromarray(pixels).save(folder / label / (f"{n}.jpg" if n % 2 else f"{n}.png"))
    return folder


def train(
    data: Path,
    out: Path,
    *changes: str,
    recipe: str = "image-folder",
    resume: bool = False,
    options: tuple[str, ...] = (),
) -> tuple[int, str]:
    arguments = ["train", recipe, "--data", str(data), "--out", str(out), "--threads", "1", "--device", "cpu"]
    arguments += [part for change in (*SMALL, *changes) for part in ("--set", change)]
    result = run_command(main, [*arguments, *(["--resume"] if resume else []), *options])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "bars", {"low": 60, "high": 40})


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    code, text = train(folder, out, "source=drawn", "licence=CC0-1.0", "validation_images=10")
    assert code == 0, text
    return out


def test_artefact_of_a_folder_is_served_on_its_files(folder: Path, out: Path) -> None:
    classifier = Classifier.load(out / "small", "cpu", 1)
    assert classifier.labels == ("high", "low")
    assert classifier.input_shape == (1, 12, 18)
    right = 0
    for label in classifier.labels:
        for path in sorted((folder / label).iterdir())[:10]:
            image = to_unit(decode_image(path.read_bytes(), 10**6))[None]
            (prediction,) = classifier.predict(image, resize=True)
            right += classifier.labels[prediction.class_id] == label
    assert right >= 18


def test_card_states_the_images_and_their_preprocessing(out: Path) -> None:
    card = read_card(out / "small")
    assert (card.data["dataset"], card.data["name"], card.data["source"]) == ("image-folder", "bars", "drawn")
    assert card.licence == card.data["licence"] == "CC0-1.0"
    assert (card.data["n_train"], card.data["n_validation"], card.data["n_test"]) == (70, 10, 20)
    assert card.data["counts"] == {"train": {"high": 28, "low": 42}, "test": {"high": 8, "low": 12}}
    assert set(card.data["digest"]) == {"train", "test"}
    assert "triangle filter" in card.data["preprocessing"]
    assert card.data["options"]["image_size"] == [12, 18]
    assert "class_weights" not in card.data
    assert card.recipe["kind"] == "images"


def test_training_leaves_a_page_with_its_curves(folder: Path, out: Path) -> None:
    text = (out / "small" / "report.html").read_text()
    assert [figures.epoch for figures in read_history(out / "small")] == [1, 2, 3, 4, 5, 6]
    assert all(figures.validation is not None for figures in read_history(out / "small"))
    assert "Held-out images, after each epoch" in text
    assert "20 test images of bars" in text
    assert f"lipcert train {folder} --out OTHER_OUT" in text


def test_calibration_images_are_held_out_of_the_training_and_calibrate_the_artefact(
    folder: Path, tmp_path: Path
) -> None:
    code, text = train(folder, tmp_path, "calibration_images=30", "schedule.epochs=1", "schedule.batch_size=10")
    assert code == 0, text
    card = read_card(tmp_path / "small")
    assert (card.data["n_train"], card.data["n_calibration"]) == (50, 30)
    assert sum(card.data["counts"]["train"].values()) == 50
    assert card.calibration is not None
    assert card.calibration.n == 30
    assert card.calibration.source.startswith("30 images of the bars training set")


def test_card_says_on_how_many_devices_and_in_which_precision_and_curves_are_beside_the_checkpoints(
    folder: Path, out: Path, tmp_path: Path
) -> None:
    card = read_card(out / "small")
    usual = card.recipe["schedule"]["precision"]
    assert usual == RECIPES["image-folder"].schedule.precision
    assert card.environment["devices"] == "1 x cpu"
    assert len(list((out / ".checkpoints" / "small" / "tensorboard").glob("events.out.tfevents.*"))) == 1
    other = {"32-true": "bf16-mixed", "bf16-mixed": "32-true"}[usual]
    change = f"schedule.precision={other}"
    code, text = train(folder, tmp_path, change, "schedule.epochs=1", options=("--no-tensorboard",))
    assert code == 0, text
    assert read_card(tmp_path / "small").recipe["schedule"]["precision"] == other
    assert {path.name for path in (tmp_path / ".checkpoints" / "small").iterdir()} == {"last.pt", "best.pt"}
    code, text = train(folder, tmp_path, "schedule.epochs=1", resume=True)
    assert code == 1
    assert f"recipe.schedule.precision was '{other}', now '{usual}'" in text


@pytest.mark.parametrize(("capabilities", "warned"), [({"avx512_bf16": True}, False), ({"avx512_f": True}, True)])
def test_processor_without_bfloat16_is_said_to_be_slow_and_works(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capabilities: dict[str, bool],
    warned: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    code, text = train(folder, tmp_path, "schedule.precision=bf16-mixed", "schedule.epochs=1")
    assert code == 0, text
    assert ("this processor has no instructions for bfloat16" in caplog.text) == warned


def test_every_recipe_can_be_given_to_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Run, int, int | None]] = []

    class Enough(Exception):
        """Ends the command where `models.training.processes` would start."""

    def fit_on(
        network: LipschitzNetwork, run: Run, *, devices: int, nodes: Nodes, threads: int | None, resume: bool
    ) -> Trained:
        assert nodes == ALONE
        given.append((pickle.loads(pickle.dumps(run)), devices, threads))
        raise Enough

    monkeypatch.setattr(runs, "fit_on", fit_on)
    folder = write_folder(tmp_path / "bars", {"low": 20, "high": 20})
    changes = {"image-folder": ["network.stem=[]", "network.pool=none", "network.widths=[8]"]}
    for name in ("image-folder", "two-moons", "wasserstein-squares"):
        arguments = ["train", name, "--data", str(folder), "--out", str(tmp_path / "out"), "--devices", "3"]
        options = [part for change in changes.get(name, []) for part in ("--set", change)]
        with pytest.raises(Enough):
            run_command(main, [*arguments, "--threads", "1", *options])
    assert [(devices, threads) for _, devices, threads in given] == [(3, 1)] * 3
    for run, _, _ in given:
        images, labels = run.batches.batch(0, 0)
        assert len(images) == len(labels) > 0


def test_only_the_first_node_exports(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit_on(network: LipschitzNetwork, run: Run, *, nodes: Nodes, **_: object) -> Trained:
        assert nodes == Nodes(2, 1, "10.0.0.1", 29500, 7.0)
        return Trained(network, 1.0)

    monkeypatch.setattr(runs, "fit_on", fit_on)
    for name, value in {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    options = ("--nodes", "2", "--node-timeout", "7")
    code, text = train(folder, tmp_path, "calibration_images=10", options=options)
    assert (code, text) == (0, "node 1 of 2: trained; node 0 writes the results\n")
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("NODE_RANK")
    assert train(folder, tmp_path, options=options)[0] == 1
    code, text = train(folder, tmp_path, options=(*options, "--budget", "1m"))
    assert (code, "--budget is timed on one machine" in text) == (1, True)


@pytest.mark.usefixtures("without_drawing")
def test_artefact_of_a_folder_is_evaluated_on_the_held_out_images(
    folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacks, "ATTACKS", {})
    shutil.copytree(out / "small", tmp_path / "small")
    arguments = ["evaluate", str(tmp_path / "small"), "--provider", "cpu", "--no-attacks", "--data"]
    result = run_command(main, [*arguments, str(folder)])
    assert result.exit_code == 0, result.output
    before, after = read_card(out / "small"), read_card(tmp_path / "small")
    assert after.accuracy == before.accuracy
    for one, other in zip(before.certified_accuracy, after.certified_accuracy, strict=True):
        assert (one.epsilon, one.value, one.n) == (other.epsilon, other.value, other.n)
        assert one.with_references is None
        assert other.with_references is not None
        assert other.value <= other.with_references
    shutil.copytree(folder, tmp_path / "changed")
    for n in range(100, 110):
        shutil.copyfile(folder / "low" / "1.jpg", tmp_path / "changed" / "low" / f"{n}.jpg")
    result = run_command(main, [*arguments, str(tmp_path / "changed")])
    assert result.exit_code == 0, result.output
    assert "on other images: changed" in result.output
    assert read_card(tmp_path / "small") == after
    # All images of the folder, of which 80 were trained on or held out, and ten copies of one of these.
    assert "n = 110" in result.output
    (known,) = re.findall(r"(\d+) of 110 images have exactly the pixels", result.output)
    assert int(known) in (80, 90)
    result = run_command(main, ["calibrate", str(tmp_path / "small"), "--data", str(tmp_path / "changed")])
    assert result.exit_code == 1
    assert "not those that small was measured on" in result.output


def test_artefact_is_converted_to_float32_and_compared_with_the_original(
    folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "ROUNDS", 2)
    arguments = ["--data", str(folder), "--out", str(tmp_path), "--precision", "float32", "--blocks", "64"]
    result = run_command(main, ["convert", str(out / "small"), *arguments])
    assert result.exit_code == 0, result.output
    before, after = read_card(out / "small"), read_card(tmp_path / "small-float32")
    *_, row = result.output.strip().splitlines()
    assert row.startswith(f"| `small` | {after.certified_accuracy[0].n} | 64 | ")
    assert (after.name, after.attacks, after.evaluation) == ("small-float32", [], None)
    assert after.recipe["export"] == {"precision": "float32", "blocks": 64}
    for one, other in zip(before.certified_accuracy, after.certified_accuracy, strict=True):
        assert one.value - 0.1 <= other.value <= one.value
    served = Classifier.load(tmp_path / "small-float32", "cpu", 1)
    assert 0.0 < served.certificate.logit_error < 1e-2
    result = run_command(main, ["convert", str(tmp_path / "small-float32"), *arguments])
    assert result.exit_code == 1
    assert "in float32 already" in result.output


def test_artefact_is_exported_in_float32_by_its_training(folder: Path, tmp_path: Path) -> None:
    code, text = train(folder, tmp_path, "schedule.epochs=1", options=("--precision", "float32", "--blocks", "64"))
    assert code == 0, text
    assert read_card(tmp_path / "small").recipe["export"] == {"precision": "float32", "blocks": 64}
    assert Classifier.load(tmp_path / "small", "cpu", 1).certificate.precision == "float32"


def test_options_that_say_nothing_about_the_artefact_are_refused(folder: Path, tmp_path: Path) -> None:
    code, text = train(folder, tmp_path, options=("--blocks", "64"))
    assert (code, "--blocks is an option of --precision float32" in text) == (1, True)
    result = run_command(main, ["train", "two-moons", "--out", str(tmp_path), "--precision", "float32"])
    assert (result.exit_code, "a toy problem" in result.output) == (1, True)


def test_checkpoint_of_other_images_is_refused(folder: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / ".checkpoints", tmp_path / "out" / ".checkpoints")
    other = write_folder(tmp_path / "bars", {"low": 60, "high": 40}, seed=1)
    changes = ("source=drawn", "licence=CC0-1.0", "validation_images=10")
    code, text = train(other, tmp_path / "out", *changes, resume=True)
    assert code == 1
    assert "belongs to another run (data.test was 'sha256:" in text
    code, text = train(folder, tmp_path / "out", *changes, "loss.alpha=3", resume=True)
    assert code == 1
    assert "recipe.loss.alpha was 10.0, now 3.0" in text


def test_a_checkpoint_with_another_order_of_channels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "data", {"high": 20, "low": 20})
    with monkeypatch.context() as earlier:
        earlier.setattr(runs, "CHANNEL_ORDER", 1)
        assert train(folder, tmp_path / "out", "schedule.epochs=2")[0] == 0
    code, text = train(folder, tmp_path / "out", "schedule.epochs=2", resume=True)
    assert code == 1
    assert "channel_order was 1, now 2" in text


def test_many_classes_of_colour_images_with_few_of_one_are_weighted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_folder(tmp_path / "bars", {"a": 30, "b": 10, "c": 10}, colour=True)
    code, text = train(data, tmp_path / "out", "schedule.epochs=1")
    assert code == 0, text
    card = read_card(tmp_path / "out" / "small")
    assert card.input.shape == (3, 12, 18)
    assert card.data["class_weights"] == {"a": 40 / 72, "b": 40 / 24, "c": 40 / 24}
    assert card.recipe["schedule"]["batch_size"] == 10
    assert "40 images: schedule.batch_size is 10 instead of 16" in caplog.text
    classifier = Classifier.load(tmp_path / "out" / "small", "cpu", 1)
    image = to_unit(decode_image((data / "a" / "1.jpg").read_bytes(), 10**6))[None]
    assert classifier.predict(image, resize=True)[0].logits_K.shape == (3,)


def test_weights_are_asked_for_or_follow_the_counts() -> None:
    recipe = RECIPES["image-folder"]
    assert isinstance(recipe, ImageRecipe)
    assert class_weights(recipe, [30, 20]) is None
    assert class_weights(recipe, [31, 20]) == [51 / 62, 51 / 40]
    assert class_weights(recipe.model_copy(update={"class_weights": "none"}), [31, 2]) is None
    assert class_weights(recipe.model_copy(update={"class_weights": "balanced"}), [30, 20]) == [50 / 60, 50 / 40]
    with pytest.raises(TrainingError, match=r"no image to train on .*\[5, 0\]"):
        class_weights(recipe, [5, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("image_size=13", "the images are 13 x 13, but the stages of network.stem"),
        ("validation_images=79", "validation_images=79 and train_images=all need 81 images at least"),
        ("calibration_images=79", "calibration_images=79, validation_images=0 and train_images=all need 81 images"),
        ("train_images=81", "need 81 images at least, the training set has 80"),
        ('classes=["low","middle"]', "has no class middle"),
        ("lipschitz_constant=0.5", "proved Lipschitz bound"),
        ("schedule.batch_size=80", "steps are too few"),
    ],
)
def test_training_that_must_fail_is_refused_before_its_first_step(
    folder: Path, tmp_path: Path, change: str, message: str
) -> None:
    epochs = ["schedule.epochs=1", "train_images=2"] if change.startswith("schedule") else []
    code, text = train(folder, tmp_path, change, *epochs)
    assert code == 1
    assert text.splitlines()[-1].startswith("error: ")
    assert message in text
    assert not (tmp_path / ".checkpoints").exists()
    assert "Traceback" not in text


def test_folder_for_results_that_cannot_be_written_is_refused_first(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, text = train(folder, tmp_path / "file")
    assert code == 1
    assert "cannot be written to" in text
    assert "--out" in text


def test_full_disk_at_the_export_loses_no_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(runs, "export_artefact", full)
        code, text = train(folder, tmp_path, "schedule.epochs=1")
    assert code == 1
    assert "No space left on device" in text
    assert "--resume" in text
    code, text = train(folder, tmp_path, "schedule.epochs=1", resume=True)
    assert code == 0, text
    assert (tmp_path / "small" / "model.onnx").is_file()
