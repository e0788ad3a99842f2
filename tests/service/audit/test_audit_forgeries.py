"""Forged answers: a change of any member is contradicted or left undecided, with a reason that names the member."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from fractions import Fraction
from math import inf, nextafter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_cases import Archived, Json, archive
from client import Client
from encoding import encode

from service.artefact.card import digest
from service.audit import Conclusion, audit
from service.errors import KeptError
from service.pixels.images import decode_image


def black_and_white(grey_HW: np.ndarray) -> np.ndarray:
    """Pixels that the box stops at once, most of them in one direction."""
    return np.where(grey_HW < 128, 0, 255).astype(np.uint8)


@pytest.fixture
def archived(client: Client, zoo: Path, grey_HW: np.ndarray) -> Archived:
    """An answer of the grey model with every member that it can have."""
    return archive(client, encode(grey_HW), zoo / "grey", epsilon=0.01, counterfactual=True)


@pytest.fixture
def explained(client: Client, zoo: Path, grey_HW: np.ndarray) -> Archived:
    """An answer with a counterfactual beyond the boundary, the path to it, and a saliency."""
    return archive(client, encode(grey_HW), zoo / "grey", counterfactual=True, strength=2.0, path=4, saliency=True)


def swap(answer: Json) -> None:
    other = answer["certificate"]["runner_up"]["class_id"]
    answer["certificate"]["runner_up"] = {"class_id": answer["class_id"], "label": answer["label"]}
    answer["class_id"], answer["label"] = other, f"class {other}"


def certificate(**members: Any) -> Callable[[Json], object]:
    return lambda answer: answer["certificate"].update(members)


def scaled(name: str, factor: float) -> Callable[[Json], object]:
    return lambda answer: answer["certificate"].update({name: answer["certificate"][name] * factor})


def third_class(answer: Json) -> None:
    (other,) = {0, 1, 2} - {answer["class_id"], answer["certificate"]["runner_up"]["class_id"]}
    answer["certificate"]["runner_up"] = {"class_id": other, "label": f"class {other}"}


def found(**members: Any) -> Callable[[Json], object]:
    return lambda answer: answer["counterfactual"].update(members)


def waypoint(n: int, **members: Any) -> Callable[[Json], object]:
    return lambda answer: answer["counterfactual"]["path"][n].update(members)


def another_picture(answer: Json) -> None:
    pixels = decode_image(base64.b64decode(answer["counterfactual"]["image"]), 2**20).copy()
    pixels[0, 0, 0] ^= 128
    answer["counterfactual"]["image"] = base64.b64encode(encode(pixels[0])).decode()


def larger_radius(answer: Json) -> None:
    """All terms of the radius, consistently, so that it is 1.01 times what was answered."""
    terms = answer["certificate"]
    terms["lipschitz_bound"] /= 1.01
    i, j = answer["class_id"], terms["runner_up"]["class_id"]
    margin = answer["logits"][i] - answer["logits"][j] - 4 * terms["logit_error"]
    terms["radius"] = nextafter(nextafter(margin / terms["lipschitz_bound"], 0.0), 0.0)
    product = terms["radius"] * 255
    exact = Fraction(terms["radius"]) * 255
    terms["radius_255"] = product if Fraction(product) <= exact else nextafter(product, 0.0)


def the_original(answer: Json) -> None:
    answer["counterfactual"].update(class_id=answer["class_id"], label=answer["label"])


FAILED: dict[str, tuple[Callable[[Json], object], list[str]]] = {
    "class": (
        swap,
        [
            "class_id: 0, and logit 2 of the answer is the first of the largest",
            "radius: ",
            "counterfactual.reached: true, and it has the class 0 of the image",
            "class_id: 0, the exact network gives class 2 a logit larger by ",
        ],
    ),
    "class out of range": (
        lambda a: a.update(class_id=9),
        ["class_id: 9, and the answer has logits of classes 0 to 2", "class_id: 9, the card has classes 0 to 2"],
    ),
    "label": (lambda a: a.update(label="seven"), ["label: 'seven', class 2 of the card is 'class 2'"]),
    "logit": (lambda a: a["logits"].__setitem__(1, a["logits"][1] + 1e-9), ["logits: logit 1 is"]),
    "logit that is not finite": (lambda a: a["logits"].__setitem__(1, None), ["logits: logit 1 is null"]),
    "too few logits": (
        lambda a: a["logits"].pop(0),
        ["class_id: 2, and", "logits: the answer has 2, the card has 3", "logits: logit "],
    ),
    "model": (lambda a: a.update(model="other"), ["model: 'other', the artefact is 'grey'"]),
    "radius": (scaled("radius", 1.001), ["radius_255: ", "radius: "]),
    "smaller radius": (scaled("radius", 0.999), ["radius: ", "radius_255: "]),
    "radius in grey levels": (
        lambda a: a["certificate"].update(radius_255=nextafter(a["certificate"]["radius_255"], inf)),
        ["radius_255: "],
    ),
    "smaller radius in grey levels": (
        lambda a: a["certificate"].update(radius_255=nextafter(a["certificate"]["radius_255"], 0.0)),
        ["radius_255: "],
    ),
    "certified": (
        certificate(certified=False),
        ["certified: false with a radius of", "robust_at_epsilon: true, expected false"],
    ),
    "radius 0": (
        certificate(radius=0.0, radius_255=0.0),
        ["radius: 0.0, and", "certified: true with a radius of 0.0", "robust_at_epsilon: true, expected false"],
    ),
    "abstention": (
        certificate(radius=0.0, radius_255=0.0, certified=False, robust_at_epsilon=False),
        ["radius: 0.0, and logits, lipschitz_bound and logit_error of the answer give "],
    ),
    "epsilon": (certificate(epsilon=5.0), ["robust_at_epsilon: true, expected false with epsilon 5.0"]),
    "epsilon flag": (certificate(robust_at_epsilon=False), ["robust_at_epsilon: false, expected true"]),
    "flag without epsilon": (certificate(epsilon=None), ["robust_at_epsilon: true, expected null"]),
    "larger Lipschitz bound": (scaled("lipschitz_bound", 1.001), ["radius: "]),
    "no Lipschitz bound": (certificate(lipschitz_bound=None), ["radius: above 0, while"]),
    "larger logit error": (scaled("logit_error", 1.5), ["radius: "]),
    "no logit error": (certificate(logit_error=None), ["radius: above 0, while"]),
    "runner-up": (third_class, ["radius: "]),
    "class as its runner-up": (
        lambda a: a["certificate"].update(runner_up={"class_id": a["class_id"], "label": a["label"]}),
        ["runner_up: 2 is not another class of the answer"],
    ),
    "label of the runner-up": (
        lambda a: a["certificate"]["runner_up"].update(label="x"),
        ["runner_up.label: 'x', class 0 of the card is 'class 0'"],
    ),
    "digest of the image": (lambda a: a["image"].update(digest=digest(b"")), ["image.digest: sha256:e3b0c442"]),
    "shape of the image": (lambda a: a["image"].update(shape=[3, 4, 5]), ["image.shape: (3, 4, 5), the file has"]),
    "conversion": (
        lambda a: a["image"].update(conversion="rgb_to_grey"),
        ["image.conversion: 'rgb_to_grey', expected null"],
    ),
    "resize": (lambda a: a["image"].update(resized=True), ["image.resized: true, expected false"]),
    "class of the counterfactual": (
        found(class_id=1, label="class 1"),
        ["counterfactual.class_id: 1, the exact network gives its image another class"],
    ),
    "the predicted class as the counterfactual": (
        the_original,
        ["counterfactual.reached: true, and it has the class 2", "counterfactual.class_id: 2, the exact network"],
    ),
    "label of the counterfactual": (found(label="x"), ["counterfactual.label: 'x', class 0 of the card is"]),
    "distance": (found(distance=0.123456789), ["counterfactual.distance: 0.123456789, the images are 1.1"]),
    "picture": (another_picture, ["counterfactual.distance: "]),
    "no picture": (found(image="AAAA"), ["counterfactual.image: it is no file of the type image/png"]),
    "text as a picture": (found(image="é"), ["counterfactual.image: it is not base64"]),
    "picture of another size": (
        found(image=base64.b64encode(encode(np.zeros((3, 3), np.uint8))).decode()),
        ["counterfactual.image: its shape is (1, 3, 3), an image of (1, 4, 5) was sent"],
    ),
    "media type": (found(media_type="image/jpeg"), ["counterfactual.media_type: 'image/jpeg'"]),
    "radius beyond the counterfactual": (
        lambda a: a["certificate"].update(radius=2 * a["counterfactual"]["distance"]),
        ["radius: ", "radius_255: ", "counterfactual: an image of class 0 at the distance"],
    ),
}

EXPLANATIONS: dict[str, tuple[Callable[[Json], object], list[str]]] = {
    "nearest counterfactual within the radius": (
        found(nearest_distance=0.001),
        ["counterfactual.nearest_distance: 0.001 lies within the radius"],
    ),
    "nearest counterfactual beyond the one that is held": (
        found(nearest_distance=1e308),
        ["counterfactual.nearest_distance: 1e+308, farther than the counterfactual"],
    ),
    "class of a waypoint": (
        waypoint(1, class_id=1, label="class 1"),
        ["counterfactual.path.1.class_id: 1, the exact network", "counterfactual.path.1.margin: "],
    ),
    "label of a waypoint": (waypoint(1, label="x"), ["counterfactual.path.1.label: 'x', class "]),
    "margin of a waypoint": (waypoint(0, margin=0.123), ["counterfactual.path.0.margin: 0.123, the exact"]),
    "no margin of a waypoint": (waypoint(0, margin=None), ["counterfactual.path.0.margin: null, the exact"]),
    "distance of a waypoint": (waypoint(2, distance=9.0), ["counterfactual.path.2.distance: 9.0, the images are"]),
    "no picture of a waypoint": (waypoint(1, image="AAAA"), ["counterfactual.path.1.image: it is no file"]),
    "media type of a waypoint": (waypoint(1, media_type="x"), ["counterfactual.path.1.media_type: 'x', expected"]),
    "a path that begins elsewhere": (
        lambda a: a["counterfactual"]["path"].pop(0),
        ["counterfactual.path.0: is not the image that was sent"],
    ),
    "a path that ends elsewhere": (
        lambda a: a["counterfactual"]["path"].pop(),
        ["counterfactual.path: its last image is not the counterfactual"],
    ),
}

UNDECIDED: dict[str, tuple[Callable[[Json], object], list[str]]] = {
    "digest": (lambda a: a.update(digest=digest(b"")), ["digest: the answer is of sha256:e3b0c442"]),
    "digest of another card": (
        lambda a: a.update(card_digest=digest(b"")),
        ["card_digest: the answer is of sha256:e3b0c442"],
    ),
    "no digest of a card": (lambda a: a.update(card_digest=None), ["card_digest: the answer is of None"]),
    "norm": (certificate(norm="linf"), ["norm: 'linf' is not audited, l2 is"]),
    "no image": (lambda a: a.update(image=None), ["image: the answer does not name its image"]),
    "counterfactual that is not reached": (found(reached=False), ["counterfactual.reached: false with another class"]),
    "a larger radius with all its terms": (
        larger_radius,
        ["radius: the answer states", "lipschitz_bound: the answer states"],
    ),
}


@pytest.mark.parametrize("name", FAILED)
def test_a_forged_answer_does_not_hold_and_the_reasons_name_its_members(
    archived: Archived, tmp_path: Path, name: str
) -> None:
    change, reasons = FAILED[name]
    forged = deepcopy(archived.answer)
    change(forged)
    verdict = archived.check(tmp_path, forged)
    assert verdict.conclusion is Conclusion.DOES_NOT_HOLD
    for reason in reasons:
        assert any(line.startswith(reason) for line in verdict.failed), (reason, verdict.lines)
    assert all(line.startswith(tuple(reasons)) for line in verdict.failed), verdict.lines


@pytest.mark.parametrize("name", EXPLANATIONS)
def test_a_forged_way_to_the_counterfactual_does_not_hold(explained: Archived, tmp_path: Path, name: str) -> None:
    change, reasons = EXPLANATIONS[name]
    forged = deepcopy(explained.answer)
    change(forged)
    verdict = explained.check(tmp_path, forged)
    assert verdict.conclusion is Conclusion.DOES_NOT_HOLD
    for reason in reasons:
        assert any(line.startswith(reason) for line in verdict.failed), (reason, verdict.lines)


def test_a_way_to_the_counterfactual_holds_and_the_report_names_what_is_not_audited(
    explained: Archived, tmp_path: Path
) -> None:
    verdict = explained.check(tmp_path)
    assert verdict.conclusion is Conclusion.HOLDS
    assert verdict.proof.endswith("confirmed; 4 images of its path confirmed; not audited: saliency")


def test_a_larger_radius_of_a_waypoint_is_undecided(explained: Archived, tmp_path: Path) -> None:
    forged = deepcopy(explained.answer)
    forged["counterfactual"]["path"][0]["radius"] *= 1.01
    (line,) = explained.check(tmp_path, forged).undecided
    assert line.startswith("counterfactual.path.0.radius: the answer states")


@pytest.mark.parametrize("name", UNDECIDED)
def test_a_change_that_nothing_contradicts_is_undecided(archived: Archived, tmp_path: Path, name: str) -> None:
    change, reasons = UNDECIDED[name]
    forged = deepcopy(archived.answer)
    change(forged)
    verdict = archived.check(tmp_path, forged)
    assert verdict.conclusion is Conclusion.UNDECIDED, verdict.lines
    assert len(verdict.undecided) == len(reasons), verdict.lines
    for line, reason in zip(verdict.undecided, reasons, strict=True):
        assert line.startswith(reason), verdict.lines


def test_labels_that_are_forged_in_answer_and_card_do_not_hold(archived: Archived, tmp_path: Path) -> None:
    folder = tmp_path / archived.artefact.name
    shutil.copytree(archived.artefact, folder)
    card = json.loads((folder / "card.json").read_text())
    card["labels"][archived.answer["class_id"]] = "forged"
    (folder / "card.json").write_text(json.dumps(card))
    verdict = archived.check(tmp_path, archived.changed(label="forged"), artefact=folder)
    assert verdict.conclusion is Conclusion.UNDECIDED
    assert [line.partition(":")[0] for line in verdict.undecided] == ["card_digest"]
    # Whoever writes the digest of the forged card, too, has another card than the archived one.
    of_it = archived.changed(label="forged", card_digest=digest((folder / "card.json").read_bytes()))
    verdict = archived.check(tmp_path, of_it)
    assert verdict.conclusion is Conclusion.DOES_NOT_HOLD
    assert [line.partition(":")[0] for line in (*verdict.failed, *verdict.undecided)] == ["label", "card_digest"]


def test_an_answer_of_a_version_that_named_no_card_holds_and_the_report_says_so(
    archived: Archived, tmp_path: Path
) -> None:
    older = deepcopy(archived.answer)
    del older["card_digest"]
    verdict = archived.check(tmp_path, older)
    assert verdict.conclusion is Conclusion.HOLDS
    assert verdict.proof.endswith("its labels are those of the card that was named: answers of its version name none")
    assert "card" not in archived.check(tmp_path).proof


def test_another_image_does_not_hold(archived: Archived, grey_HW: np.ndarray, tmp_path: Path) -> None:
    changed = grey_HW.copy()
    changed[2, 3] ^= 1
    failed = archived.check(tmp_path, image=encode(changed)).failed
    assert failed[0].startswith("image.digest: sha256:")
    assert any(line.startswith("logits: logit 0") for line in failed)


# --- every member, mechanically ---------------------------------------------------------------------------------------


def members(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every member of an answer, objects and lists too, with its path."""
    if path:
        yield path, value
    if isinstance(value, dict | list):
        for key, member in value.items() if isinstance(value, dict) else enumerate(value):
            yield from members(member, (*path, key))


