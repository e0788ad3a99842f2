"""A model in float32, its dense layers in blocks: long sums are split, so that each product is rounded fewer times.

A float32 sum of n products is off by up to `gamma_n`, and its rounding error costs radius. A layer `W h + b` in blocks
of at most k columns computes `W_1 h_1 + W_2 h_2 + ...`, each `W_b h_b` by one matrix product, their sum by a tree of
additions, so that a product goes through about `k + log2(n / k)` roundings in place of n. The certifier bounds what the
graph does (docs/soundness.md, "Blocks"). Convolutions and means stay whole.

Axes: N rows, M columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import numpy as np

from service.network.operators import Attribute, Constant, Network, Operand, Operator, Shape, Tensor
from service.network.reader import read
from service.network.writer import write


class PrecisionError(Exception):
    """The model has no form in float32."""


def in_float32(model_bytes: bytes, block: int) -> bytes:
    """Return a model whose constants are rounded to float32 and whose dense layers are sums of blocks.

    Where a constant is not a float32 number, the result is another function than the model. Weights that were trained
    here are float32 numbers, biases are not.

    Args:
        model_bytes: an ONNX file that the server reads.
        block: the most columns of a matrix product; at least 1.

    Raises:
        UnsupportedModelError: the file cannot be read.
        PrecisionError: a constant is beyond the range of float32.
    """
    network = read(model_bytes)
    return write(replace(network, precision="float32", operators=tuple(_Blocks(network, block).operators)))


class _Blocks:
    """The operators of the new network, in the order of evaluation."""

    def __init__(self, network: Network, block: int) -> None:
        tensors = [*network.inputs, *(tensor for operator in network.operators for tensor in operator.results)]
        self._numbers = count(1 + max(tensor.number for tensor in tensors))
        self._block = block
        self.operators: list[Operator] = []
        for operator in network.operators:
            self._add(replace(operator, operands=tuple(map(_rounded, operator.operands))))

    def _add(self, operator: Operator) -> None:
        match operator.kind, operator.operands:
            case "MatMul", (Tensor() as x, Constant() as weight):
                self._dense(operator, x, weight, axis=0)
            case "MatMul", (Constant() as weight, Tensor() as x):
                self._dense(operator, x, weight, axis=1)
            case "Gemm", (Tensor() as x, Constant() as weight, _) if _is_plain(operator):
                self._dense(operator, x, weight, axis=operator.integer("transB"))
            case _:
                self.operators.append(operator)

    def _dense(self, operator: Operator, x: Tensor, weight: Constant, axis: int) -> None:
        """Append a matrix product in blocks.

        Args:
            operator: the product.
            x: its operand that depends on the image.
            weight: its other operand.
            axis: the axis of `weight` that is summed over.
        """
        n = weight.array.shape[axis]
        if n <= self._block:
            self.operators.append(operator)
            return
        weights = np.array_split(weight.array, -(-n // self._block), axis=axis)
        sizes = [part.shape[axis] for part in weights]
        # A matrix on the left sums over the axis before the last.
        of_x = len(x.shape) - (1 if operator.operands[0] is x else 2)
        shapes = [(*x.shape[:of_x], size, *x.shape[of_x + 1 :]) for size in sizes]
        parts = self._emit("Split", [x, Constant(np.array(sizes, dtype=np.int64))], shapes, axis=of_x + 1)
        (result,) = operator.results
        terms: list[Tensor] = []
        for part, array in zip(parts, weights, strict=True):
            replaced: dict[Operand, Operand] = {x: part, weight: Constant(array)}
            operands = [replaced.get(operand, operand) for operand in operator.operands]
            if terms and operator.kind == "Gemm":
                # The first block adds the bias.
                operands[2] = None
            terms += self._emit(operator.kind, operands, [result.shape], **dict(operator.attributes))
        while len(terms) > 2:
            pairs = [terms[k : k + 2] for k in range(0, len(terms), 2)]
            terms = [pair[0] if len(pair) == 1 else self._emit("Add", pair, [result.shape])[0] for pair in pairs]
        self.operators.append(Operator("Add", tuple(terms), (), (result,)))

    def _emit(
        self, kind: str, operands: Sequence[Operand], shapes: Sequence[Shape], **attributes: Attribute
    ) -> list[Tensor]:
        results = tuple(Tensor(next(self._numbers), shape) for shape in shapes)
        self.operators.append(Operator(kind, tuple(operands), tuple(sorted(attributes.items())), results))
        return list(results)


def _is_plain(operator: Operator) -> bool:
    return operator.number("alpha") == operator.number("beta") == 1.0


def _rounded(operand: Operand) -> Operand:
    if not isinstance(operand, Constant) or operand.array.dtype != np.float64:
        return operand
    with np.errstate(over="ignore"):
        single = operand.array.astype(np.float32)
    if not np.isfinite(single).all():
        raise PrecisionError("a constant of the model is beyond the range of float32")
    return Constant(single)
