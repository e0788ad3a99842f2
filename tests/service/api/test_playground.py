"""The playground and the documentation in a browser: what they say and send, and what happens when something fails."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from process_table import wait_until
from server_process import ServerProcess
from thorough import often

from service.access.keys import new_key
from service.artefact.card import read_card

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "models" / "zoo"
MODELS = sorted(path.parent.name for path in SHIPPED.glob("*/card.json") if "-novelty" not in path.parent.name)
"""Novelty models have no samples: no image is one of theirs."""
ANSWERED = "!$('result').hidden && !$('answer').classList.contains('busy') && $('noise-caption').textContent"
BY_ID = "globalThis.$ = id => document.getElementById(id);"


class Page:
    """The playground of a server in a browser."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser = browser
        self.url = url

    def open(self, fragment: str = "") -> None:
        """Load the page and wait for its first answer or problem."""
        self.browser.open("about:blank")
        self.browser.wait("location.href === 'about:blank'")
        self.browser.requested.clear()
        self.browser.errors.clear()
        self.browser.open(self.url + fragment)
        self.browser.wait("document.readyState === 'complete' && document.getElementById('result') !== null")
        self.browser.run(BY_ID)
        self.browser.wait(f"({ANSWERED}) || !$('problem').hidden || $('source').textContent.includes('no samples')")

    def answer(self) -> dict[str, Any]:
        """Wait for the page to be at rest, and return the answer that it shows."""
        self.browser.wait(ANSWERED)
        return json.loads(self.text("json"))

    def after(self, change: Any) -> dict[str, Any]:
        """Make a change, and return the next answer."""
        self.browser.run("$('json').textContent = $('noise-caption').textContent = ''")
        change()
        self.browser.wait(f"$('json').textContent && ({ANSWERED})")
        return json.loads(self.text("json"))

    def text(self, name: str) -> str:
        """Text of an element; empty where it is hidden."""
        return self.browser.run(f"$('{name}').closest('[hidden]') ? '' : $('{name}').textContent.replace(/\\s+/g, ' ')")

    def choose(self, name: str, value: str) -> dict[str, Any]:
        """Set a control, and return the next answer."""
        return self.after(lambda: self.browser.choose(f"#{name}", value))

    def pixels(self, canvas: str) -> np.ndarray:
        """Pixels of a canvas, H x W x C."""
        content = self.browser.run(f"$('{canvas}').toDataURL('image/png').split(',')[1]")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")).astype(int)


@contextmanager
def serving(**settings: object) -> Iterator[tuple[str, ServerProcess]]:
    """A server in a process of its own, and its address."""
    server = ServerProcess([sys.executable, "-m", "service"], settings)
    try:
        server.wait_started(1)
        found = re.search(r"serving on (http://127.0.0.1:\d+)", server.log)
        assert found is not None, server.log
        yield found[1] + "/", server
    finally:
        server.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(models=SHIPPED, default_model="mnist") as (url, _):
        yield url


@pytest.fixture
def page(browser: Browser, server: str) -> Iterator[Page]:
    browser.size(1280, 900)
    page = Page(browser, server)
    page.open()
    yield page
    assert browser.errors == []
    own = (server, f"blob:{server}", "data:", "about:")
    assert [url for url in browser.requested if not url.startswith(own)] == []


def test_a_class_stands_beside_how_often_such_answers_are_right(page: Page) -> None:
    answer = page.answer()
    card = read_card(SHIPPED / "mnist")
    assert page.text("claim").startswith("Proved: no change smaller than ")
    caveat = page.text("caveat")
    assert caveat.startswith("Stable is not right. Of 10,000 test images")
    assert f"answered {100 * (card.accuracy or 0):.1f} % right" in caveat
    reached = max(
        entry.epsilon for entry in card.certified_accuracy if entry.epsilon <= answer["certificate"]["radius"]
    )
    assert f"right with a radius above {reached}" in caveat
    colours = page.browser.run("['label', 'caveat'].map(id => getComputedStyle($(id)).color)")
    assert colours[0] == colours[1]


