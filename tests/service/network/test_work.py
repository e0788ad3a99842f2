"""Work that a file may ask for: counted before it is done, the same on every machine, and little for a small file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from hostile_sizes import SMALL_FILES, Build, constant, filled, model_of, run_on_files
from random_graphs import GraphBuilder

from service.artefact.verification import verify
from service.certificate import certify
from service.certificate.__main__ import main
from service.certificate.proof_limits import ProofLimits
from service.certificate.work import limit_work
from service.errors import ArtefactError
from service.network.adjoint import without_gradient
from service.network.graphs import gradient_graph
from service.network.limits import LEAST_WORK, WORK_OF_WEIGHT, Work
from service.network.operators import UnsupportedModelError
from service.network.reader import read_draft
from service.network.writer import write

MOST_SECONDS = 2.0
MOST_MEGABYTES = 200
ALLOWED = frozenset(["4000 Relus of 16", "sums of 2048", "sums of 512", "8000 logits"])
"""Files of `SMALL_FILES` that are proved within these limits."""


def two_layers(b: GraphBuilder) -> str:
    x = b.one("Relu", b.one("MatMul", "image", constant(b, np.ones((4, 9)))))
    return b.one("MatMul", x, constant(b, np.ones((9, 4))))


_MEASURED = """
import json, re, sys, time
from service.certificate.__main__ import main
found = []
for path in sys.argv[1:]:
    started = time.process_time()
    status = main([path])
    seconds = time.process_time() - started
    peak = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())
    print()
    print("measured", json.dumps((status, seconds, int(peak[1]) >> 10 if peak else 0)), flush=True)
    print("measured", file=sys.stderr, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_a_small_file_ends_within_two_seconds_and_200_megabytes(tmp_path: Path) -> None:
    done = run_on_files(tmp_path, map(model_of, SMALL_FILES.values()), _MEASURED)
    ends = [json.loads(line[9:]) for line in done.stdout.splitlines() if line.startswith("measured ")]
    messages = done.stderr.split("measured\n")
    for kind, (status, seconds, megabytes), message in zip(SMALL_FILES, ends, messages, strict=False):
        assert (seconds < MOST_SECONDS, megabytes < MOST_MEGABYTES) == (True, True), (kind, seconds, megabytes)
        assert status == (0 if kind in ALLOWED else 2), kind
        assert message.count("\n") == (0 if kind in ALLOWED else 1), (kind, message)
        assert "Traceback" not in message
    assert len(ends) == len(SMALL_FILES)


@pytest.mark.parametrize("shape", [(1, 1 << 19), (1, 1 << 24), (4, 512, 512)])
def test_a_large_image_of_a_small_file_is_refused(shape: tuple[int, ...]) -> None:
    def build(b: GraphBuilder) -> str:
        weight = constant(b, np.ones((1, shape[0], *[1] * (len(shape) - 1))))
        return b.one("Flatten", b.one("GlobalAveragePool", b.one("Conv", "image", weight)), axis=1)

    with pytest.raises(UnsupportedModelError, match="--max-work"):
        certify(model_of(build, shape))


def test_a_long_image_is_searched_for_periods_in_no_time() -> None:
    def build(b: GraphBuilder) -> str:
        ends = [b.one("Slice", "image", *(constant(b, [k]) for k in (start, start + 1, 2))) for start in (0, 1)]
        spread = b.one("Expand", ends[0], constant(b, [1, 1, 100_000]))
        x = b.one("Conv", b.one("Concat", spread, ends[1], axis=2), constant(b, np.ones((1, 1, 1))))
        return b.one("Flatten", b.one("GlobalMaxPool", x), axis=1)

    assert certify(model_of(build, (1, 4))).lipschitz_bound > 1.0


def test_work_is_allowed_up_to_its_last_multiply_add() -> None:
    draft = read_draft(model_of(two_layers))
    assert draft.image is not None
    needed = limit_work(draft.image, draft.operators, draft.work)
    assert certify(read_draft(model_of(two_layers), needed)).nodes == certify(draft).nodes
    with pytest.raises(UnsupportedModelError, match=r"MatMul .*: too large to analyse: .* multiply-adds so far"):
        certify(read_draft(model_of(two_layers), needed * (1.0 - 1e-12)))


def test_a_file_may_ask_for_as_much_as_it_holds_weights() -> None:
    assert read_draft(model_of(two_layers)).work == LEAST_WORK + 72 * WORK_OF_WEIGHT


def test_numbers_that_a_file_computes_allow_nothing() -> None:
    def build(b: GraphBuilder) -> str:
        return b.one("MatMul", "image", b.one("Neg", filled(b, -1.0, 4, 1000)))

    assert read_draft(model_of(build)).work <= LEAST_WORK + 10 * WORK_OF_WEIGHT


@pytest.mark.parametrize("build", [two_layers, SMALL_FILES["sums of 512"]])
def test_the_canonical_form_allows_no_less_than_the_file(build: Build) -> None:
    draft = read_draft(model_of(build))
    assert read_draft(write(draft.network())).work >= draft.work


@pytest.mark.parametrize(("channels", "kernel", "fine"), [(16, 32, True), (17, 32, False)])
def test_a_gradient_is_limited_by_the_windows_that_it_picks_from(channels: int, kernel: int, fine: bool) -> None:
    def build(b: GraphBuilder) -> str:
        x = b.one("MaxPool", "image", kernel_shape=[kernel] * 2)
        return b.one("Flatten", b.one("GlobalMaxPool", x), axis=1)

    draft = read_draft(model_of(build, (channels, 63, 63)))
    certify(draft)
    assert (not without_gradient(draft.operators)) is fine
    if not fine:
        with pytest.raises(UnsupportedModelError, match="no gradient, whose windows are too large"):
            gradient_graph(draft.network())


def test_work_is_counted_together() -> None:
    work = Work(10.0)
    work.spend(4.0, "one")
    work.spend(6.0, "another")
    with pytest.raises(UnsupportedModelError, match="a third: too large"):
        work.spend(0.1, "a third")


def test_the_command_takes_another_limit(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(model_of(SMALL_FILES["gates"]))
    refused = run_command(main, [str(file)])
    assert (refused.exit_code, refused.output.count("\n")) == (2, 1)
    assert "--max-work" in refused.output
    file.write_bytes(model_of(two_layers))
    assert run_command(main, [str(file)]).exit_code == 0
    assert run_command(main, [str(file), "--max-work=1e12"]).exit_code == 0
    assert "at most 1e+04" in run_command(main, [str(file), "--max-work=1e4"]).output


def test_a_server_takes_another_limit(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model_of(two_layers))
    assert verify(tmp_path).facts().certificate.n_outputs == 4
    with pytest.raises(ArtefactError, match="LIPCERT_PROOF_WORK"):
        verify(tmp_path, ProofLimits(work=1e4)).facts()
