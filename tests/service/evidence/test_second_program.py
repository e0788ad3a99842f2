"""The second program accepts a folder as it was written, and refuses whatever was changed in it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest

from service.certificate.rules.table import RULES
from service.evidence import check
from service.evidence.folder import sums, write_evidence

CHECK = Path(check.__file__)


@dataclass
class Folder:
    """Files of a folder, and its evidence to be changed."""

    files: dict[str, bytes]
    evidence: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.evidence = json.loads(self.files["evidence.json"])

    def sign(self, path: Path) -> None:
        """Write the folder with digests of the changed files: what remains to be noticed is what is stated."""
        before = hashlib.sha256(self.files["evidence.json"]).hexdigest()
        self.files["evidence.json"] = f"{json.dumps(self.evidence, indent=1)}\n".encode()
        after = hashlib.sha256(self.files["evidence.json"]).hexdigest()
        self.files["index.html"] = self.files["index.html"].replace(before.encode(), after.encode())
        for name, content in {**self.files, "SHA256SUMS": sums(self.files)}.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)

    def replace(self, name: str, content: bytes) -> None:
        """Replace a file, with its digest wherever it is stated."""
        old, new = (f"sha256:{hashlib.sha256(one).hexdigest()}".encode() for one in (self.files[name], content))
        self.files[name] = content
        text = json.dumps(self.evidence).replace(old.decode(), new.decode())
        self.evidence = json.loads(text)
        if name == "model.onnx":
            self.replace("card.json", self.files["card.json"].replace(old, new))


def read(path: Path) -> Folder:
    names = (one for one in path.rglob("*") if one.is_file() and one.name != "SHA256SUMS")
    return Folder({str(one.relative_to(path)): one.read_bytes() for one in names})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("evidence")
    builders.write(base / "small", builders.random_groupsort(5), "small")
    verdict = write_evidence(base / "small", base / "folder")
    assert verdict.accepted, verdict.line
    return base / "folder"


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def weight_place(folder: Folder) -> int:
    """Position of the second lowest byte of a weight of the second layer, which is too small to be a range."""
    dense = [step for step in check.Chain(folder.files["model.onnx"]).steps if step.kind == "dense"]
    return folder.files["model.onnx"].index(np.ascontiguousarray(dense[1].constant.T).tobytes()) + 1


def scaled(path: str, factor: float) -> Callable[[Folder], None]:
    """Multiply a number of the evidence."""

    def change(folder: Folder) -> None:
        *parents, last = [int(one) if one.lstrip("-").isdigit() else one for one in path.split(".")]
        value: Any = folder.evidence
        for parent in parents:
            value = value[parent]
        value[last] *= factor

    return change


def put(path: str, new: Any) -> Callable[[Folder], None]:
    """Replace a member of the evidence."""

    def change(folder: Folder) -> None:
        *parents, last = [int(one) if one.lstrip("-").isdigit() else one for one in path.split(".")]
        value: Any = folder.evidence
        for parent in parents:
            value = value[parent]
        value[last] = new(value[last]) if callable(new) else new

    return change


def swap(path: str, one: int, other: int, member: str | None = None) -> Callable[[Folder], None]:
    """Swap two entries of a list of the evidence, or a member of them."""

    def change(folder: Folder) -> None:
        entries = folder.evidence[path]
        if member is None:
            entries[one], entries[other] = entries[other], entries[one]
        else:
            entries[one][member], entries[other][member] = entries[other][member], entries[one][member]

    return change


def change_forward(folder: Folder) -> None:
    graphs = json.loads(folder.files["graphs.json"])
    old = f"sha256:{hashlib.sha256(check.joined(graphs['forward'], folder.files['model.onnx'])).hexdigest()}"
    place = weight_place(folder)
    content = folder.files["model.onnx"][place - 1 : place + 7].hex()
    for piece in graphs["forward"]:
        piece[0] = piece[0].replace(content, flipped(bytes.fromhex(content), 1).hex())
    new = f"sha256:{hashlib.sha256(check.joined(graphs['forward'], folder.files['model.onnx'])).hexdigest()}"
    assert new != old
    folder.files["graphs.json"] = json.dumps(graphs).encode()
    folder.evidence["identity"]["digests"]["forward"] = new


def change_both(folder: Folder) -> None:
    change_forward(folder)
    folder.replace("model.onnx", flipped(folder.files["model.onnx"], weight_place(folder)))


def change_pixel(folder: Folder) -> None:
    content = folder.files["vectors/000.npy"]
    folder.files["vectors/000.npy"] = content[:-1] + bytes([content[-1] ^ 1])


def change_pixel_and_digest(folder: Folder) -> None:
    change_pixel(folder)
    image = np.frombuffer(folder.files["vectors/000.npy"][-16:], np.uint8)
    folder.evidence["test_vectors"][0]["digest"] = (
        f"sha256:{hashlib.sha256(b'1x4x4' + bytes([10]) + (image / 255.0).tobytes()).hexdigest()}"
    )


def shifted_ends(ends: list[list[str]]) -> list[list[str]]:
    return [[str(Fraction(end) + Fraction(1, 10**35)) for end in pair] for pair in ends]


CHANGES: dict[str, tuple[Callable[[Folder], Any], str]] = {
    "a bit of a weight": (
        lambda f: f.replace("model.onnx", flipped(f.files["model.onnx"], weight_place(f))),
        "computes something else",
    ),
    "a bit of a weight in the graph that runs": (change_forward, "computes something else"),
    "a bit of a weight in both": (change_both, "exact_logits are others"),
    "a smaller norm": (scaled("norms.0.norm_bound", 1 - 1e-9), "norm_bound"),
    "a much smaller norm": (scaled("norms.0.norm_bound", 0.5), "norm_bound"),
    "a smaller norm of the head": (scaled("norms.-1.norm_bound", 1 - 1e-9), "norm_bound"),
    "a larger norm": (scaled("norms.0.norm_bound", 1 + 1e-6), "lipschitz_bound"),
    "a norm of zero": (put("norms.1.norm_bound", 0.0), "out of range"),
    "a negative norm": (scaled("norms.1.norm_bound", -1.0), "out of range"),
    "a norm that is null": (put("norms.1.norm_bound", None), "TypeError"),
    "norms of each other": (swap("norms", 0, 2, "norm_bound"), "lipschitz_bound"),
    "norms in another order": (swap("norms", 0, 1), "not the dense nodes"),
    "a norm left out": (lambda f: f.evidence["norms"].pop(), "not the dense nodes"),
    "a norm too many": (lambda f: f.evidence["norms"].append(f.evidence["norms"][-1]), "not the dense nodes"),
    "a smaller bound of a node": (scaled("derivation.1.lipschitz_bound", 1 - 1e-9), "lipschitz_bound"),
    "a larger bound of a node": (scaled("derivation.1.lipschitz_bound", 1.001), "lipschitz_bound"),
    "a smaller error of a node": (scaled("derivation.3.error", 0.5), "error"),
    "a larger error of a node": (scaled("derivation.3.error", 2.0), "error"),
    "nodes in another order": (swap("derivation", 3, 6), "not the nodes"),
    "a node left out": (lambda f: f.evidence["derivation"].pop(3), "not the nodes"),
    "a node too many": (lambda f: f.evidence["derivation"].append(f.evidence["derivation"][-1]), "not the nodes"),
    "a node of another name": (put("derivation.0.node", "Flatten 'other'"), "not the nodes"),
    "theorems of each other": (swap("derivation", 1, 2, "theorem"), "another theorem"),
    "a theorem of its own": (put("derivation.1.theorem", "It is obvious."), "another theorem"),
    "sources of each other": (swap("derivation", 1, 2, "source"), "another theorem or source"),
    "a smaller logit error": (scaled("bounds.logit_error", 0.9), "logit_error"),
    "a slightly smaller logit error": (scaled("bounds.logit_error", 0.99), "logit_error"),
    "a larger logit error": (scaled("bounds.logit_error", 1.1), "logit_error"),
    "another criterion": (scaled("replication.bound", 0.5), "two values"),
    "another bound of the logits": (scaled("bounds.lipschitz_bound", 0.9), "two values"),
    "a smaller K": (
        lambda f: [scaled(f"bounds.margin_bounds.{p}", 1 - 1e-9)(f) for p in ("0.1", "1.0")],
        "margin_bounds",
    ),
    "a larger K": (lambda f: [scaled(f"bounds.margin_bounds.{p}", 1.01)(f) for p in ("0.1", "1.0")], "margin_bounds"),
    "K of one order": (scaled("bounds.margin_bounds.2.1", 1 - 1e-3), "not symmetric"),
    "K of a class with itself": (put("bounds.margin_bounds.1.1", 1.0), "not symmetric"),
    "K without a row": (lambda f: f.evidence["bounds"]["margin_bounds"].pop(), "not K x K"),
    "exact logits beside": (put("test_vectors.0.exact_logits", shifted_ends), "exact_logits are others"),
    "exact logits turned round": (
        put("test_vectors.0.exact_logits", lambda ends: [pair[::-1] for pair in ends]),
        "exact_logits are others",
    ),
    "exact logits of another image": (swap("test_vectors", 0, 1, "exact_logits"), "exact_logits are others"),
    "one exact logit less": (lambda f: f.evidence["test_vectors"][0]["exact_logits"].pop(), "zip"),
    "a smaller width": (scaled("test_vectors.1.width", 0.5), "another width"),
    "a computed logit that is off": (scaled("test_vectors.0.runtime_logits.0", 1 + 1e-9), "the runtime is off"),
    "another difference": (scaled("test_vectors.2.largest_difference", 0.5), "largest_difference"),
    "another class": (put("test_vectors.0.class_id", lambda k: (k + 1) % 3), "another class"),
    "another label": (put("test_vectors.0.label", "class 7"), "another class"),
    "another runner-up": (put("test_vectors.1.runner_up", lambda k: (k + 1) % 3), "runner-up"),
    "a larger radius": (scaled("test_vectors.0.radius", 1 + 1e-14), "radius"),
    "a smaller radius": (scaled("test_vectors.0.radius", 1 - 1e-9), "radius"),
    "another pixel": (change_pixel, "other images"),
    "another pixel with its digest": (change_pixel_and_digest, "exact_logits are others"),
    "images of each other": (swap("test_vectors", 0, 1, "file"), "other images"),
    "another name": (put("identity.name", "large"), "not that of the card"),
    "labels in another order": (put("identity.labels", lambda labels: labels[::-1]), "not that of the card"),
    "another shape": (put("identity.input_shape", [1, 2, 8]), "not that of the card"),
    "another number of logits": (put("identity.n_outputs", 4), "not that of the card"),
    **{
        f"another digest of {name}": (put(f"identity.digests.{name}", f"sha256:{'0' * 64}"), "digests")
        for name in ("forward", "gradient")
    },
    "another digest of the model": (
        lambda f: f.evidence["identity"]["digests"].update({"model.onnx": f"sha256:{'0' * 64}"}),
        "digests",
    ),
    "another card": (lambda f: f.files.update({"card.json": f.files["card.json"] + b"\n"}), "digests"),
    "a member left out": (lambda f: f.evidence.pop("not_covered"), "not of format 1"),
    "members in another order": (lambda f: f.evidence.update(made=f.evidence.pop("made")), "not of format 1"),
    "a member too many": (lambda f: f.evidence.update(more=1), "not of format 1"),
    "another format": (put("format", 2), "not of format 1"),
    "an assumption left out": (lambda f: f.evidence["assumptions"].pop(2), "not 1 to 6"),
    "a page of other evidence": (lambda f: f.files.update({"index.html": b"<!doctype html>"}), "of another evidence"),
    "no schema": (lambda f: f.files.pop("evidence.schema.json"), "not those of SHA256SUMS"),
    "no graphs": (lambda f: f.files.pop("graphs.json"), "graphs.json"),
    "no image": (lambda f: f.files.pop("vectors/001.npy"), "vectors/001.npy"),
}


def test_the_folder_as_it_was_written_is_accepted_again_when_signed_again(written: Path, tmp_path: Path) -> None:
    read(written).sign(tmp_path)
    assert "3 norms, 4 test vectors" in check.check(tmp_path)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_for_its_reason(name: str, written: Path, tmp_path: Path) -> None:
    change, reason = CHANGES[name]
    folder = read(written)
    change(folder)
    folder.sign(tmp_path)
    with pytest.raises(Exception, match=r".") as refused:
        check.check(tmp_path)
    assert reason in f"{refused.type.__name__} {refused.value}"


def test_a_change_without_a_signature_is_refused_in_every_file(written: Path, tmp_path: Path) -> None:
    for name in (*read(written).files, "SHA256SUMS"):
        shutil.copytree(written, tmp_path, dirs_exist_ok=True)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(flipped(content, len(content) // 2))
        with pytest.raises((ValueError, KeyError)):
            check.check(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises((ValueError, OSError, KeyError)):
            check.check(tmp_path)


def test_a_name_that_occurs_twice_is_refused(written: Path, tmp_path: Path) -> None:
    folder = read(written)
    content = folder.files["evidence.json"].replace(b'"format": 1,', b'"format": 1,\n "format": 1,')
    old, new = (hashlib.sha256(one).hexdigest().encode() for one in (folder.files["evidence.json"], content))
    folder.files |= {"evidence.json": content, "index.html": folder.files["index.html"].replace(old, new)}
    for name, one in {**folder.files, "SHA256SUMS": sums(folder.files)}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(one)
    with pytest.raises(ValueError, match="not of format 1"):
        check.check(tmp_path)


def test_the_program_is_short_and_its_exit_status_is_the_verdict(written: Path, tmp_path: Path) -> None:
    source = (written / "check.py").read_bytes()
    assert source == CHECK.read_bytes()
    assert source.count(b"\n") < 400
    assert b"service" not in source.split(b"import base64")[0].split(b"import hashlib")[-1]
    shutil.copytree(written, tmp_path / "copy")
    command = [sys.executable, "-I", str(tmp_path / "copy" / "check.py")]
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0
    (tmp_path / "copy" / "model.onnx").write_bytes(b"")
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout[:8], refused.stderr) == (1, "refused:", "")


def test_theorems_of_the_program_are_those_of_the_rules() -> None:
    for theorem, operators in check.THEOREMS.items():
        for operator in set(operators.split()) - {"Flatten", "Max", "Min"}:
            assert RULES[operator].theorem == theorem


@pytest.mark.parametrize("seed", range(4))
def test_norms_that_are_proved_are_never_below_the_exact_ones(seed: int) -> None:
    random = np.random.default_rng(seed)
    weight = random.normal(size=random.integers(1, 12, 2))
    exact = float(np.linalg.norm(weight, 2))
    check.prove_norm(weight, Fraction(exact) * (1 + Fraction(1, 10**9)), "node")
    for share in (1e-12, 1e-9, 1e-3, 0.5):
        with pytest.raises(ValueError, match="not proved"):
            check.prove_norm(weight, Fraction(exact) * (1 - Fraction(share)), "node")
    assert check.absolute_norm(weight) >= Fraction(float(np.linalg.norm(np.abs(weight), 2)) * (1 - 1e-12))