@pytest.mark.parametrize("model", often(["malaria-cells", "mnist-0-8"], MODELS))
def test_every_model_has_samples_whose_noise_of_the_certified_size_keeps_the_class(page: Page, model: str) -> None:
    card = read_card(SHIPPED / model)
    answer = page.choose("model", model) if model != "mnist" else page.answer()
    for n in (0, 1):
        if n:
            answer = page.after(lambda: page.browser.click("#samples button:nth-child(2)"))
        assert answer["model"] == model
        label = card.labels[n]
        right = "right" if answer["label"] == label else "wrong, and stable all the same"
        assert page.text("truth") == f"True label of this sample: {label}. The answer is {right}."
        radius = answer["certificate"]["radius"]
        change = page.pixels("noise-picture") - page.pixels("original")
        distance = np.sqrt((change[..., : card.input.channels] ** 2).sum()) / 255
        assert 0.98 * radius < distance < radius
        assert page.text("noise-caption").endswith(f"answered again as {answer['label']}")


def test_a_sample_that_is_answered_wrong_says_so(page: Page) -> None:
    page.choose("model", "cifar10-cpu")
    wrong = 0
    for n, label in enumerate(read_card(SHIPPED / "cifar10-cpu").labels, 1):
        answer = page.after(lambda n=n: page.browser.click(f"#samples button:nth-child({n})"))
        wrong += answer["label"] != label
        assert ("The answer is wrong" in page.text("truth")) == (answer["label"] != label)
    assert wrong > 0


def draw_one(page: Page) -> dict[str, Any]:
    page.browser.click("#clear")
    box = page.browser.run("(b => [b.x, b.y, b.width])($('draw').getBoundingClientRect())")
    x, y, size = box
    line = [(x + 0.5 * size, y + (0.2 + 0.05 * step) * size) for step in range(13)]
    return page.after(lambda: page.browser.draw(line))


def test_a_drawing_is_answered_and_made_again_at_the_size_of_the_next_model(page: Page) -> None:
    assert draw_one(page)["label"] == "1"
    assert "Drawn here" in page.text("notices")
    for model in ("malaria-cells", "cifar10-cpu", "mnist-0-8"):
        answer = page.choose("model", model)
        shape = read_card(SHIPPED / model).input
        assert answer["image"]["shape"] == [1, shape.height, shape.width]
        assert not answer["image"]["resized"]
        assert "Drawn here" in page.text("notices")
    assert "whether yours is one, the model does not say" in page.text("truth")


def test_a_file_of_another_size_and_kind_is_named_as_resized_and_converted(page: Page, tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 60, 3), [200, 30, 30], np.uint8)).save(tmp_path / "red.png")
    answer = page.after(lambda: page.browser.choose_files("#file", [tmp_path / "red.png"]))
    assert answer["image"] | {"digest": ""} == {
        "digest": "",
        "shape": [3, 40, 60],
        "conversion": "rgb_to_grey",
        "resized": True,
    }
    assert "Resized from 60 x 40 to 28 x 28" in page.text("notices")
    assert "Converted to grey" in page.text("notices")
    assert "answered again as" in page.text("noise-caption")


def test_a_file_that_the_service_refuses_can_be_fitted_in_the_browser(page: Page, tmp_path: Path) -> None:
    Image.fromarray(np.full((30, 30, 4), 120, np.uint8)).save(tmp_path / "alpha.png")
    page.browser.choose_files("#file", [tmp_path / "alpha.png"])
    page.browser.wait("!$('fit').hidden")
    assert page.text("problem-text")
    page.after(lambda: page.browser.click("#fit"))
    assert "Fitted to the model in the browser" in page.text("notices")
    (tmp_path / "text.png").write_text("no image")
    page.browser.choose_files("#file", [tmp_path / "text.png"])
    page.browser.wait("!$('problem').hidden")
    assert page.browser.run("$('fit').hidden && $('result').hidden")
    page.after(lambda: page.browser.click("#samples button"))