def mutations(value: Any) -> list[Any]:
    """Other values for a member; those of another type are refused as an answer."""
    if isinstance(value, bool):
        return [not value, None, int(value)]
    if isinstance(value, int):
        return [value + 1, value - 1, -1, 2**70, float(value), str(value), None]
    if isinstance(value, float):
        moved = [value * factor for factor in (1.0001, 0.9999, 2.0, 0.5, -1.0)]
        return [*moved, 0.0, 1e308, 10**400, 5e-324, str(value), None]
    if isinstance(value, str):
        return [value + "x", value[:-1], value[::-1] + "-", "", 3, None]
    if isinstance(value, list):
        return [value[:-1], [*value, *value[:1]], value[::-1], [], {}]
    return [None, [], {}]


def stays_true(path: tuple[str | int, ...], value: Any, other: Any) -> bool:
    """Whether the answer with another value is true as well."""
    if path == ("certificate", "epsilon"):
        # The request may have asked for this one.
        return isinstance(other, float | int)
    if path == ("certificate", "logit_error"):
        # Less than the rounding of the radius, and still a bound.
        return isinstance(other, float) and abs(other / value - 1) < 1e-3
    if path == ("certificate", "references"):
        # Their order means nothing.
        return other == value[::-1]
    if path == ("card_digest",) or (
        path[0] in ("coverage", "set", "max_error", "decision", "novelty") and value is None
    ):
        # Answers of earlier versions do not have them.
        return other is DELETED
    return path == ("counterfactual",) and other in (None, DELETED)


