"""Messages of more fields than a request needs are refused before an object is made of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rpc_server import infer_request

from service.errors import MalformedBodyError
from service.rpc import open_inference_pb2 as protocol
from service.rpc.fields import INFER, check_fields

SHAPE = (2, 1, 4, 5)


def test_requests_of_the_protocol_pass() -> None:
    request = infer_request("FP32", SHAPE, model_version="1", id="x")
    request.inputs[0].contents.fp32_contents.extend(np.linspace(0.0, 1.0, 2_000_000).tolist())
    request.parameters["epsilon"].double_param = 0.5
    request.parameters["path"].uint64_param = 2**64 - 1
    request.parameters["target"].string_param = "\N{SNOWMAN}"
    request.outputs.add(name="radius").parameters["binary_data"].bool_param = False
    check_fields(request.SerializeToString(), INFER)
    check_fields(infer_request("UINT8", SHAPE, bytes(1_000_000)).SerializeToString(), INFER)
    check_fields(b"", {})


MANY = {
    "inputs": b"\x2a\x00" * 2000,
    "outputs": b"\x32\x00" * 2000,
    "tensors": b"\x3a\x00" * 2000,
    "parameters": b"\x22\x00" * 2000,
    "unknown numbers": b"\x78\x00" * 2000,
    "unknown fixed numbers": b"\x7d\x00\x00\x00\x00" * 2000,
    "texts in the contents of one tensor": b"\x2a\xa3\x1f\x2a\xa0\x1f" + b"\x42\x00" * 2000,
    "parameters of one tensor": b"\x2a\xa0\x1f" + b"\x22\x00" * 2000,
    "choices of one parameter": b"\x22\xa3\x1f\x12\xa0\x1f" + b"\x08\x01" * 2000,
}


@pytest.mark.parametrize("kind", MANY)
def test_too_many_fields_are_refused(kind: str) -> None:
    protocol.ModelInferRequest.FromString(MANY[kind])
    with pytest.raises(MalformedBodyError, match="more than 1024 fields; send one tensor"):
        check_fields(MANY[kind], INFER)


BROKEN = {
    "a field that is cut": b"\x2a\x05\x0a",
    "a tag that is cut": b"\x80",
    "a length without an end": b"\x2a" + b"\xff" * 12,
    "a length beyond the message": b"\x2a\xff\xff\xff\xff\x0f",
    "a fixed number that is cut": b"\x7d\x00",
    "a group": b"\x2b\x2c",
    "an unknown kind": b"\x2f",
    "a tensor that is cut": b"\x2a\x02\x0a\x05",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_bytes_that_are_no_message_are_refused(kind: str) -> None:
    with pytest.raises(MalformedBodyError, match="not a message of this method"):
        check_fields(BROKEN[kind], INFER)


@given(st.binary(max_size=200))
def test_any_bytes_pass_or_are_refused(content: bytes) -> None:
    try:
        check_fields(content, INFER)
    except MalformedBodyError:
        return
