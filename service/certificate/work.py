"""Cost model of a proof: multiply-adds of each operator, from shapes alone. Too much is refused before it begins.

Each number that is made on the way counts as `WORK_OF_NUMBER`. Joint bounds, which a proof can do without, are counted
where they are made (`budget`).
"""

import math
from collections.abc import Sequence

import numpy as np

from service.certificate.convolutions import convolution_cost
from service.certificate.limits import fits
from service.network.limits import WORK_OF_NUMBER, Work
from service.network.operators import Constant, Operator, Tensor

_OF_OPERATOR = 2.0**17
"""Of any operator, however small."""
_OF_COMPOSITION = 2.0**22
"""Of an operator on two tensors, which may be one function of one tensor: bounds of its slopes."""
_OF_STEP = 2.0**15
"""Of one step in Python: a tap of a kernel, a pixel along a resampled axis."""
_OF_MAXIMUM = 0.0625
"""Of the work of a number, for each element of a window."""
_POOLS = ("AveragePool", "LpPool", "MaxPool")


def limit_work(image: Tensor, operators: Sequence[Operator], most: float) -> float:
    """Return the multiply-adds of the proof of a network; refuse it where they are too many.

    Args:
        image: input of the network.
        operators: of the network, in order.
        most: multiply-adds.

    Raises:
        UnsupportedModelError: it takes more; the message names the operator that is one too many.
    """
    work = Work(most)
    # It is made; its facts are counted where they are read.
    work.spend(0.5 * WORK_OF_NUMBER * math.prod(image.shape), "the image")
    squares: dict[Tensor, int] = {}
    for operator in operators:
        work.spend(_operator_work(operator, squares), operator.label)
    return work.done


def _operator_work(operator: Operator, squares: dict[Tensor, int]) -> float:
    """Return the cost of one operator.

    Args:
        operator: the operator.
        squares: squares in each element of tensors that are sums of squares; the results of the operator are added.
    """
    tensors = [operand for operand in operator.operands if isinstance(operand, Tensor)]
    arrays = [operand.array for operand in operator.operands if isinstance(operand, Constant)]
    made = sum(math.prod(tensor.shape) for tensor in operator.results)
    read = sum(math.prod(tensor.shape) for tensor in tensors)
    taps = math.prod(operator.integers("kernel_shape")) if operator.kind in _POOLS else 1
    windows = float(made) * taps
    if operator.kind == "MaxPool":
        # The largest of each window is all that is made, and, for the gradient, its place in one channel.
        windows *= _OF_MAXIMUM / operator.results[0].shape[0]
    numbers = float(read + made + windows + sum(array.size for array in arrays))
    terms = _squares_of_each(operator, tensors, squares, taps, read, made)
    if terms:
        squares.update(dict.fromkeys(operator.results, terms))
        numbers += float(made) * terms
    further = _OF_COMPOSITION if len(tensors) > 1 else _OF_OPERATOR
    match operator.kind:
        case "Gemm" | "MatMul":
            small, large = sorted(arrays[0].shape)
            further += 2.0 * small * small * large + float(read + made) * small
        case "Conv" | "ConvTranspose":
            further += _convolution_work(operator, tensors[0], arrays[0])
        case "AveragePool":
            ones = np.broadcast_to(1.0, (1, 1, *operator.integers("kernel_shape")))
            further += _norm_work(operator, ones, tensors[0].shape[1:], 1)
        case "Resize":
            further += _resize_work(operator, tensors[0])
        case _:
            pass
    return WORK_OF_NUMBER * numbers + further


def _squares_of_each(
    operator: Operator, tensors: Sequence[Tensor], squares: dict[Tensor, int], taps: int, read: int, made: int
) -> int:
    """Return how many squares an element of the result may be a sum of; 0 where it is none."""
    if operator.kind == "LpPool":
        return taps
    if operator.kind in ("Pow", "ReduceSumSquare") or (operator.kind == "Mul" and len(tensors) > len(set(tensors))):
        return max(1, read // made)
    before = sum(squares.get(tensor, 0) for tensor in tensors)
    if operator.kind == "Sqrt" or not before:
        return 0
    return before * max(taps, read // made)


def _convolution_work(operator: Operator, image: Tensor, kernel: np.ndarray) -> float:
    groups = operator.integer("group")
    result = operator.results[0]
    pixels = max(math.prod(image.shape[1:]), math.prod(result.shape[1:]))
    taps = math.prod(kernel.shape[2:])
    # Padded, or the full result before it is cut.
    pads = operator.integers("pads")
    axes = len(pads) // 2
    before = result if operator.kind == "ConvTranspose" else image
    whole = math.prod(n + low + high for n, low, high in zip(before.shape[1:], pads[:axes], pads[axes:], strict=True))
    numbers = float(before.shape[0]) * whole
    return (
        WORK_OF_NUMBER * numbers
        + _OF_STEP * taps
        + 4.0 * pixels * kernel.size
        + _norm_work(operator, np.broadcast_to(0.0, kernel.shape), before.shape[1:], groups)
    )


def _norm_work(operator: Operator, kernel: np.ndarray, size: Sequence[int], groups: int) -> float:
    """Return the cost of the norm of a convolution.

    Args:
        operator: its strides and dilations.
        kernel: of its shape; the numbers do not count.
        size: of the image.
        groups: of channels.
    """
    strides, dilations = operator.integers("strides"), operator.integers("dilations")
    extent = [(k - 1) * d + 1 for k, d in zip(kernel.shape[2:], dilations, strict=True)]
    whole = [-(-k // s) * s for k, s in zip(extent, strides, strict=True)]
    spread = np.broadcast_to(0.0, (*kernel.shape[:2], *extent))
    # A copy with dilations as zeros, its phases, and its digest.
    stored = 4.0 * WORK_OF_NUMBER * math.prod((*kernel.shape[:2], *whole))
    taps = [k // s for k, s in zip(whole, strides, strict=True)]
    torus = [-(-n // s) + k for n, s, k in zip(size, strides, taps, strict=True)]
    frequencies, lags = math.prod(torus) // 2 + 1, math.prod(2 * k - 1 for k in taps) // 2
    if not fits(frequencies, lags + 1):
        # The Frobenius norm is taken.
        return stored
    waves = float(frequencies) * (lags + 1)
    return stored + WORK_OF_NUMBER * waves + _OF_STEP * groups * lags + convolution_cost(spread, size, strides, groups)


def _resize_work(operator: Operator, image: Tensor) -> float:
    """Return the cost of the coordinates of each axis, and of its matrix."""
    axes = [axis - 1 for axis in operator.integers("axes")]
    pairs = [(image.shape[axis], operator.results[0].shape[axis]) for axis in axes]
    steps = 2.0 * _OF_STEP * sum(after for _, after in pairs)
    if operator.text("mode") != "linear":
        return steps
    made, longest = math.prod(operator.results[0].shape), max(max(pair) for pair in pairs)
    matrices = sum(WORK_OF_NUMBER * n * m + 2.0 * min(n, m) * n * m for n, m in pairs)
    return steps + matrices + 2.0 * float(made) * longest