DELETED = "deleted"


def replaced(answer: Json, path: tuple[str | int, ...], other: Any) -> Json:
    """Return a copy of an answer with another value of one member, or without it."""
    forged = deepcopy(answer)
    holder: Any = forged
    for key in path[:-1]:
        holder = holder[key]
    if other is DELETED:
        del holder[path[-1]]
    else:
        holder[path[-1]] = other
    return forged


@pytest.mark.parametrize("form", ["plain", "one output", "converted and resized", "with reference images"])
def test_no_mutation_of_any_member_holds(
    client: Client, zoo: Path, grey_HW: np.ndarray, colour_HWC: np.ndarray, tmp_path: Path, form: str
) -> None:
    name, pixels = {"plain": ("grey", grey_HW), "one output": ("binary", grey_HW)}.get(
        form, ("grey", np.tile(colour_HWC, (2, 2, 1)))
    )
    proof = "fast"
    if form == "with reference images":
        name, pixels, proof = "grey", black_and_white(grey_HW), "best"
    archived = archive(client, encode(pixels), zoo / name, resize=True, epsilon=0.01, counterfactual=True, proof=proof)
    assert bool(archived.answer["certificate"]["references"]) == (proof == "best")
    assert archived.check(tmp_path).conclusion is Conclusion.HOLDS
    tried, held = 0, []
    for path, value in members(archived.answer):
        for other in [*mutations(value), DELETED]:
            forged = replaced(archived.answer, path, other)
            if json.dumps(forged) == json.dumps(archived.answer) or stays_true(path, value, other):
                continue
            tried += 1
            try:
                conclusion = archived.check(tmp_path, forged).conclusion
            except KeptError:
                continue
            if conclusion is Conclusion.HOLDS:
                held.append((path, other))
    assert held == []
    assert tried > 200