def test_several_files_are_answered_in_a_gallery_of_which_each_opens(page: Page) -> None:
    files = sorted((SHIPPED / "mnist" / "samples").glob("*.png"))[:4]
    page.after(lambda: page.browser.choose_files("#file", files))
    page.browser.wait("[...document.querySelectorAll('#gallery-list b')].length === 4")
    labels = page.browser.run("[...document.querySelectorAll('#gallery-list b')].map(b => b.textContent)")
    assert labels == [file.stem.split("-")[1] for file in files]
    assert page.after(lambda: page.browser.click("#gallery-list button:nth-child(3)"))["label"] == labels[2]
    page.choose("model", "mnist-accurate")
    page.browser.wait("[...document.querySelectorAll('#gallery-list b')].length === 4")


def test_a_pasted_picture_is_answered(page: Page) -> None:
    page.after(
        lambda: page.browser.run(
            "(async () => { const canvas = new OffscreenCanvas(50, 40); canvas.getContext('2d').fillRect(5, 5, 9, 9);"
            "const data = new DataTransfer(); data.items.add(new File([await canvas.convertToBlob()], 'p.png', "
            "{type: 'image/png'})); document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data})) })()"
        )
    )
    assert "Pasted" in page.text("notices")
    assert "Resized from 50 x 40" in page.text("notices")


def test_a_photograph_is_answered(page: Page) -> None:
    if page.browser.run("$('camera').hidden"):
        pytest.skip("this browser has no camera")
    page.browser.click("#camera")
    page.browser.wait("document.querySelector('dialog video').videoWidth > 0")
    page.after(lambda: page.browser.click("dialog button"))
    assert "Photographed" in page.text("notices")
    assert not page.browser.run("document.querySelector('dialog')")


def test_epsilon_is_answered_as_proved_open_or_refuted(page: Page) -> None:
    radius = page.answer()["certificate"]["radius"]
    page.choose("epsilon", "0.5")
    assert page.text("at-epsilon").startswith("Epsilon 0.5 (4.6 grey levels): proved.")
    assert page.browser.run("$('at-epsilon').classList.contains('good')")
    page.browser.run("$('epsilon').max = 99")
    answer = page.choose("epsilon", "20")
    assert answer["certificate"]["radius"] >= radius
    assert "not robust. An image of class" in page.text("at-epsilon")
    assert page.browser.run("$('at-epsilon').classList.contains('open')")
    page.choose("epsilon", "0")
    assert page.text("at-epsilon") == ""


def test_the_certified_set_is_offered_where_the_model_is_calibrated(page: Page) -> None:
    page.choose("coverage", "0.95")
    assert page.text("set").startswith("Certified set: {0}. Sets like this hold the true class of 95.0 %")


def test_the_predicted_class_is_no_target_and_a_target_that_becomes_it_is_given_up(page: Page) -> None:
    predicted = page.answer()["label"]
    offered = page.browser.run("[...$('target').options].map(option => option.value)")
    assert offered == ["", *(label for label in "0123456789" if label != predicted)]
    assert page.choose("target", "7")["counterfactual"]["class_id"] == 7
    answer = page.after(lambda: page.browser.click("#samples button:nth-child(8)"))
    assert answer["label"] == "7"
    assert page.browser.run("$('target').value") == ""


def test_options_that_the_server_does_not_have_are_hidden(page: Page) -> None:
    properties = page.browser.run("fetch('openapi.json').then(r => r.json())")["components"]["schemas"]
    for option, row in {"strength": "strength-row", "path": "path-option", "saliency": "saliency-row"}.items():
        assert page.browser.run(f"$('{row}').hidden") == (option not in properties["PredictRequest"]["properties"])


