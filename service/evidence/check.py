"""Check an evidence folder a second time: `python check.py [FOLDER]`, by default the folder of this file.

Needs numpy and the standard library, and shares no code with lipcert. Reads `model.onnx` with a parser of its own,
proves every norm, composes the bounds, computes the logits of the test vectors in exact integers, and compares. Prints
`accepted: ...` (exit status 0) or `refused: REASON` (1). The theorems are those of docs/soundness.md.

A bound is a fraction, rounded upwards to a multiple of 2**-200; an exact tensor an array of Python integers that stand
for `integer / (255 * 2**scale)`. Assumed: numpy's float64 rounds to nearest, and its matrix products and Cholesky
factorisations are sums of products in any order (not Strassen's).
"""

import hashlib
import json
import math
import sys
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NAMES = "format identity made derivation norms bounds replication test_vectors operating_domain assumptions not_covered"
THEOREMS = {
    "A rearrangement that keeps the batch: every element once, an isometry.": "Flatten Reshape Transpose SpaceToDepth",
    "Disjoint parts of one tensor: together they cost as much as the tensor.": "Split",
    "Stacked branches: parts of one tensor count together, different tensors add in squares.": "Concat",
    "Elements picked by constant positions: an element used m times counts sqrt(m).": "Gather",
    "Product with a constant: a diagonal map, whose norm is the largest absolute factor.": "Mul",
    "Sum: a constant changes no distance; the bounds of two branches add (triangle inequality).": "Add",
    "Matrix product with a constant: block-diagonal in the other axes, so its norm is ||W||_2.": "MatMul",
    "Dense layer: ||W x - W x'|| <= ||W||_2 ||x - x'||, with a proved bound of the spectral norm.": "Gemm",
    "Sorting a pair never expands (rearrangement inequality); max and min are its two halves. Exact.": "Max Min",
    "Largest (smallest) of disjoint groups: 1-Lipschitz, and exact; of pairs: half of the sorted pair.": "ReduceMax",
}
# Unit roundoff and smallest normal number of float64; more than the underflow of any sum in this file.
U, TINY, UNDERFLOW = Fraction(1, 2**53), Fraction(1, 2**1022), Fraction(1, 2**300)


def require(condition: object, reason: str) -> None:
    """Raise `ValueError` with the reason unless the condition is true."""
    if not condition:
        raise ValueError(reason)


