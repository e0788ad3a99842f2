"""The serving benchmark: what wrk printed, medians and quotients, multiply-adds, the table of claims, the servers."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from benchmarks.serving import figures, plan, report
from benchmarks.serving.arrays import is_npy, logits_of_batch
from benchmarks.serving.artefacts import REFERENCE_CHANNELS, Subject, build_reference, multiply_adds
from benchmarks.serving.claims import Claim, Figure, claims, fastest_packaged, growth_of_cost
from benchmarks.serving.contestants import PEERS, ROOT, all_contestants, error_of_pip, ours
from benchmarks.serving.load import MARKER, LoadError, Request, lua_script, parse_wrk
from benchmarks.serving.measure import CellResult, StartResult
from benchmarks.serving.processes import Server, ServerError
from benchmarks.serving.results import Results, Run, SubjectFacts
from models.export import emit_graph
from models.nets.networks import dense_network

CONTESTANTS = all_contestants()
COUNTED = {
    "requests": 400,
    "duration_us": 2_000_000,
    "p50_us": 1500,
    "p99_us": 4000,
    "connect": 0,
    "read": 0,
    "write": 0,
    "status": 0,
    "timeout": 0,
}


def wrk_output(**changes: int) -> str:
    return f"Running 2s test @ http://127.0.0.1:1/\n  4 requests\n{MARKER}{json.dumps(COUNTED | changes)}\n"


def cell(**changes: object) -> CellResult:
    fields: dict[str, object] = {
        "contestant": "ours",
        "subject": "reference",
        "load": "single",
        "clients": 64,
        "round": 0,
        "requests": 100,
        "images_per_s": 500.0,
        "p50_ms": 2.0,
        "p99_ms": 5.0,
        "cpu_ms_per_image": 1.0,
        "raw_images_per_s": 1000.0,
        "raw_one_ms": None,
        "answers_npy": False,
        "run": "then",
    }
    return CellResult(**(fields | changes))  # type: ignore[arg-type]


def start(**changes: object) -> StartResult:
    fields: dict[str, object] = {
        "contestant": "ours",
        "subject": "reference",
        "round": 0,
        "ready_s": 0.9,
        "idle_rss_mb": 120.0,
        "idle_pss_mb": 110.0,
        "loaded_rss_mb": 150.0,
        "loaded_pss_mb": 140.0,
        "processes": 1,
        "run": "then",
    }
    return StartResult(**(fields | changes))  # type: ignore[arg-type]


def run(id_: str = "then") -> Run:
    return Run(id_, "python -m benchmarks.serving", "abc", 1, 1, "a CPU", 2, "x86_64", {"Python": "3"}, 0.1)


def facts(name: str, size: int, steps: float | None = None) -> SubjectFacts:
    return SubjectFacts(name, size, 2.7, 0.7, 22.0, steps)


def figure_named(rows: list[Claim], part: str, name: str = "") -> Figure:
    claim = next(row for row in rows if part in row.title)
    return next(figure for figure in claim.figures if name in figure.name)


def test_the_result_of_wrk_is_read_from_the_line_of_the_script() -> None:
    load = parse_wrk(wrk_output())
    assert (load.requests_per_s, load.p50_ms, load.p99_ms) == (200.0, 1.5, 4.0)


@pytest.mark.parametrize("kind", ["connect", "read", "write", "status", "timeout"])
def test_one_failed_request_fails_the_run(kind: str) -> None:
    with pytest.raises(LoadError, match=f"{kind} 1"):
        parse_wrk(wrk_output(**{kind: 1}))


@pytest.mark.parametrize("output", ["", "unable to connect\n", wrk_output(requests=0)])
def test_a_run_without_answers_is_no_result(output: str) -> None:
    with pytest.raises(LoadError):
        parse_wrk(output)


def test_the_script_sends_every_body_with_the_headers_quoted() -> None:
    request = Request("/predict?a=1", {"Content-Type": 'image/"png"'}, [b"1", b"2", b"3"])
    script = lua_script(request, Path("/some folder"))
    assert "for index = 0, 2 do" in script
    assert '["Content-Type"] = "image/\\"png\\""' in script
    assert '"/some folder" .. "/body-"' in script


def test_multiply_adds_of_a_dense_network_are_the_sizes_of_its_matrices() -> None:
    torch.manual_seed(0)
    network = dense_network((1, 6, 4), [16, 8], 5)
    model = onnx.load_model_from_string(emit_graph(network))
    assert multiply_adds(model) == 24 * 16 + 16 * 8 + 8 * 5


def test_multiply_adds_count_transposed_factors_and_convolutions_by_their_inner_side() -> None:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 7])
    weights = [
        helper.make_tensor("k", TensorProto.FLOAT, [4, 3, 3, 3], [0.0] * 108),
        helper.make_tensor("w", TensorProto.FLOAT, [7, 144], [0.0] * 1008),
    ]
    nodes = [
        helper.make_node("Conv", ["image", "k"], ["conv"], kernel_shape=[3, 3]),
        helper.make_node("Flatten", ["conv"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["out"], transB=1),
    ]
    graph = helper.make_graph(nodes, "graph", [image], [out], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    assert multiply_adds(model) == 4 * 6 * 6 * 27 + 144 * 7


def test_the_reference_is_proved_and_costs_about_nine_million_multiply_adds(tmp_path: Path) -> None:
    build_reference("reference", REFERENCE_CHANNELS["reference"], tmp_path / "reference")
    count = multiply_adds(onnx.load_model(tmp_path / "reference" / "model.onnx"))
    assert count == 16 * (49 * 512 + 2 * 512 * 512) + 16 * 512 * 10
    assert 8.5e6 < count < 9.5e6


def test_ratios_and_medians_are_taken_within_rounds() -> None:
    results = Results(
        cells=[
            cell(round=0, images_per_s=100.0, raw_images_per_s=1000.0),
            cell(round=1, images_per_s=900.0, raw_images_per_s=3000.0),
            cell(round=2, images_per_s=400.0, raw_images_per_s=2000.0),
            # Out of order on purpose: pairs are of one round.
            cell(contestant="litserve", round=2, images_per_s=100.0),
            cell(contestant="litserve", round=1, images_per_s=300.0),
            cell(contestant="litserve", round=0, images_per_s=50.0),
        ]
    )
    assert results.median(lambda one: one.ratio, "ours", "reference", "single", 64) == 0.2
    pair = (("ours", "reference", "single", 64), ("litserve", "reference", "single", 64))
    assert results.quotient(lambda one: one.images_per_s, *pair) == 3.0
    assert results.median(lambda one: one.ratio, "ours", "reference", "single", 16) is None


def test_a_later_run_replaces_what_it_measured_and_nothing_else() -> None:
    old = Results(
        runs=[run("old")],
        subjects=[facts("reference", 9)],
        cells=[cell(clients=16, run="old"), cell(clients=64, run="old")],
        starts=[start(run="old")],
        failed={"ray": "no"},
    )
    new = Results(
        runs=[run("new")], cells=[cell(clients=64, images_per_s=1.0, run="new")], starts=[start(contestant="ray")]
    )
    merged = old.merge(new)
    assert [(one.clients, one.run) for one in merged.cells] == [(16, "old"), (64, "new")]
    assert [one.id for one in merged.runs] == ["old", "new"]
    assert [one.contestant for one in merged.starts] == ["ours", "ray"]
    assert merged.failed == {}
    everything = Results(runs=[run("all")], cells=[cell(clients=16, run="all"), cell(clients=64, run="all")])
    assert [one.id for one in merged.merge(everything).runs] == ["all"]


def test_results_read_back_as_they_were_written(tmp_path: Path) -> None:
    results = Results([run()], [facts("reference", 9, 2.5)], [cell()], [start()], {"triton": "no such library"})
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results
    assert Results.load(tmp_path / "missing.json") == Results()


@pytest.mark.parametrize(
    ("better", "floor", "aim", "got", "verdict"),
    [
        ("higher", 0.5, 0.8, 0.8, "aim met"),
        ("higher", 0.5, 0.8, 0.79, "floor met"),
        ("higher", 0.5, 0.8, 0.499, "not met"),
        ("lower", 3.0, 2.0, 2.0, "aim met"),
        ("lower", 3.0, 2.0, 2.5, "floor met"),
        ("lower", 3.0, 2.0, 3.01, "not met"),
        ("lower", 3.0, 2.0, None, "not measured"),
    ],
)
def test_a_figure_is_met_only_on_the_right_side(
    better: str, floor: float, aim: float, got: float | None, verdict: str
) -> None:
    assert Figure("", floor, aim, got, "", better).verdict == verdict  # type: ignore[arg-type]


def test_the_table_says_what_is_not_met_and_what_is_not_measured() -> None:
    rows = [
        Claim("throughput", (Figure("16 clients", 0.5, 0.7, 0.4), Figure("64 clients", 0.6, 0.9, None)), "a note"),
        Claim("p99", (Figure("", 4.0, 2.0, 1.25, " ms", "lower"),)),
    ]
    lines = report.must_show(rows).splitlines()[2:]
    assert lines == [
        "| throughput | 16 clients | 0.5 | 0.7 | **0.4** | not met | a note |",
        "|  | 64 clients | 0.6 | 0.9 | - | not measured |  |",
        "| p99 |  | 4 ms | 2 ms | **1.25 ms** | aim met |  |",
    ]


def test_every_claim_is_there_without_a_single_measurement() -> None:
    rows = claims(Results(), CONTESTANTS)
    assert len(rows) == 11
    assert {figure.verdict for row in rows for figure in row.figures} == {"not measured"}


def test_the_fastest_packaged_peer_is_neither_ours_nor_an_endpoint_of_the_occasion() -> None:
    cells = [
        cell(images_per_s=700.0),
        cell(contestant="ours-all", images_per_s=900.0),
        cell(contestant="naive", images_per_s=800.0),
        cell(contestant="echo", images_per_s=9000.0),
        cell(contestant="litserve", images_per_s=300.0),
        cell(contestant="triton", images_per_s=450.0),
    ]
    assert fastest_packaged(Results(cells=cells), CONTESTANTS, 64) == ("triton", 450.0)
    figure = figure_named(claims(Results(cells=cells), CONTESTANTS), "fastest packaged", "64 clients")
    assert (figure.got, figure.verdict) == (2.0, "floor met")


def test_the_echo_is_compared_with_as_many_processes() -> None:
    cells = [
        cell(contestant=contestant, subject=subject, images_per_s=rate)
        for contestant, subject, rate in (
            ("ours", "mnist-0-8", 3000.0),
            ("echo", "reference", 5000.0),
            ("ours-all", "mnist-0-8", 4000.0),
            ("echo-all", "reference", 10_000.0),
        )
    ]
    rows = claims(Results(cells=cells), CONTESTANTS)
    assert figure_named(rows, "only echoes", "one process each, 64 clients").got == pytest.approx(0.6)
    assert figure_named(rows, "only echoes", "all cores each, 64 clients").got == pytest.approx(0.4)


def test_overhead_is_the_time_above_the_raw_run_of_one_image() -> None:
    cells = [cell(clients=1, p50_ms=1.2, p99_ms=2.2, raw_one_ms=0.7)]
    rows = claims(Results(cells=cells), CONTESTANTS)
    assert figure_named(rows, "overhead", "p50").got == pytest.approx(0.5)
    assert figure_named(rows, "overhead", "p99").got == pytest.approx(1.5)


def test_counterfactuals_are_held_against_one_raw_run_for_each_step() -> None:
    cells = [cell(load="counterfactual", clients=16, images_per_s=200.0, raw_images_per_s=1000.0)]
    rows = claims(Results(cells=cells, subjects=[facts("reference", 9, 3.0)]), CONTESTANTS)
    assert figure_named(rows, "counterfactual", "`reference`").got == pytest.approx(0.6)


def test_growth_of_cost_is_in_percent_of_the_processor_time_at_one_client() -> None:
    cells = [cell(clients=1, cpu_ms_per_image=2.0), cell(clients=256, cpu_ms_per_image=2.3)]
    assert growth_of_cost(Results(cells=cells), "ours") == pytest.approx(15.0)


def test_memory_is_the_larger_of_idle_and_loaded() -> None:
    rows = claims(Results(starts=[start(idle_rss_mb=120.0, loaded_rss_mb=190.0)]), CONTESTANTS)
    assert figure_named(rows, "resident memory", "reference alone, memory").got == 190.0


def test_the_document_names_every_server_and_why_one_is_missing(tmp_path: Path) -> None:
    results = Results(
        runs=[run()],
        subjects=[facts(name, 9_000_000 * 4**index, 3.0) for index, name in enumerate(REFERENCE_CHANNELS)],
        cells=[
            *(cell(clients=clients) for clients in plan.CLIENTS),
            *(cell(subject=subject) for subject in plan.GROWN),
            cell(subject="mnist"),
            cell(contestant="echo"),
            cell(load="batch", clients=1, answers_npy=True),
        ],
        starts=[start(), start(subject=plan.ZOO)],
        failed={"triton": "ended with status 1:\nImportError: no libpython"},
    )
    text = report.document(results, CONTESTANTS)
    assert all(f"| {one.title} |" in text for one in CONTESTANTS)
    assert "not measured: `ended with status 1: ... ImportError: no libpython`" in text
    assert "npy in, npy out" in text
    drawn = figures.draw(results, CONTESTANTS, tmp_path)
    assert {path.name for path in drawn} == {report.THROUGHPUT_PLOT, report.GROWTH_PLOT}
    assert all(path.read_text(encoding="utf-8").startswith("<?xml") for path in drawn)


def test_a_plan_keeps_what_is_named_and_refuses_unknown_names() -> None:
    both = plan.instances(CONTESTANTS, quick=True, only=["ours", "echo"])
    assert {one.contestant.name for one in both} == {"ours", "echo"}
    assert {one.subject for one in both} == {"reference", "mnist", "mnist-0-8"}
    (one,) = plan.instances(CONTESTANTS, only=["ours", "reference", "batch"])
    assert {cell.load for cell in one.cells} == {"batch"}
    (grown,) = plan.instances(CONTESTANTS, quick=True, only=["litserve", "reference-x4"])
    assert [cell.clients for cell in grown.cells] == [64]
    with pytest.raises(ValueError, match="litserv: neither"):
        plan.instances(CONTESTANTS, only=["litserv"])
    with pytest.raises(ValueError, match="nothing is left"):
        plan.instances(CONTESTANTS, only=["litserve", "batch"])


def test_every_peer_has_a_program_and_pinned_requirements_without_cuda_and_addresses() -> None:
    for one in CONTESTANTS:
        if one.kind == "ours":
            continue
        program = Path(one.command(Subject("reference", Path()), 1)[0])
        assert program.is_relative_to(PEERS)
        assert program.is_file()
        if one.venv is None:
            continue
        suffix = one.venv.removeprefix(".venv-peers")
        text = (ROOT / "benchmarks" / "serving" / f"requirements{suffix}.txt").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.+!]+( ;.*)?", line) for line in lines), lines
        assert not re.search(r"://|nvidia-c|^torch==(?!2\.13\.0$)", text, re.MULTILINE)


def test_the_reason_that_a_peer_cannot_be_installed_is_the_error_of_pip() -> None:
    printed = "WARNING: slow\nERROR: No matching distribution found for ray==9\nWARNING: there is a new pip\n"
    assert error_of_pip(printed) == "ERROR: No matching distribution found for ray==9"
    assert error_of_pip("disk full\n") == "disk full"


def test_settings_of_the_service_reach_its_environment() -> None:
    variant = ours("two", "two", {"LIPCERT_THREADS": "2"})
    environment = variant.environment(Subject("reference", Path("zoo")), 4321)
    assert environment["LIPCERT_THREADS"] == "2"
    assert environment["LIPCERT_PORT"] == "4321"
    assert environment["LIPCERT_DEFAULT_MODEL"] == "reference"


def test_logits_are_found_in_the_answers_of_every_form() -> None:
    by_name = {one.name: one for one in CONTESTANTS}
    logits = [0.25, -1.5]
    answers = {
        "ours": json.dumps({"logits": logits}).encode(),
        "naive": json.dumps({"logits": logits}).encode(),
        "bentoml": json.dumps([logits]).encode(),
        "mlserver": json.dumps({"outputs": [{"data": logits}]}).encode(),
        "triton": json.dumps({"outputs": [{"name": "logits"}]}).encode() + np.array(logits).tobytes(),
    }
    for name, answer in answers.items():
        read = by_name[name].logits
        assert read is not None
        assert read("single", answer) == [logits]


def test_a_batch_is_read_from_json_and_from_npy() -> None:
    assert logits_of_batch(json.dumps({"predictions": [{"logits": [1.0, 2.0]}]}).encode()) == [[1.0, 2.0]]
    file = io.BytesIO()
    np.save(file, np.array([([1.0, 2.0], 0.5)], dtype=[("logits", "<f8", (2,)), ("radius", "<f8")]))
    assert is_npy(file.getvalue())
    assert logits_of_batch(file.getvalue()) == [[1.0, 2.0]]


def test_a_server_is_counted_with_its_children_and_none_of_them_outlives_it(tmp_path: Path) -> None:
    # The child leaves the session and forgets the environment, as daemons do.
    program = (
        "import os, subprocess, sys, time; "
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']; "
        "child = subprocess.Popen(sleep, start_new_session=True, env={}); "
        "print(child.pid, flush=True); time.sleep(600)"
    )
    with Server([sys.executable, "-c", program], {}, 1, tmp_path / "log", tmp_path) as server:
        while not (text := server.log_tail()):
            pass
        usage = server.usage()
        assert usage.processes == 2
        assert 0 < usage.pss_mb <= usage.rss_mb
    # One that has ended and that nobody has waited for is still listed, as a zombie.
    stat = Path("/proc") / text / "stat"
    assert not stat.exists() or stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"


def test_a_server_that_ends_before_it_is_ready_is_reported_with_its_log(tmp_path: Path) -> None:
    with (
        Server(
            [sys.executable, "-c", "raise SystemExit('no such model')"], {}, 1, tmp_path / "log", tmp_path
        ) as server,
        pytest.raises(ServerError, match="no such model"),
    ):
        server.wait_ready("/", 60.0)


def test_ratios_follow_a_changed_raw_speed() -> None:
    one = cell(images_per_s=500.0, raw_images_per_s=1000.0)
    assert replace(one, raw_images_per_s=250.0).ratio == 2.0