def test_a_link_shows_the_same_view_again(page: Page) -> None:
    page.choose("model", "fashion-mnist-robust")
    page.after(lambda: page.browser.click("#samples button:nth-child(4)"))
    page.choose("proof", "best")
    page.choose("target", "T-shirt/top")
    answer = page.choose("epsilon", "0.25")
    link = page.browser.run("location.hash")
    page.open(link)
    assert page.answer() == answer
    page.open("#model=nothing&sample=99&target=x&epsilon=many&proof=%3Cscript%3E")
    assert page.answer()["model"] == "mnist"


def test_the_saved_files_hold_in_an_audit_and_the_programs_run(page: Page, tmp_path: Path) -> None:
    page.browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    answer = draw_one(page)
    page.browser.click("#save")
    wait_until(lambda: (tmp_path / "answer.json").exists() and (tmp_path / "image.png").exists())
    stored = json.loads((tmp_path / "answer.json").read_text())
    assert stored["certificate"] == answer["certificate"]
    command = page.browser.run("$('audit-text').textContent").split()
    assert command == ["lipcert", "audit", "answer.json", "image.png", "--model", "models/zoo/mnist"]
    audited = run("-m", "service", *command[1:-1], str(SHIPPED / "mnist"), cwd=tmp_path)
    assert audited.startswith("holds")
    program = page.browser.run("$('python-text').textContent")
    assert run("-c", program, cwd=tmp_path).split() == [answer["label"], str(answer["certificate"]["radius"])]
    assert "predict?model=mnist&novelty=true&counterfactual=true'" in page.text("curl-text")