def up(value: Fraction) -> Fraction:
    return Fraction(-((-value.numerator << 200) // value.denominator), 2**200)


def root(value: Fraction) -> Fraction:
    return value if value in (0, 1) else Fraction(math.isqrt(math.ceil(value * 2**400)) + 1, 2**200)


def gamma(n: int) -> Fraction:
    """Relative error of n roundings in any order: `n u / (1 - n u)` (Higham 2002, section 3.1)."""
    return n * U / (1 - n * U)


def squares(values: np.ndarray) -> Fraction:
    """Upper bound of the sum of squares of floats: each square is rounded once, and `fsum` once."""
    return Fraction(math.fsum(np.square(values).ravel())) * (1 + 4 * U) + UNDERFLOW


def _prove_norm(weight: np.ndarray, bound: Fraction, label: str) -> None:
    """Prove `||W||_2 <= bound`: `s I - W^T W` is positive semidefinite for `s = bound^2`.

    Let G be the computed Gram matrix of the smaller side n; its rounding is at most `gamma_m ||W||_F^2`. If a Cholesky
    factorisation in floating point of `A = t I - G` runs to its end, A plus a perturbation of norm at most
    `gamma_{n+1} / (1 - gamma_{n+1}) trace(A)` is positive semidefinite (Rump, BIT 46, 2006). So t is s less all errors.
    """
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    (m, n), peak = tall.shape, float(np.abs(tall).max())
    require(bound > 0 and 2.0**-100 < peak < 2.0**100, f"{label}: a claim or a weight out of range")
    s, frobenius, gram = bound * bound, squares(tall), tall.T @ tall
    diagonal = np.diagonal(gram).copy()
    trace = max(n * s - Fraction(math.fsum(diagonal)), Fraction(0)) + 4 * n * U * (s + frobenius)
    errors = gamma(m) * frobenius + 2 * U * (s + frobenius) + gamma(n + 1) / (1 - gamma(n + 1)) * trace + UNDERFLOW
    np.fill_diagonal(difference := -gram, math.nextafter(float(s - errors), -math.inf) - diagonal)
    try:
        require(np.isfinite(np.linalg.cholesky(difference)).all(), "not finite")
    except ValueError:
        raise ValueError(f"{label}: norm_bound {float(bound)!r} is not proved") from None


def absolute_norm(weight: np.ndarray) -> Fraction:
    """Bound of `|| |W| ||_2`: Frobenius' norm, or the root of largest row sum times largest column sum (Schur)."""
    rows, columns = (np.abs(weight).sum(axis).max() for axis in (1, 0))
    schur = Fraction(rows) * Fraction(columns) * (1 + gamma(weight.shape[0])) * (1 + gamma(weight.shape[1]))
    return root(min(schur + UNDERFLOW, squares(weight)))


def message(data: bytes) -> dict[int, list[Any]]:
    """Fields of a protobuf message by number: signed integers, everything else as bytes."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
            if data[at - 1] < 128:
                return value, at

    found: dict[int, list[Any]] = defaultdict(list)
    at = 0
    while at < len(data):
        tag, at = varint(at)
        value, at = varint(at) if tag & 7 in (0, 2) else ({1: 8, 5: 4}[tag & 7], at)
        if tag & 7:
            value, at = data[at : at + value], at + value
            require(at <= len(data), "model.onnx: it ends early")
        found[tag >> 3].append(value - 2**64 if not tag & 7 and value >= 2**63 else value)
    return found


def tensor(data: bytes) -> tuple[str, np.ndarray]:
    """Name and array of a TensorProto of float32, int64 or float64 in raw bytes."""
    field = message(data)
    array = np.frombuffer(field[9][0], {1: "<f4", 7: "<i8", 11: "<f8"}[field[2][0]]).reshape(field[1])
    require(np.isfinite(array).all() and not field[13], "model.onnx: a weight is not finite, or not in the file")
    return field[8][0].decode(), array


class Step(NamedTuple):
    """A node: it makes a flat vector of `h[reads]`, h the one before it; a `move` computes nothing."""

    label: str
    kind: str
    reads: np.ndarray = np.zeros(0, int)  # dense: blocks x n; sort: 2 x pairs; largest: groups x n
    constant: np.ndarray = np.zeros(0)  # dense: W, m x n
    bias: np.ndarray = np.zeros(0)


class Chain:
    """A model as steps, each of the vector before it alone; every element is read at most once."""

    def __init__(self, model: bytes) -> None:
        graph = message(message(model)[7][0])
        self.constants = dict(map(tensor, graph[5]))
        inputs = {one[1][0].decode(): one[2][0] for one in map(message, graph[11])}
        ((image, kind),) = [(name, kind) for name, kind in inputs.items() if name not in self.constants]
        declared = message(message(kind)[1][0])
        require(declared[1] == [11], "model.onnx: a graph that does not compute in float64")
        self.shape = tuple(message(one)[1][0] for one in message(declared[2][0])[1][1:])
        self.steps, self.layer, self.digest = list[Step](), 0, hashlib.sha256(repr(self.shape).encode())
        self.values = {image: (0, np.arange(math.prod(self.shape)).reshape(self.shape))}
        self.halves: dict[tuple[int, frozenset[bytes]], dict[str, np.ndarray]] = {}
        for node in map(message, graph[1]):
            self._visit(node)
        ((layer, logits),) = [self.values[message(one)[1][0].decode()] for one in graph[12]]
        self.n_outputs = len(logits)
        require(layer == self.layer > 0 and np.array_equal(logits, np.arange(len(logits))), "logits: not the last step")

    def _visit(self, node: dict[int, list[Any]]) -> None:
        names, operator = [one.decode() for one in node[1]], node[4][0].decode()
        given = {one[1][0].decode(): one for one in map(message, node[5])}
        numbers = {name: one[3] or one[8] for name, one in given.items()}
        label = f"{operator} {(b''.join(node[3]) or node[2][0]).decode()!r}"
        if all(name in self.constants for name in names):
            require(operator == "Cast" and numbers["to"] == [11], f"{label}: a constant that is computed")
            self.constants[node[2][0].decode()] = self.constants[names[0]].astype(float)
            return
        if operator == "Identity":
            self.values[node[2][0].decode()] = self.values[names[0]]
            return
        known = operator in " ".join(THEOREMS.values()).split() and numbers.get("transA", [0]) == [0] and not node[7]
        ones = all(one[2] == [np.float32(1).tobytes()] for one in given.values() if one[2])
        require(known and ones, f"{label}: an operator, or a form of it, that this program does not read")
        views = [self.values[name] for name in names if name not in self.constants]
        arrays = [self.constants[name] for name in names if name in self.constants]
        if operator in ("Max", "Min"):
            made = [self._half(label, views, arrays)[operator]]
        else:
            require(all(layer == self.layer for layer, _ in views), f"{label}: it reads a tensor before the last one")
            require(not arrays if operator == "Concat" else len(views) == 1, f"{label}: other operands")
            move = self._move(operator, [index for _, index in views], arrays, numbers)
            self.steps += [Step(label, "move")] if move else []
            made = move or [self._computed(label, views[0][1], arrays, numbers, names[0] in self.constants)]
        for name, index in zip(node[2], made, strict=True):
            self.values[name.decode()] = self.layer, index

    def _add(self, label: str, kind: str, index: np.ndarray, *constants: np.ndarray) -> None:
        require(np.unique(index).size == index.size, f"{label}: it reads an element twice")
        self.steps.append(Step(label, kind, index, *constants))
        self.layer += 1
        for array in (index, *constants):
            self.digest.update(f"{kind} {array.shape} ".encode() + array.tobytes())

    def _half(self, label: str, views: list[Any], arrays: list[Any]) -> dict[str, np.ndarray]:
        (layer, one), (same, other) = views
        key = layer, frozenset((one.tobytes(), other.tobytes()))
        pair = not arrays and same == layer == self.layer - (key in self.halves) and one.shape == other.shape
        require(pair, f"{label}: not a pair of the last tensor")
        if key in self.halves:
            self.steps.append(Step(label, "move"))
        else:
            self._add(label, "sort", np.stack([one.ravel(), other.ravel()]))
        half = np.arange(one.size).reshape(one.shape)
        return self.halves.setdefault(key, {"Max": half, "Min": half + one.size})

    def _move(self, operator: str, of: list[Any], arrays: list[Any], numbers: dict[str, Any]) -> list[Any] | None:
        index, axis, perm = of[0], numbers.get("axis", [operator == "Flatten"])[0] - 1, numbers.get("perm", [0])
        along = axis < 0 if operator in ("Split", "Gather", "Concat") else perm[0] or (operator == "Flatten" and axis)
        require(not along, f"{operator}: along the batch, or by axes that are not read")
        (b,) = numbers.get("blocksize", [1])
        moves = {
            "Flatten": lambda: [index.reshape(-1)],
            "Reshape": lambda: [index.reshape(arrays[0][1:].tolist())],
            "Transpose": lambda: [index.transpose([one - 1 for one in perm[1:]])],
            "Split": lambda: np.split(index, np.cumsum(arrays[0])[:-1].tolist(), axis),
            "Gather": lambda: [np.take(index, arrays[0], axis)],
            "Concat": lambda: [np.concatenate(of, axis)],
            "SpaceToDepth": lambda: [np.concatenate([index[:, i::b, j::b] for i, j in np.ndindex(b, b)])],
        }
        return moves[operator]() if operator in moves else None

    def _computed(self, label: str, index: Any, arrays: list[Any], numbers: dict[str, Any], left: bool) -> np.ndarray:
        operator, lead = label.split()[0], index.shape[: -arrays[0].size]
        if operator == "ReduceMax":
            require([*arrays[0]] == [*range(len(lead) + 1, index.ndim + 1)] != [], f"{label}: not the last axes")
            self._add(label, "largest", index.reshape(math.prod(lead), -1))
            return np.arange(math.prod(lead)).reshape(lead + (1,) * arrays[0].size * numbers.get("keepdims", [1])[0])
        if operator in ("Mul", "Add"):
            constant = np.broadcast_to(arrays[0], index.shape).astype(float)
            self._add(label, "scale" if operator == "Mul" else "shift", index.ravel(), constant.ravel())
            return np.arange(index.size).reshape(index.shape)
        weight = np.asarray(arrays[0] if left or numbers.get("transB", [0]) == [1] else arrays[0].T, float)
        require(weight.ndim == 2 and len(arrays) < 3, f"{label}: not one matrix")
        lines = np.swapaxes(index, -1, -2) if left else index
        bias = np.broadcast_to(np.asarray(arrays[1] if arrays[1:] else 0.0, float), (len(weight),))
        self._add(label, "dense", lines.reshape(-1, weight.shape[1]), weight, bias)
        made = np.arange(lines.size // weight.shape[1] * len(weight)).reshape(*lines.shape[:-1], len(weight))
        return np.swapaxes(made, -1, -2) if left else made


class Walk:
    """Bounds for every image of the box, and exact tensors of some images, the first of them the centre of the box."""

    def __init__(self, chain: Chain, images: np.ndarray) -> None:
        self.bits = 53 - min(int(np.frexp(one)[1].min()) for step in chain.steps for one in step[3:] if one.size)
        self.x, self.scale, self.lipschitz, self.terms = images << self.bits, self.bits + 1, Fraction(1), 0
        self.half_diagonal = root(Fraction(len(images), 4))
        self.error = self.error_max = up(U * root(Fraction(len(images))))
        self.head: tuple[np.ndarray, Fraction] | None = None

    def integers(self, values: np.ndarray) -> np.ndarray:
        """`values * 2**bits`, exactly."""
        mantissas, exponents = np.frexp(values)
        return np.ldexp(mantissas, 53).astype(int).astype(object) << (exponents - 53 + self.bits).astype(object)

    def norm(self) -> Fraction:
        """Bound of `||computed||` for every image: at the centre, the way from there, and the error."""
        at_centre = root(Fraction(sum(int(v) ** 2 for v in self.x[:, 0]), (255 << self.scale) ** 2))
        return at_centre + self.lipschitz * self.half_diagonal + self.error

    def take(self, step: Step, norms: Any) -> None:
        """Make one step; the claim about a dense one is the next of `norms`."""
        x, constant, head, terms, self.terms = self.x[step.reads], step.constant, None, self.terms, 0
        if step.kind == "sort":
            self.x = np.concatenate([np.maximum(*x), np.minimum(*x)])
        elif step.kind == "largest":
            self.x = np.maximum.reduce(x, axis=1)
        elif step.kind == "scale":
            factor, self.scale = Fraction(np.abs(constant).max()), self.scale + self.bits
            self.lipschitz, self.error = self.lipschitz * factor, self.error * factor
            self.x = x * self.integers(constant)[:, None]
            self._rounded(2 * U * self.norm(), None, TINY)
        elif step.kind == "shift":
            self.x, head = x + self._addend(constant), self.head
            own, joint = 2 * U * self.norm(), gamma(terms + 1) if terms else Fraction(0)
            largest = self.error_max + own + joint * Fraction(np.abs(constant).max())
            self._rounded(own + joint * root(squares(constant)), largest, TINY)
        elif step.kind == "dense":
            _prove_norm(constant, norm := next(norms), step.label)
            (blocks, n), before, row = step.reads.shape, self.norm(), root(max(map(squares, constant)))
            made = np.dot(self.integers(constant), x.transpose(1, 0, 2).reshape(n, -1))
            made = made.reshape(len(constant), blocks, -1).transpose(1, 0, 2).reshape(len(constant) * blocks, -1)
            self.scale += self.bits
            self.x = made + self._addend(np.tile(step.bias, blocks))
            size, peak = root(blocks * squares(step.bias)), Fraction(np.abs(step.bias).max())
            require(row * before + peak < 2**100, f"{step.label}: overflow is not excluded")
            largest = row * self.error + gamma(n + 1) * (row * before + peak)
            head = (constant, self.lipschitz) if blocks == 1 else None
            self.lipschitz, self.error, self.terms = self.lipschitz * norm, self.error * norm, n
            rounding = gamma(n + 1) * (absolute_norm(constant) * before + size)
            self._rounded(rounding, largest, 4 * (n + 2) * TINY * (1 + before + row))
        self.head = head

    def _addend(self, constant: np.ndarray) -> np.ndarray:
        return (self.integers(constant) * 255 << (self.scale - self.bits))[:, None]

    def _rounded(self, error: Fraction, largest: Fraction | None, each: Fraction) -> None:
        self.lipschitz, self.error = up(self.lipschitz), up(self.error + error + each * root(Fraction(len(self.x))))
        self.error_max = self.error if largest is None else min(self.error, up(largest + each))

    def margins(self, n_outputs: int) -> dict[tuple[int, int], Fraction]:
        """`K_ij = L ||w_i - w_j||` for logits `W h + b`; one output f stands for `(f, -f)`."""
        weight, lipschitz = self.head or (np.zeros((0, 0)), Fraction(0))
        weight = np.concatenate([weight, -weight]) if n_outputs == 1 else weight
        pairs = [(i, j) for j in range(len(weight)) for i in range(j)]
        return {(i, j): up(lipschitz * root(squares(weight[i] - weight[j]) * (1 + 4 * U))) for i, j in pairs}


def _confirm(bound: Fraction, value: Any, where: str, slack: Fraction) -> None:
    """Require a stated upper bound to be at least the one proved here, and not far above it."""
    require(bound <= Fraction(value) <= bound * slack, f"{where}: {value!r}, and {float(bound)!r} is proved here")


def joined(pieces: list[Any], model: bytes) -> bytes:
    """A written graph: literal bytes, ranges of model.onnx, and ranges of its float32 numbers widened to float64."""
    parts = [(bytes.fromhex(text) + model[start : start + length], wide) for text, start, length, wide in pieces]
    return b"".join(np.frombuffer(part, "<f4").astype("<f8").tobytes() if wide else part for part, wide in parts)


def read(folder: Path) -> tuple[dict[str, Any], Chain]:
    """Check files, digests, members and graphs; return the evidence and the model."""
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    sums["SHA256SUMS"] = found["SHA256SUMS"]
    require(found == sums and "evidence.schema.json" in found, "files: not those of SHA256SUMS")
    evidence, card = (json.loads(files[name]) for name in ("evidence.json", "card.json"))
    canonical = f"{json.dumps(evidence, indent=1)}\n".encode() == files["evidence.json"]
    require(canonical and " ".join(evidence) == NAMES and evidence["format"] == 1, "evidence.json: not of format 1")
    require(found["evidence.json"].encode() in files["index.html"], "index.html: of another evidence.json")
    model, identity = files["model.onnx"], evidence["identity"]
    graphs = {name: joined(pieces, model) for name, pieces in json.loads(files["graphs.json"]).items()}
    parts = {"model.onnx": model, "card.json": files["card.json"], **graphs}
    digests = {name: f"sha256:{hashlib.sha256(content).hexdigest()}" for name, content in parts.items()}
    require(identity["digests"] == digests and card["graphs"]["model.onnx"] == digests["model.onnx"], "digests: others")
    chain, runs = Chain(model), Chain(graphs["forward"]).digest.digest()
    require(chain.digest.digest() == runs, "forward: it computes something else than model.onnx")
    shape = [card["input"][axis] for axis in ("channels", "height", "width")]
    stated = (identity[name] for name in ("name", "labels", "input_shape", "n_outputs"))
    require([*stated] == [card["name"], card["labels"], shape, chain.n_outputs], "identity: not that of the card")
    require(shape == [*chain.shape] and len(card["labels"]) == max(2, chain.n_outputs), "card.json: not of model.onnx")
    require([one["number"] for one in evidence["assumptions"]] == [*range(1, 7)], "assumptions: not 1 to 6")
    return evidence, chain


def _check_vector(vector: dict[str, Any], logits: list[Fraction], bounds: dict[str, Any], labels: list[str]) -> None:
    """Check one test vector against its exact logits."""
    name, error = vector["name"], Fraction(bounds["logit_error"])
    ends = [[Fraction(end) for end in pair] for pair in vector["exact_logits"]]
    f = [Fraction(value) for value in vector["runtime_logits"]]
    require(all(a <= x <= b for (a, b), x in zip(ends, logits, strict=True)), f"{name}: exact_logits are others")
    width, far = max(high - low for low, high in ends), max(abs(a - b) for a, b in zip(f, logits, strict=True))
    require(width <= Fraction(vector["width"]) <= 2 * width + UNDERFLOW, f"{name}: another width of exact_logits")
    require(far <= error, f"{name}: the runtime is off by {float(far)!r}, more than logit_error")
    same = abs(Fraction(vector["largest_difference"]) - far) <= far / 2**40 + width
    i, k = f.index(max(f)), bounds["margin_bounds"]
    radii = {j: (f[i] - f[j] - 4 * error) / Fraction(k[i][j]) for j in range(len(f)) if j != i}
    nearest, radius, stated = min(radii.values()), max(min(radii.values()), Fraction(0)), Fraction(vector["radius"])
    require(radius - (1 + radius) / 2**47 <= stated <= radius, f"{name}: radius is {float(radius)!r}")
    same &= vector["class_id"] == i and vector["label"] == labels[i] and radii.get(vector["runner_up"]) == nearest
    require(same, f"{name}: another class, runner-up or largest_difference")


def check(folder: Path) -> str:
    """Return the line about an accepted folder; raise `ValueError` otherwise."""
    evidence, chain = read(folder)
    vectors, nodes, claims, bounds = (evidence[name] for name in ("test_vectors", "derivation", "norms", "bounds"))
    images = [np.load(folder / one["file"]).astype(np.uint8, casting="safe").reshape(chain.shape) for one in vectors]
    head = "x".join(map(str, chain.shape)).encode() + b"\n"
    found = [f"sha256:{hashlib.sha256(head + (one / 255.0).tobytes()).hexdigest()}" for one in images]
    require(found == [vector["digest"] for vector in vectors], "test_vectors: other images")
    columns = [np.full(math.prod(chain.shape), 255), *(2 * one.astype(int).ravel() for one in images)]
    walk = Walk(chain, np.stack(columns, axis=1).astype(object))
    norms = iter([Fraction(one["norm_bound"]) for one in claims])
    require([one["node"] for one in nodes] == [s.label for s in chain.steps], "derivation: not the nodes of model.onnx")
    dense = [step.label for step in chain.steps if step.kind == "dense"]
    require([one["node"] for one in claims] == dense, "norms: not the dense nodes of model.onnx")
    for step, node in zip(chain.steps, nodes, strict=True):
        theorem = step.label.split()[0] in THEOREMS.get(node["theorem"], "").split()
        require(theorem and node["operator"] in node["source"], f"{step.label}: another theorem or source")
        if step.kind != "move":
            walk.take(step, norms)
        _confirm(walk.lipschitz, node["lipschitz_bound"], f"{step.label}: lipschitz_bound", Fraction(10001, 10000))
        _confirm(walk.error, node["error"], f"{step.label}: error", Fraction(5, 4))
    error, stated, k = min(walk.error, walk.error_max), bounds["logit_error"], bounds["margin_bounds"]
    _confirm(error, stated, "logit_error", Fraction(101, 100))
    same = stated == evidence["replication"]["bound"] and bounds["lipschitz_bound"] == nodes[-1]["lipschitz_bound"]
    require(same and {len(k), *map(len, k)} == {max(2, chain.n_outputs)}, "bounds: two values, or not K x K")
    require(margins := walk.margins(chain.n_outputs), "bounds: the logits are no linear forms of one tensor")
    for (i, j), bound in margins.items():
        _confirm(bound, k[i][j], f"margin_bounds[{i}][{j}]", Fraction(1000001, 1000000))
        require(k[i][j] == k[j][i] and k[i][i] == k[j][j] == 0, "margin_bounds: not symmetric")
    for column, vector in enumerate(vectors, 1):
        logits = [Fraction(int(v), 255 << walk.scale) for v in walk.x[:, column]]
        logits += [-logits[0]] if len(logits) == 1 else []
        _check_vector(vector, logits, bounds, evidence["identity"]["labels"])
    return f"{len(nodes)} nodes, {len(dense)} norms, {len(vectors)} test vectors, logit error {float(error):.4g}"


if __name__ == "__main__":
    try:
        line = f"accepted: {check(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).resolve().parent)}"
    except Exception as error:  # Whatever cannot be read is not accepted.
        line = f"refused: {error}" if isinstance(error, ValueError) else f"refused: {type(error).__name__} {error}"
    sys.stdout.write(f"{line}\n")
    sys.exit(int(not line.startswith("accepted")))
