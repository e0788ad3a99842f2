"""`index.html` of an evidence folder: one page without scripts or other files, for a browser and for paper."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from html import escape

from service.evidence.document import claims, document, facts, image, items, table
from service.evidence.record import Evidence, TestVector
from service.evidence.vectors import Picture

_FULL_MATRIX = 12
"""Classes up to which all `K_ij` are printed; beyond, the extremes."""
_STYLE = """
.vectors { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem }
figure img { width: 84px; height: 84px; image-rendering: pixelated; border: 1px solid var(--line); float: right }
"""


def render(evidence: Evidence, evidence_sha256: str, pictures: Sequence[Picture]) -> str:
    """Return the page.

    Args:
        evidence: the record.
        evidence_sha256: of `evidence.json`, which `check.py` looks for in the page.
        pictures: images of the test vectors, in their order.
    """
    identity, bounds = evidence.identity, evidence.bounds
    pairs = [k for i, row in enumerate(bounds.margin_bounds) for k in row[:i]]
    boxes = [
        (_upper(max(pairs), 9), "largest K_ij: L2 Lipschitz bound of a difference of logits"),
        (_upper(bounds.logit_error, 4), "E: bound of |computed − exact logit|, any order of summation"),
        (f"{len(evidence.norms)}", "norms with a certificate that check.py proves again"),
        (f"{len(evidence.test_vectors)}", "test vectors with exact logits"),
    ]
    sections = [
        ("Identity", _identity(evidence)),
        ("What is proved", _promise(evidence, pairs)),
        ("Replication", _replication(evidence)),
        ("Derivation, node by node", _derivation(evidence)),
        ("Norm certificates", _norms(evidence)),
        ("Test vectors", _vectors(evidence, pictures)),
        ("Operating domain", _domain(evidence)),
        ("Assumptions", _assumptions(evidence)),
        ("Not covered", f"<ul>{items(evidence.not_covered)}</ul>"),
        ("How to check this folder", _checking(evidence_sha256)),
    ]
    body = "".join(
        f"<section><h2>{number}. {title}</h2>{text}</section>\n" for number, (title, text) in enumerate(sections, 1)
    )
    return document(
        f"Evidence: {identity.name}",
        f"<header><h1>Evidence for the classifier {escape(identity.name)}</h1>"
        f'<p class="digest dim">{identity.digests["model.onnx"]}</p>'
        f'<p class="dim">Made {escape(evidence.made.date)} by lipcert {escape(evidence.made.versions["lipcert"])}</p>'
        f"</header>{claims(boxes)}\n{body}",
        _STYLE,
    )


def _upper(bound: float, digits: int) -> str:
    """Return an upper bound with few digits, rounded upwards."""
    return str(Context(prec=digits, rounding=ROUND_CEILING).create_decimal(Decimal(bound))).lower()


def _lower(bound: float, digits: int) -> str:
    return str(Context(prec=digits, rounding=ROUND_FLOOR).create_decimal(Decimal(bound))).lower()


def _identity(evidence: Evidence) -> str:
    identity, made = evidence.identity, evidence.made
    rows = [
        ("Model", identity.name),
        ("Labels", ", ".join(identity.labels[:40]) + (" …" if len(identity.labels) > 40 else "")),
        ("Image", f"{' x '.join(map(str, identity.input_shape))} (channels x height x width), pixels in [0, 1]"),
        ("Arithmetic", identity.precision),
        *((f"sha256 of {name}", digest.removeprefix("sha256:")) for name, digest in identity.digests.items()),
        ("Made", f"{made.date}, {made.processor}, {made.system}, provider {made.provider}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in made.versions.items())),
    ]
    return facts(rows, "digest") + (
        '<p class="dim">forward and gradient are the graphs that are written from the network of model.onnx and run '
        "with every optimisation of the runtime off; graphs.json holds them as ranges of model.onnx and the bytes "
        "between.</p>"
    )


def _promise(evidence: Evidence, pairs: Sequence[float]) -> str:
    bounds, labels = evidence.bounds, evidence.identity.labels
    text = (
        "<p>If the service computes logits f with class i at an image x of [0, 1]<sup>d</sup> and states the radius</p>"
        "<p><code>r = min over j ≠ i of (f_i − f_j − 4 E) / K_ij</code> (rounded down, at least 0),</p>"
        "<p>then for every image x' of the box with ‖x' − x‖<sub>2</sub> &lt; r the exact network gives class i, and "
        "so does this service: in every batch, with any number of threads, in any order of summation.</p>"
        f"<p>E = <code>{bounds.logit_error!r}</code>; Lipschitz bound of all logits together: "
        f"<code>{bounds.lipschitz_bound!r}</code>.</p>"
    )
    if len(labels) > _FULL_MATRIX:
        return text + (
            f"<p>K_ij of {len(pairs)} pairs: from <code>{min(pairs)!r}</code> to <code>{max(pairs)!r}</code>; all of "
            "them are in evidence.json.</p>"
        )
    rows = [
        [labels[i], *(_upper(k, 7) if i != j else "" for j, k in enumerate(row))]
        for i, row in enumerate(bounds.margin_bounds)
    ]
    return (
        text
        + "<p>K_ij, rounded upwards; all digits are in evidence.json:</p>"
        + table(["", *labels], rows, range(1, len(labels) + 1), narrow=True)
    )


def _replication(evidence: Evidence) -> str:
    return (
        f"<p>{escape(evidence.replication.criterion)}</p><p><code>bound = {evidence.replication.bound!r}</code></p>"
        '<p class="dim">Proved by a forward error analysis that holds for any order of summation, not measured. The '
        "test vectors show differences on the machine that made this folder.</p>"
    )


def _derivation(evidence: Evidence) -> str:
    rows = [
        [str(n), one.node, _upper(one.lipschitz_bound, 10), _upper(one.error, 4), one.theorem, one.source]
        for n, one in enumerate(evidence.derivation, 1)
    ]
    head = ["", "node", "Lipschitz bound", "error", "theorem", "source"]
    return (
        "<p>For every image of the box. Lipschitz bound: L2, from the image to the output of the node. Error: L2 norm "
        "of computed minus exact output; of the last node, of all logits together. Both rounded upwards.</p>"
        + table(head, rows, (0, 2, 3))
    )


def _norms(evidence: Evidence) -> str:
    rows = [[one.node, f"{one.norm_bound!r}"] for one in evidence.norms]
    return (
        "<p>Claim for each weight W: s I − W<sup>T</sup>W is positive semidefinite for s = norm_bound². <code>check.py"
        "</code> proves it with a Cholesky factorisation and Rump's bound of its rounding.</p>"
        + table(["node", "norm_bound"], rows, (1,), narrow=True)
    )


def _vectors(evidence: Evidence, pictures: Sequence[Picture]) -> str:
    figures = "".join(
        _figure(vector, picture, evidence.identity.labels)
        for vector, picture in zip(evidence.test_vectors, pictures, strict=True)
    )
    widest = max((vector.width for vector in evidence.test_vectors), default=0.0)
    return (
        f"<p>Exact logits are intervals of rational numbers by ball arithmetic, at most {widest:.1e} wide; "
        "<code>check.py</code> computes them again in integers. Computed logits are those of ONNX Runtime on the "
        "machine that made this folder. The arrays in "
        f'<code>vectors/</code> can be sent to the service as they are.</p><div class="vectors">{figures}</div>'
    )


def _figure(vector: TestVector, picture: Picture, labels: Sequence[str]) -> str:
    order = sorted(range(len(labels)), key=lambda k: -vector.runtime_logits[k])[:5]
    rows = [
        [labels[k], f"{float(Fraction(vector.exact_logits[k][0])):.12f}", f"{vector.runtime_logits[k]:.12f}"]
        for k in order
    ]
    more = f'<p class="dim">{len(labels) - 5} further classes in evidence.json.</p>' if len(labels) > 5 else ""
    return (
        f"<figure>{image(picture.pixels_CHW)}<figcaption>{escape(vector.name)}</figcaption>"
        f"<p>class <b>{escape(vector.label)}</b>, radius <b>{_lower(vector.radius, 6)}</b><br>next: "
        f"{escape(labels[vector.runner_up])}<br>largest difference {_upper(vector.largest_difference, 3)}</p>"
        + table(["class", "exact", "computed"], rows, (1, 2))
        + f"{more}</figure>"
    )


def _domain(evidence: Evidence) -> str:
    domain = evidence.operating_domain
    rows = [
        [
            "accuracy"
            if one.epsilon is None
            else f"certified at {one.epsilon:.6g}{', with reference images' if one.proof == 'best' else ''}",
            f"{one.successes} of {one.n}",
            f"{one.share:.4f}",
            f"{_lower(one.low, 4)} to {_upper(one.high, 4)}",
            one.statement,
        ]
        for one in domain.statements
    ]
    missing = f"<ul>{items(domain.without_interval)}</ul>" if domain.without_interval else ""
    shares = table(["", "count", "share", "95 % interval", "statement"], rows, (1, 2, 3)) if rows else ""
    nothing = (
        "<p>The card states no accuracy: nothing is claimed about any population of images.</p>" if not rows else ""
    )
    return (
        f"<p>Data: {escape(domain.data)}. The counts are those of card.json, measured by the trainer; they hold for "
        "images drawn like the test set and for no others. Each interval has its confidence for itself.</p>"
        f"{shares}{nothing}{missing}"
    )


def _assumptions(evidence: Evidence) -> str:
    rows = [
        [str(one.number), f"{one.title}. {one.text}", "\n".join(one.tests) or "no test can notice it"]
        for one in evidence.assumptions
    ]
    return "<p>Numbers are those of docs/soundness.md.</p>" + table(
        ["", "assumption", "a test that notices its loss"], rows, (0,)
    )


def _checking(evidence_sha256: str) -> str:
    return (
        "<p><code>python check.py</code> in this folder needs Python 3.11 and numpy. It reads model.onnx with a parser "
        "of its own, proves every norm, composes the bounds, computes exact logits, and prints <code>accepted</code> "
        "(exit status 0) or <code>refused</code> with the reason (1). It shares no code with the program that made the "
        "folder.</p><p><code>sha256sum --check SHA256SUMS</code> compares the files. Sign SHA256SUMS to bind the "
        f'folder to a name and a date.</p><p class="digest dim">evidence.json: sha256 {evidence_sha256}</p>'
    )