def run(*arguments: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_page_works_by_keyboard_alone(page: Page) -> None:
    page.browser.run("document.activeElement.blur()")
    reached = []
    for _ in range(40):
        page.browser.press("Tab", 9)
        reached.append(page.browser.run("document.activeElement.id || document.activeElement.parentElement.id"))
        if reached[-1] == "samples" and reached.count("samples") == 3:
            break
    assert page.after(lambda: page.browser.press("Enter", 13))["label"] == "2"
    assert page.browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for _ in range(40):
        page.browser.press("Tab", 9)
        reached.append(page.browser.run("document.activeElement.id || document.activeElement.parentElement.id"))
    assert {"model", "samples", "clear", "file", "target", "proof", "epsilon", "coverage", "noise-again"} <= set(
        reached
    )


@pytest.mark.parametrize("model", ["mnist", "fashion-mnist-robust", "cifar10-cpu", "malaria-cells"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_narrow_phone_shows_all_without_sideways_scrolling(page: Page, model: str, dark: bool) -> None:
    page.browser.size(320, 568, phone=True, dark=dark)
    page.open(f"#model={model}&epsilon=0.1&coverage=0.9")
    page.answer()
    for details in range(3):
        page.browser.run(f"document.querySelectorAll('details')[{details}].open = true")
    assert page.browser.run("document.documentElement.scrollWidth") == 320
    sizes = page.browser.run(
        "[...document.querySelectorAll('#pictures canvas')].filter(c => c.offsetWidth).map(c => "
        "(b => [b.width, b.height])(c.getBoundingClientRect()))"
    )
    assert len(sizes) == 4
    assert len({(round(width), round(height)) for width, height in sizes}) == 1
    assert page.browser.run("$('label').getBoundingClientRect().bottom < innerHeight && scrollY === 0")


def test_a_page_of_a_proxy_is_one_clear_line(page: Page) -> None:
    page.browser.run("globalThis.real = fetch; globalThis.fetch = async () => new Response('<h1>', {status: 502, "
                     "statusText: 'Bad Gateway'})")  # fmt: skip
    page.browser.click("#samples button")
    page.browser.wait("!$('problem').hidden")
    assert page.text("problem-text").startswith(
        'Something between this page and the server answered "502 Bad Gateway".'
    )
    page.browser.run("globalThis.fetch = async () => new Response('<h1>welcome', {status: 200})")
    page.browser.click("#again")
    page.browser.wait("$('problem-text').textContent.includes('not whole JSON')")
    page.browser.run("globalThis.fetch = real")
    page.after(lambda: page.browser.click("#again"))
    assert page.text("problem-text") == ""


def test_a_dead_server_is_one_clear_line(browser: Browser, zoo: Path) -> None:
    with serving(models=zoo) as (url, server):
        page = Page(browser, url)
        page.open()
        assert "states no accuracy" in (draw_one(page), page.text("caveat"))[1]
        server.close()
        page.browser.choose("#proof", "best")
        page.browser.wait("!$('problem').hidden")
        assert (
            page.text("problem-text") == "The server cannot be reached. It may have stopped, or this device is offline."
        )
        assert page.browser.run("!$('again').hidden && $('result').hidden")


def test_a_server_with_keys_asks_for_one(browser: Browser, zoo: Path) -> None:
    key, line = new_key("ci", ["predict"])
    with serving(models=zoo, api_keys=line) as (url, _):
        page = Page(browser, url)
        page.open()
        assert "API key" in page.text("problem-text")
        assert page.browser.run("!$('key-field').hidden")
        page.browser.choose("#key", key)
        page.browser.wait("$('problem').hidden")
        assert draw_one(page)["model"] == "grey"
        assert key not in page.browser.run("document.documentElement.outerHTML + JSON.stringify(localStorage)")
        assert "X-API-Key: $KEY" in page.text("curl-text")


DOCUMENTED = "document.querySelectorAll('.opblock').length > 5"


def test_the_documentation_is_readable_on_a_phone_and_in_the_dark(page: Page) -> None:
    page.browser.size(320, 568, phone=True, dark=True)
    page.browser.open(page.url + "docs")
    page.browser.wait(DOCUMENTED)
    page.browser.click(".opblock-summary-control")
    page.browser.wait("document.querySelector('.responses-table') !== null")
    assert page.browser.run("document.documentElement.scrollWidth") == 320
    narrow = (
        "[...document.querySelectorAll('.opblock-body td')].filter(e => e.offsetWidth && e.offsetWidth < 200).length"
    )
    assert page.browser.run(narrow) == 0
    assert (
        page.browser.run("getComputedStyle(document.querySelector('.swagger-ui')).backgroundColor") == "rgb(28, 32, 34)"
    )


OPERATIONS = [
    "/predict",
    "/models/{name}",
    "/models/{name}/samples/{n}",
    "/v2/repository/index",
    "/v2/models/{name}/infer",
    "/v1/models/{name}:predict",
]
"""One of each kind of parameters and body: `test_docs_page.py` runs all operations, without the page."""


def test_the_operations_of_the_documentation_run_as_they_are(page: Page) -> None:
    page.browser.open(page.url + "docs")
    page.browser.wait(DOCUMENTED)
    for path in OPERATIONS:
        block = f"document.querySelector('.opblock:has([data-path=\"{path}\"])')"
        status = f"{block}.querySelector('.live-responses-table tbody .response-col_status')"
        page.browser.run(f"{block}.querySelector('.opblock-summary-control').click()")
        page.browser.wait(f"{block}.querySelector('.execute') !== null")
        # Fields, and the examples in them, arrive a moment later.
        page.browser.wait(f"{block}.querySelectorAll('[data-param-in=path] input').length === {path.count('{')}")
        page.browser.wait(
            f"[...{block}.querySelectorAll('textarea, [data-param-in=path] input')].every(field => field.value)"
        )
        page.browser.run(f"{block}.querySelector('.execute').click()")
        page.browser.wait(f"{status}?.textContent")
        shown = page.browser.run(f"{status}.textContent.trim()")
        assert shown == "200", page.browser.run(f"{block}.textContent")[:200]
        page.browser.run(f"{block}.querySelector('.opblock-summary-control').click()")