def test_no_mutation_of_several_members_holds(archived: Archived, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    every = [(path, value) for path, value in members(archived.answer) if not isinstance(value, dict | list)]
    tried, held = 0, []
    while tried < 200:
        chosen = [every[k] for k in random.permutation(len(every))[: random.integers(2, 6)]]
        forged, false = archived.answer, False
        for path, value in chosen:
            options = [other for other in mutations(value) if json.dumps(other) != json.dumps(value)]
            other = options[random.integers(len(options))]
            forged, false = replaced(forged, path, other), false or not stays_true(path, value, other)
        if not false:
            continue
        tried += 1
        try:
            if archived.check(tmp_path, forged).conclusion is Conclusion.HOLDS:
                held.append(forged)
        except KeptError:
            continue
    assert held == []


def with_twin(value: Any, path: tuple[str | int, ...], escaped: bool) -> str:
    """Return JSON in which the member at `path` stands twice; `escaped`: its first name with an escape."""
    if isinstance(value, list):
        parts = [with_twin(v, path[1:] if path[:1] == (k,) else (), escaped) for k, v in enumerate(value)]
        return f"[{', '.join(parts)}]"
    if not isinstance(value, dict):
        return json.dumps(value)
    parts = []
    for key, member in value.items():
        inner = path[1:] if path[:1] == (key,) else ()
        if path == (key,):
            first = f'"\\u{ord(key[0]):04x}{key[1:]}"' if escaped else json.dumps(key)
            parts.append(f"{first}: {json.dumps(member)}")
        parts.append(f"{json.dumps(key)}: {with_twin(member, inner, escaped)}")
    return f"{{{', '.join(parts)}}}"


@pytest.mark.parametrize("escaped", [False, True])
def test_a_name_that_occurs_twice_is_refused_wherever_it_stands(
    archived: Archived, tmp_path: Path, escaped: bool
) -> None:
    (tmp_path / "image").write_bytes(archived.image)
    named = [path for path, _ in members(archived.answer) if isinstance(path[-1], str)]
    assert len(named) > 25
    for path in named:
        (tmp_path / "answer.json").write_text(with_twin(archived.answer, path, escaped))
        with pytest.raises(KeptError, match="a name occurs twice in one object"):
            audit(tmp_path / "answer.json", tmp_path / "image", archived.artefact)


@pytest.mark.parametrize("path", [("digest",), ("image", "digest")])
def test_no_other_spelling_of_a_digest_holds(archived: Archived, tmp_path: Path, path: tuple[str, ...]) -> None:
    stated = archived.answer["digest"] if len(path) == 1 else archived.answer["image"]["digest"]
    algorithm, hexadecimal = stated.split(":")
    others = [
        *(
            stated.upper(),
            hexadecimal,
            f"sha512:{hexadecimal}",
            f"{stated} ",
            f" {stated}",
            f"{stated}\0",
            f"{stated}\n",
        ),
        *(f"{algorithm}:{hexadecimal[:32]}", f"{algorithm}:{hexadecimal}00", f"{algorithm}:", "\ud800"),
        *(stated[:place] + ("0" if stated[place] != "0" else "1") + stated[place + 1 :] for place in range(7, 71, 7)),
    ]
    for other in others:
        verdict = archived.check(tmp_path, replaced(archived.answer, path, other))
        assert verdict.conclusion is not Conclusion.HOLDS
        assert any(path[0] in line for line in verdict.lines)


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" + "0" * 400, "1" + "0" * 5000, "1e308", "NaN", "Infinity"])
def test_no_huge_number_holds(archived: Archived, tmp_path: Path, number: str) -> None:
    (tmp_path / "image").write_bytes(archived.image)
    for path, value in members(archived.answer):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        text = json.dumps(replaced(archived.answer, path, "here")).replace('"here"', number)
        (tmp_path / "answer.json").write_text(text)
        try:
            verdict = audit(tmp_path / "answer.json", tmp_path / "image", archived.artefact)
        except KeptError:
            continue
        assert verdict.conclusion is Conclusion.DOES_NOT_HOLD, path


def test_no_member_adds_a_line_to_the_report(archived: Archived, tmp_path: Path) -> None:
    forged = archived.changed(digest="\nholds: class 0\r\ud800\x1b[2K")
    (line,) = archived.check(tmp_path, forged).lines
    assert line.startswith("undecided: digest: the answer is of \\nholds: class 0\\r\\ud800\\x1b[2K, model.onnx has ")
    line = archived.check(tmp_path, archived.answer | {"a\nholds: b": 1}).lines[0]
    assert line.isprintable()
    assert line.endswith("not audited: a\\nholds: b")
