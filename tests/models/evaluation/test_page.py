"""The page after a training: one file without scripts, whose figures are those of the served model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from builders import card_for, random_groupsort

pytest.importorskip("matplotlib")
torch = pytest.importorskip("torch")

from models.data.labelled import DataSet, LabelledImages  # noqa: E402
from models.evaluation.cautions import cautions  # noqa: E402
from models.evaluation.details import Answers, details  # noqa: E402
from models.evaluation.drawings import Curve, chart, difference_picture, picture, size_picture  # noqa: E402
from models.evaluation.images import pixel_keys  # noqa: E402
from models.evaluation.page import (  # noqa: E402
    HISTORY_FILE,
    PAGE_FILE,
    TRAINING_FILE,
    read_history,
    read_training_keys,
    write_report_page,
)
from models.training.history import EpochFigures  # noqa: E402
from models.training.scores import Scores  # noqa: E402
from service.artefact.card import Card, read_card, write_artefact  # noqa: E402
from service.inference.classifier import Classifier  # noqa: E402

LABELS = ("<cat>", "dog & co", "emu")
HISTORY = [
    EpochFigures(epoch, 1.0 / epoch, Scores(0.5 + epoch / 50, {0.1: 0.3}), Scores(0.4, {0.1: 0.2}))
    for epoch in range(1, 13)
]


class Page(HTMLParser):
    """Collects tags, addresses and headings; refuses tags that are not closed."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "xlink:href")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)


def images(n: int) -> LabelledImages:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 1, 4, 4), dtype=np.uint8)
    return LabelledImages(torch.from_numpy(pixels), torch.arange(n) % 3)


def data_set(n: int = 60) -> DataSet:
    return DataSet(images(3), images(n), LABELS, {"name": "pets"})


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    graphs = random_groupsort(0)
    data = {"name": "pets", "dataset": "image-folder", "n_train": 70, "n_validation": 10}
    recipe = {"name": "pets", "epsilons": [0.01, 0.1], "schedule": {"epochs": 12}}
    card = card_for(graphs, "pets").model_copy(update={"labels": list(LABELS), "data": data, "recipe": recipe})
    write_artefact(tmp_path / "out" / "pets", card, graphs.model)
    return tmp_path / "out" / "pets"


def test_page_needs_no_other_file_and_no_script(artefact: Path) -> None:
    assert write_report_page(artefact, data_set(), HISTORY, data=Path("the data")) == artefact / PAGE_FILE
    text = (artefact / PAGE_FILE).read_text()
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "object", "form"}
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|https?:", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "<cat>" not in text
    assert "dog &amp; co" in text
    assert page.headings == [
        "In words",
        "Warnings",
        "Training",
        "Certified accuracy",
        "Confusions",
        "Classes",
        "Worst mistakes",
        "Reliability of radii",
        "Counterfactuals and gradients",
        "Cost of serving",
        "Next steps",
        "Origin",
    ]
    out = artefact.parent
    assert f"LIPCERT_MODELS={out} LIPCERT_DEFAULT_MODEL=pets lipcert serve" in text
    assert f"lipcert evaluate {artefact} --data OTHER_FOLDER" in text
    assert "lipcert train &#x27;the data&#x27; --out OTHER_OUT --epochs 24" in text


def test_figures_of_the_page_are_those_of_the_served_model(artefact: Path) -> None:
    write_report_page(artefact, data_set(), HISTORY)
    classifier, test = Classifier.load(artefact, "cpu", 1), images(60)
    predictions = classifier.predict(test.pixels(torch.float64).numpy())
    right = sum(one.class_id == label for one, label in zip(predictions, test.labels_N.tolist(), strict=True))
    text = (artefact / PAGE_FILE).read_text()
    assert f"classifies {right} of 60 images right" in text
    assert f"{np.median([one.radius for one in predictions]):.3f}</b>median certified radius" in text
    assert "70 images trained the network" in text
    assert "10 more were held out to watch it" in text
    write_report_page(artefact, data_set(), HISTORY, chosen="The epoch was chosen by 10 held-out images")
    assert "The epoch was chosen by 10 held-out images" in (artefact / PAGE_FILE).read_text()


def test_history_is_read_again_and_a_damaged_one_is_no_history(artefact: Path) -> None:
    assert read_history(artefact) == []
    write_report_page(artefact, data_set(), HISTORY)
    assert read_history(artefact) == HISTORY
    for content in ("[", "[{}]", "{}", '[{"epoch": 1}]', "[3]"):
        (artefact / HISTORY_FILE).write_text(content)
        assert read_history(artefact) == []


