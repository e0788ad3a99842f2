"""An ONNX file as a torch module, in the precision of the file, so that attacks have its gradient.

Only operators and attributes of the table; another one is refused, all of them in one message. The certificate's error
analysis holds for any order of summation and so for torch's float64 kernels (the convolution is a matrix product).

Axes: N batch, C H W image, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor

Attributes = dict[str, Any]
Operator = Callable[[Sequence[Tensor], Attributes], Tensor | Sequence[Tensor]]


class UnknownOperatorError(Exception):
    """The file has operators or attributes that are not in the table; the message names them all."""


def _reshape(inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
    data, wanted = inputs
    kept = 0 if attributes.get("allowzero") else None
    shape = [data.shape[k] if side == 0 and kept is None else side for k, side in enumerate(wanted.tolist())]
    return data.reshape(shape)


def _gemm(inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
    rows = inputs[0].T if attributes.get("transA") else inputs[0]
    columns = inputs[1].T if attributes.get("transB") else inputs[1]
    if (attributes.get("alpha", 1.0), attributes.get("beta", 1.0)) != (1.0, 1.0):
        raise UnknownOperatorError("Gemm with a factor")
    return rows @ columns if len(inputs) == 2 else torch.addmm(inputs[2], rows, columns)


def _window(attributes: Attributes, name: str) -> Attributes:
    """Arguments that convolution and pool share, if it is what torch has."""
    pads = attributes.get("pads", [0, 0, 0, 0])
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET" or pads[:2] != pads[2:] or attributes.get("ceil_mode"):
        raise UnknownOperatorError(f"{name} with auto_pad, uneven pads or ceil_mode")
    return {"stride": attributes.get("strides", [1, 1]), "padding": pads[:2]}


def _conv(inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
    bias = inputs[2] if len(inputs) > 2 else None
    dilation, groups = attributes.get("dilations", [1, 1]), attributes.get("group", 1)
    return F.conv2d(inputs[0], inputs[1], bias, dilation=dilation, groups=groups, **_window(attributes, "Conv"))


def _average_pool(inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
    window = _window(attributes, "AveragePool")
    counted = bool(attributes.get("count_include_pad", 0))
    return F.avg_pool2d(inputs[0], attributes["kernel_shape"], count_include_pad=counted, **window)


def _pow(inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
    del attributes
    base, exponent = inputs[0], float(inputs[1])
    if exponent == 2.0:
        return base * base
    if exponent >= 1.0:
        return base**exponent
    # The slope of a root at 0 is infinite; an attack needs a number.
    positive = base > 0
    return torch.where(positive, torch.where(positive, base, 1.0) ** exponent, 0.0)


def _split(inputs: Sequence[Tensor], attributes: Attributes) -> Sequence[Tensor]:
    return torch.split(inputs[0], inputs[1].tolist(), dim=attributes.get("axis", 0))


def _top_k(inputs: Sequence[Tensor], attributes: Attributes) -> Sequence[Tensor]:
    largest, ordered = bool(attributes.get("largest", 1)), bool(attributes.get("sorted", 1))
    return torch.topk(inputs[0], int(inputs[1]), dim=attributes.get("axis", -1), largest=largest, sorted=ordered)


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def along(inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
        if len(inputs) < 2:
            raise UnknownOperatorError("a reduction without axes")
        return function(inputs[0], dim=inputs[1].tolist(), keepdim=bool(attributes.get("keepdims", 1)))

    return along


def _gather(inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
    axis = attributes.get("axis", 0)
    return torch.from_numpy(np.asarray(np.take(inputs[0].numpy(), inputs[1].numpy(), axis=axis)))


def _cast(inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
    dtype = torch.from_numpy(np.empty(0, helper.tensor_dtype_to_np_dtype(attributes["to"]))).dtype
    return inputs[0].to(dtype)


def _shape(inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
    return torch.tensor(inputs[0].shape[attributes.get("start", 0) : attributes.get("end")])


OPERATORS: Mapping[str, tuple[Operator, frozenset[str]]] = {
    name: (operator, frozenset(attributes.split()))
    for name, operator, attributes in (
        ("Abs", lambda inputs, _: inputs[0].abs(), ""),
        ("Add", lambda inputs, _: inputs[0] + inputs[1], ""),
        ("AveragePool", _average_pool, "kernel_shape strides pads auto_pad ceil_mode count_include_pad"),
        ("Cast", _cast, "to"),
        ("Concat", lambda inputs, attributes: torch.cat(list(inputs), dim=attributes["axis"]), "axis"),
        ("Conv", _conv, "kernel_shape strides pads auto_pad dilations group"),
        ("Flatten", lambda inputs, attributes: inputs[0].flatten(attributes.get("axis", 1)), "axis"),
        ("Gather", _gather, "axis"),
        ("Gemm", _gemm, "alpha beta transA transB"),
        ("MatMul", lambda inputs, _: inputs[0] @ inputs[1], ""),
        ("Max", lambda inputs, _: reduce(torch.maximum, inputs), ""),
        ("Min", lambda inputs, _: reduce(torch.minimum, inputs), ""),
        ("Mul", lambda inputs, _: inputs[0] * inputs[1], ""),
        ("Pow", _pow, ""),
        ("ReduceMax", _reduce(torch.amax), "keepdims noop_with_empty_axes"),
        ("ReduceMin", _reduce(torch.amin), "keepdims noop_with_empty_axes"),
        ("Relu", lambda inputs, _: inputs[0].relu(), ""),
        ("Reshape", _reshape, "allowzero"),
        ("Shape", _shape, "start end"),
        ("Sign", lambda inputs, _: inputs[0].sign(), ""),
        ("Split", _split, "axis"),
        ("Sub", lambda inputs, _: inputs[0] - inputs[1], ""),
        ("TopK", _top_k, "axis largest sorted"),
        ("Transpose", lambda inputs, attributes: inputs[0].permute(attributes["perm"]), "perm"),
    )
}
"""Operator -> what it does and the attributes it reads."""


class GraphInTorch(torch.nn.Module):
    """`model_bytes` evaluated by torch; differentiable with respect to its one input.

    Raises:
        UnknownOperatorError: something is not in the table.
    """

    def __init__(self, model_bytes: bytes) -> None:
        super().__init__()
        graph = onnx.load_from_string(model_bytes).graph
        unknown = {why for node in graph.node if (why := _unknown(node))}
        if unknown:
            raise UnknownOperatorError(f"not in the table: {'; '.join(sorted(unknown))}")
        self._nodes = [
            (
                OPERATORS[node.op_type][0],
                list(node.input),
                list(node.output),
                {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute},
            )
            for node in graph.node
        ]
        self._constants = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer
        }
        (self._image,) = (value.name for value in graph.input if value.name not in self._constants)
        self._logits = graph.output[0].name

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """N x K, in the precision of the image, which must be the file's."""
        values = {**self._constants, self._image: image_NCHW}
        for operator, inputs, outputs, attributes in self._nodes:
            made = operator([values[name] for name in inputs if name], attributes)
            values.update(zip(outputs, [made] if isinstance(made, Tensor) else made, strict=False))
        return values[self._logits]


def _unknown(node: NodeProto) -> str:
    """What of a node is not in the table; empty if nothing."""
    if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
        return node.op_type
    extra = {attribute.name for attribute in node.attribute} - OPERATORS[node.op_type][1]
    return f"{node.op_type} with {', '.join(sorted(extra))}" if extra else ""
