"""The artefacts of the benchmark: the reference network at three sizes, the shipped artefacts, and test images.

The reference is three shift-and-mix convolutions of 512 channels on 4 x 4 pixels (28 x 28 images in windows of 7),
about 9 million multiply-adds for each image, nearly all in three matrix products, with 3 MB of weights. The weights are
random: time does not depend on them. The service proves it as it proves any artefact.

Axes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

import base64
import io
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper, shape_inference

from models.data.published import load_mnist
from models.export import emit_graph
from models.nets.networks import convolutional_network
from models.recipes import Stage
from service.artefact.card import MODEL_FILE, Card, InputShape, read_card, write_artefact
from service.pixels.images import encode_png

REFERENCE_CHANNELS = {"reference": 512, "reference-x4": 1024, "reference-x16": 2048}
"""Channels of each reference network; doubling them quadruples the cost."""
SHIPPED = ("mnist", "mnist-0-8")
_SEED = 0
_INPUT = (1, 28, 28)
_CLASSES = 10
IMAGES = 64
"""Number of test images, sent in turn."""
BATCH = 32


@dataclass(frozen=True)
class Subject:
    """A measured artefact, alone in a folder that a server can read."""

    name: str
    zoo: Path
    """The folder of models, with this artefact only."""

    @property
    def model(self) -> Path:
        """Path of the model."""
        return self.zoo / self.name / MODEL_FILE


def prepare(name: str, folder: Path, shipped: Path) -> Subject:
    """Return the reference `name`, built, or the shipped artefact of that name, linked, alone in a folder."""
    zoo = folder / "zoo" / name
    subject = Subject(name, zoo)
    if name in REFERENCE_CHANNELS:
        if not (zoo / name / "card.json").exists() or _channels_of(zoo / name) != REFERENCE_CHANNELS[name]:
            shutil.rmtree(zoo, ignore_errors=True)
            build_reference(name, REFERENCE_CHANNELS[name], zoo / name)
        return subject
    source = (shipped / name).resolve()
    read_card(source)
    zoo.mkdir(parents=True, exist_ok=True)
    link = zoo / name
    if not link.is_symlink() or link.resolve() != source:
        link.unlink(missing_ok=True)
        link.symlink_to(source, target_is_directory=True)
    return subject


def build_reference(name: str, channels: int, folder: Path) -> None:
    """Write the reference network with this number of channels as an artefact, proved by the server's certifier."""
    torch.manual_seed(_SEED)
    stage = Stage(channels=channels, blocks=3, window=7)
    # Random rows are turned into orthogonal ones by `fold`.
    network = convolutional_network(_INPUT, [stage], "none", [], _CLASSES)
    card = Card(
        name=name,
        labels=[str(label) for label in range(_CLASSES)],
        input=InputShape(channels=_INPUT[0], height=_INPUT[1], width=_INPUT[2]),
        recipe={"reference": {"channels": channels}},
        seed=_SEED,
    )
    write_artefact(folder, card, emit_graph(network))


def _channels_of(folder: Path) -> object:
    return read_card(folder).recipe.get("reference", {}).get("channels")


def multiply_adds(model: onnx.ModelProto) -> int:
    """Return the multiply-adds of the matrix products (MatMul, Gemm, Conv) for one image.

    Raises:
        ValueError: the shape of a product cannot be inferred.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    inferred = shape_inference.infer_shapes(_without_declared_batch(model), data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    for node in inferred.node:
        if node.op_type == "Constant":
            shapes[node.output[0]] = numpy_helper.to_array(node.attribute[0].t).shape
    total = 0
    for node in inferred.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        left, right, out = (shapes.get(name, ()) for name in (node.input[0], node.input[1], node.output[0]))
        if not (left and right and out) or 0 in out:
            raise ValueError(f"{node.op_type} {node.name}: shapes {left}, {right} -> {out}")
        if node.op_type == "Conv":
            inner = math.prod(right[1:])
        else:
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            inner = left[-2] if transposed else left[-1]
        total += math.prod(out) * inner
    return total


def _without_declared_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the symbolic batch of the outputs, which shape inference would not replace."""
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[0].dim_value = 1
    return model


@dataclass(frozen=True)
class Payloads:
    """The test images in the forms that the servers accept."""

    image_NCHW: np.ndarray
    """float64 in [0, 1]."""
    png: Sequence[bytes]
    base64_json: Sequence[bytes]
    """`{"image": "..."}`."""
    npy: Sequence[bytes]
    """uint8 arrays of 32 x 28 x 28, each beginning at another image."""

    @property
    def base64(self) -> list[str]:
        """Each PNG as base64."""
        return [base64.b64encode(png).decode() for png in self.png]


def payloads(data: Path) -> Payloads:
    """Return the first MNIST test images; missing files are downloaded (`models.data.published`)."""
    _, test = load_mnist(data)
    image_NHW = test.images_NCHW[:IMAGES, 0].numpy()
    png = [encode_png(image_HW[None]) for image_HW in image_NHW]
    batches = [np.roll(image_NHW, -start, axis=0)[:BATCH] for start in range(0, IMAGES, 8)]
    return Payloads(
        image_NCHW=image_NHW[:, None].astype(np.float64) / 255.0,
        png=png,
        base64_json=[json.dumps({"image": base64.b64encode(content).decode()}).encode() for content in png],
        npy=[_npy(batch) for batch in batches],
    )


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