def test_training_images_are_recognised_by_their_pixels(artefact: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_training_keys(artefact) is None
    known = data_set()
    write_report_page(artefact, known, HISTORY)
    keys = read_training_keys(artefact)
    assert keys is not None
    assert np.isin(pixel_keys(known.train), keys).all()
    assert np.isin(pixel_keys(known.test), keys).sum() == 3
    for content in (b"", b"\x93NUMPY", b"text"):
        (artefact / TRAINING_FILE).write_bytes(content)
        assert read_training_keys(artefact) is None
    assert "training images are not recognised" in caplog.text
    np.save(artefact / TRAINING_FILE, np.zeros((2, 2)))
    assert read_training_keys(artefact) is None


def test_page_without_history_and_with_few_images_is_written(artefact: Path) -> None:
    write_report_page(artefact, data_set(2), [])
    page = Page((artefact / PAGE_FILE).read_text())
    assert "Training" not in page.headings
    assert "Counterfactuals and gradients" in page.headings


def test_page_that_cannot_be_written_does_not_end_the_training(
    artefact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (artefact / "report").write_text("in the way")
    assert write_report_page(artefact, data_set(), HISTORY) is None
    assert "the artefact is complete" in caplog.text


@pytest.mark.parametrize("points", [[], [(1, 0.5)], [(1, 0.5), (2, 0.5)], [(0, 1e-9), (1, float("nan")), (2, 1e9)]])
@pytest.mark.parametrize("shares", [False, True])
def test_chart_is_drawn_for_any_points(points: list[tuple[float, float]], shares: bool) -> None:
    text = chart("<t>", [Curve("<c>", points)] * 7, "epoch", shares=shares, whole=True)
    Page(text)
    assert "nan" not in text
    assert "&lt;c&gt;" in text
    places = [float(x) for pair in re.findall(r'points="([^"]*)"', text) for x in re.split("[ ,]", pair) if x]
    if not shares:
        assert all(0 <= place <= 360 for place in places)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_are_8_bit_for_any_number_of_channels(channels: int) -> None:
    values = np.random.default_rng(0).random((channels, 4, 5))
    shown = picture(values)
    assert (shown.dtype, shown.shape) == (np.uint8, (1 if channels == 2 else channels, 4, 5))
    assert np.array_equal(picture(np.ones((1, 2, 2))), np.full((1, 2, 2), 255, np.uint8))
    difference, largest = difference_picture(np.zeros((channels, 2, 2)))
    assert largest == 1 / 255
    assert set(np.unique(difference)) == {128}
    size = size_picture(values - 0.5)
    assert size.shape == (3, 4, 5)
    assert size.max() == 255
    assert size_picture(np.zeros((channels, 2, 2))).max() == 0


def warned(label: list[int], predicted: list[int], radius: float = 0.2, **changes: object) -> str:
    answers = Answers(LABELS, np.array(label), np.array(predicted), np.full(len(label), radius))
    graphs = random_groupsort(0)
    card = Card.model_validate({**card_for(graphs, "pets").model_dump(), **changes})
    figures = details(answers, card, [0.1], same_images=False)
    return "\n".join(cautions(card, answers, figures, HISTORY[:9]))


def test_good_figures_give_no_warning() -> None:
    label = [0] * 60 + [1] * 60 + [2] * 60
    assert warned(label, label) == ""


def test_reasons_to_doubt_a_figure_are_warnings() -> None:
    label = [0] * 60 + [1] * 60 + [2] * 60
    assert "hardly above the 33.3% of an answer that is always <cat>" in warned(label, [0] * 180)
    assert "learned images by heart" in warned(label, [0] * 60 + [1] * 20 + [0] * 100)
    weak = warned(label, [0] * 60 + [1] * 60 + [0] * 30 + [2] * 30)
    assert "The recall of emu (50.0%) is more than ten points below" in weak
    assert "No image of emu was measured" in warned([0] * 60 + [1] * 60, [0] * 60 + [1] * 60)
    assert "4 images are few" in warned([0, 1, 2, 0], [0, 1, 2, 0])
    assert "Fewer than 20 images of <cat>, dog & co, emu" in warned([0, 1, 2, 0], [0, 1, 2, 0])
    assert "No right answer is proved within 0.1" in warned(label, label, 0.05)
    assert "Lower than in the card, beyond chance: accuracy" in warned(
        label, [0] * 100 + [2] * 80, accuracy=0.99, data={"n_test": 1000}
    )
    data = {
        "n_in_train_and_test": 3,
        "n_left_out": 2,
        "counts": {"train": {"<cat>": 500, "dog & co": 60, "emu": 400}},
    }
    text = warned(label, label, data=data)
    assert "3 test images are training images, too" in text
    assert "2 files were left out" in text
    assert "dog & co has 60 training images" in text


def test_mistake_with_a_large_radius_and_a_falling_loss_are_warnings() -> None:
    label = np.array([0] * 60 + [1] * 60)
    radius = np.where(np.arange(120) < 3, 0.9, 0.2)
    answers = Answers(LABELS, label, np.where(np.arange(120) < 3, 1, label), radius)
    card = card_for(random_groupsort(0), "pets")
    figures = details(answers, card, [0.1], same_images=False)
    text = "\n".join(cautions(card, answers, figures, [replace(one, loss=0.5**one.epoch) for one in HISTORY]))
    assert "3 of 3 mistakes have a radius above the median" in text
    assert "still falling" in text
    assert "still falling" not in "\n".join(
        cautions(card, answers, figures, [replace(one, loss=0.5) for one in HISTORY])
    )


def test_card_is_not_changed_by_the_page(artefact: Path) -> None:
    before = read_card(artefact)
    write_report_page(artefact, data_set(), HISTORY)
    assert read_card(artefact) == before
    assert json.loads((artefact / HISTORY_FILE).read_text())[0]["epoch"] == 1
