"""Evidence folders: members, schema, page, statements, refusals."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from commands import run_command
from PIL import Image

from lipcert.__main__ import main
from service.artefact.card import CertifiedAccuracy, write_artefact
from service.certificate.rules.table import RULES
from service.evidence.derivation import operating_domain
from service.evidence.folder import compile_evidence, schema
from service.evidence.intervals import clopper_pearson
from service.evidence.record import Evidence
from service.evidence.texts import ASSUMPTIONS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graphs, folder = builders.random_groupsort(3), tmp_path_factory.mktemp("artefact") / "small"
    card = builders.card_for(graphs, "small").model_copy(
        update={
            "accuracy": 0.9,
            "labels": ["a", "<b>", "c & d"],
            "certified_accuracy": [CertifiedAccuracy(epsilon=0.5, value=0.65, with_references=0.7, n=20)],
        }
    )
    write_artefact(folder, card, graphs.model)
    return folder


@pytest.fixture(scope="module")
def files(artefact: Path) -> dict[str, bytes]:
    return compile_evidence(artefact)


def misfits(value: Any, wanted: dict[str, Any], root: dict[str, Any], where: str = "evidence") -> list[str]:
    """Places where a value is not as the keywords of its schema say, of those that the schema uses."""
    if "$ref" in wanted:
        wanted = root["$defs"][wanted["$ref"].removeprefix("#/$defs/")]
    if "anyOf" in wanted:
        return min((misfits(value, one, root, where) for one in wanted["anyOf"]), key=len)
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
    found = [] if isinstance(value, kinds.get(wanted.get("type", ""), object)) else [f"{where}: type"]
    if found or isinstance(value, bool):
        return found or [f"{where}: boolean"]
    found += [f"{where}: const"] if value != wanted.get("const", value) else []
    if isinstance(value, dict):
        known = wanted.get("properties", {})
        found += [f"{where}.{name}: missing" for name in wanted.get("required", []) if name not in value]
        rest = wanted.get("additionalProperties", True)
        for name, member in value.items():
            if name not in known and rest is False:
                found.append(f"{where}.{name}: unknown")
            elif name in known or isinstance(rest, dict):
                found += misfits(member, known.get(name, rest), root, f"{where}.{name}")
    if isinstance(value, list):
        of_each = wanted.get("prefixItems") or [wanted["items"]] * len(value)
        found += [] if wanted.get("minItems", 0) <= len(value) == len(of_each) else [f"{where}: length"]
        for place, (member, one) in enumerate(zip(value, of_each, strict=False)):
            found += misfits(member, one, root, f"{where}[{place}]")
    if isinstance(value, str) and not re.search(wanted.get("pattern", ""), value):
        found.append(f"{where}: pattern")
    if isinstance(value, (int, float)) and not wanted.get("minimum", value) <= value <= wanted.get("maximum", value):
        found.append(f"{where}: range")
    return found


def test_the_evidence_is_as_its_schema_says(files: dict[str, bytes]) -> None:
    evidence, described = json.loads(files["evidence.json"]), json.loads(files["evidence.schema.json"])
    assert files["evidence.schema.json"] == schema()
    assert misfits(evidence, described, described) == []
    assert Evidence.model_validate_json(files["evidence.json"]).identity.name == "small"
    evidence["bounds"]["logit_error"] = -1.0
    evidence["norms"][0]["extra"] = 1
    del evidence["derivation"][0]["theorem"]
    assert len(misfits(evidence, described, described)) == 3


def test_two_folders_differ_in_the_members_about_time_and_machine_alone(
    artefact: Path, files: dict[str, bytes]
) -> None:
    again = compile_evidence(artefact)
    assert again.keys() == files.keys()
    changed = {name for name in files if files[name] != again[name]}
    assert changed <= {"evidence.json", "index.html", "SHA256SUMS"}
    one, other = (json.loads(found["evidence.json"]) for found in (files, again))
    one.pop("made"), other.pop("made")
    assert one == other


def test_the_page_stands_alone_and_escapes_every_text(files: dict[str, bytes]) -> None:
    page = files["index.html"].decode("utf-8")
    tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert all(name not in ("src", "href") or str(value).startswith("data:") for name, value in attrs)

    Tags().feed(page)
    assert not {"script", "link", "iframe", "b>"} & set(tags)
    assert "&lt;b&gt;" in page
    assert "c &amp; d" in page
    assert "http" not in page
    evidence = json.loads(files["evidence.json"])
    assert all(one["text"] in page.replace("&#x27;", "'") for one in evidence["assumptions"])
    assert all(text in page for text in evidence["not_covered"])


def test_exact_logits_are_those_of_the_audit_and_rationals(files: dict[str, bytes]) -> None:
    evidence = json.loads(files["evidence.json"])
    for vector in evidence["test_vectors"]:
        ends = [[Fraction(end) for end in pair] for pair in vector["exact_logits"]]
        assert all(low <= high < low + Fraction(1, 10**40) for low, high in ends)
        assert vector["largest_difference"] <= evidence["bounds"]["logit_error"]
        assert np.argmax(vector["runtime_logits"]) == vector["class_id"]


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # R: binom.test(k, n)$conf.int
    [
        (0, 10, 0.0, 0.3084971),
        (5, 10, 0.1870860, 0.8129140),
        (10, 10, 0.6915029, 1.0),
        (9840, 10000, 0.9813449, 0.9863676),
    ],
)
def test_intervals_are_those_of_clopper_and_pearson(successes: int, n: int, low: float, high: float) -> None:
    assert clopper_pearson(successes, n) == pytest.approx((low, high), abs=1e-7)


def test_an_impossible_count_has_no_interval() -> None:
    with pytest.raises(ValueError, match="11 successes in 10 draws"):
        clopper_pearson(11, 10)


def test_a_share_without_a_number_of_images_has_no_interval(files: dict[str, bytes]) -> None:
    card = builders.card_for(builders.random_groupsort(3)).model_copy(update={"accuracy": 0.9})
    domain = operating_domain(card)
    assert domain.statements == []
    assert domain.without_interval == ["accuracy: the card states 0.9 of None images, which is no count"]
    stated = json.loads(files["evidence.json"])["operating_domain"]["statements"]
    assert [(one["epsilon"], one["proof"], one["successes"], one["n"]) for one in stated] == [
        (None, None, 18, 20),
        (0.5, "fast", 13, 20),
        (0.5, "best", 14, 20),
    ]
    assert (
        "for every image closer than 0.5 in L2, at reference images (`proof=best`), with a prob"
        in stated[2]["statement"]
    )


def test_assumptions_are_those_of_the_soundness_page_and_their_tests_exist() -> None:
    page = (ROOT / "docs" / "soundness.md").read_text(encoding="utf-8")
    section = page.split("\n## Assumptions\n")[1].split("\n## ")[0]
    titles = re.findall(r"^(\d+)\. \*\*(.+?)\.?\*\*", section, re.MULTILINE)
    assert [(str(one.number), one.title) for one in ASSUMPTIONS] == titles
    for test in (test for one in ASSUMPTIONS for test in one.tests):
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


def test_every_source_names_a_function_and_a_row_of_the_soundness_page(files: dict[str, bytes]) -> None:
    table = (ROOT / "docs" / "soundness.md").read_text(encoding="utf-8").split("| operators |")[1].split("\n\n")[0]
    for node in json.loads(files["evidence.json"])["derivation"]:
        row, place = node["source"].removeprefix("docs/soundness.md, Lipschitz bounds: ").split("; ")
        module, function = place.split(", ")
        assert row in table
        assert f"def {function}(" in (ROOT / module).read_text(encoding="utf-8")
        assert node["theorem"] == RULES[node["operator"]].theorem or "pair" in node["theorem"]


def test_the_command_writes_a_folder_that_the_second_program_accepts(artefact: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "deep" / "out"
    images.mkdir()
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(images / "one.png")
    result = run_command(main, ["evidence", str(artefact), "--out", str(out), "--images", str(images)])
    assert (result.exit_code, result.output.partition(":")[0]) == (0, "accepted")
    assert "5 test vectors" in result.output
    assert json.loads((out / "evidence.json").read_bytes())["test_vectors"][-1]["name"] == "image-0 one.png"
    assert list(tmp_path.glob("deep/.*")) == []
    again = run_command(main, ["evidence", str(artefact), "--out", str(out)])
    assert again.exit_code == 2


def test_a_model_that_the_second_program_does_not_read_is_written_and_refused(tmp_path: Path) -> None:
    builders.write(tmp_path / "small", builders.dense([], (np.eye(3, 16), np.zeros(3)), (1, 4, 4), np.float32), "small")
    result = run_command(main, ["evidence", str(tmp_path / "small"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 3
    assert result.output == "refused: model.onnx: a graph that does not compute in float64\n"
    assert (tmp_path / "out" / "index.html").is_file()


def test_bad_input_ends_with_a_line_and_no_folder(artefact: Path, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    colour = tmp_path / "colour"
    colour.mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(colour / "one.png")
    for words, status, message in (
        ([str(artefact), "--out", str(tmp_path / "full")], 2, "is not an empty folder"),
        ([str(artefact), "--out", str(tmp_path / "full" / "file" / "x")], 2, "cannot be written"),
        ([str(tmp_path / "no"), "--out", str(tmp_path / "out")], 1, "the file is missing"),
        ([str(artefact), "--out", str(tmp_path / "out"), "--images", str(tmp_path / "no")], 2, "cannot be read"),
        ([str(artefact), "--out", str(tmp_path / "out"), "--images", str(tmp_path / "full")], 2, "not an image"),
        ([str(artefact), "--out", str(tmp_path / "out"), "--images", str(colour)], 2, "(3, 4, 4)"),
    ):
        caplog.clear()
        assert run_command(main, ["evidence", *words]).exit_code == status
        assert message in caplog.text
        assert not (tmp_path / "out").exists()
