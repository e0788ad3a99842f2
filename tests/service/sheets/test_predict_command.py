"""`lipcert predict`: one row for each file, from a server or in process, with the same answers to the last bit."""

from __future__ import annotations

import base64
import csv
import functools
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import builders
import httpx
import numpy as np
import pytest
from client import HEIGHT, WIDTH
from commands import Result, run_command
from guards import write_guarded
from live_server import LiveServer
from PIL import Image
from process_table import wait_until
from scripted_server import ScriptedServer, problem, response

from lipcert.__main__ import main
from service.api.app import create_app
from service.inference.classifier import Classifier
from service.settings import Settings
from service.sheets.rows import COLUMNS
from service.sheets.writers import rounded_down

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.usefixtures("without_settings")


@pytest.fixture(scope="module")
def url(classifiers: Mapping[str, Classifier]) -> Iterator[str]:
    with LiveServer(create_app(Settings(default_model="grey"), classifiers)) as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with good files, a broken one, one of another size, and clutter."""
    folder = tmp_path / "pictures"
    (folder / "sub" / "@eaDir").mkdir(parents=True)
    (folder / "__MACOSX").mkdir()
    random = np.random.default_rng(5)
    for name in ("b.png", "a.png", "sub/c.bmp", 'sub/=odd, "name"\x1b[1m.png'):
        Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)).save(folder / name)
    np.save(folder / "array.npy", random.random((HEIGHT, WIDTH)))
    Image.fromarray(random.integers(0, 256, (9, 9), dtype=np.uint8)).save(folder / "large.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:50])
    for clutter in (".DS_Store", "Thumbs.db", "__MACOSX/a.png", "sub/@eaDir/a.png"):
        (folder / clutter).write_bytes(b"clutter")
    return folder


def predict(*words: object) -> Result:
    return run_command(main, ["predict", *map(str, words)])


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_novelty_is_asked_of_the_model_beside_the_one_that_answers(pictures: Path, tmp_path: Path) -> None:
    models, out = tmp_path / "models", tmp_path / "out.jsonl"
    write_guarded(models)
    table = predict(pictures / "a.png", "--model", models / "guarded", "--novelty").output.splitlines()
    assert table[0].split()[-1] == "novel"
    assert predict(pictures / "a.png", "--model", models / "guarded", "--novelty", "--jsonl", out).exit_code in (0, 1)
    novelty = lines(out)[0]["answer"]["novelty"]
    assert novelty["model"] == "guard"
    assert table[1].split()[-1] == ("yes" if novelty["novel"] else "no")
    refused = predict(pictures / "a.png", "--model", models / "guard", "--novelty", "--resize")
    assert refused.exit_code == 2
    assert "guard has no novelty model" in refused.output


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--counterfactual", "--proof", "best"],
        ["--epsilon", "0.125", "--resize"],
        ["--strength", "2", "--path", "3", "--saliency", "--counterfactual"],
    ],
    ids=" ".join,
)
def test_answers_are_those_of_the_server_to_the_last_bit(
    options: list[str], url: str, zoo: Path, pictures: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    assert predict(pictures, "--model", zoo / "grey", "--jsonl", here, *options).exit_code == 2
    assert predict(pictures, "--server", url, "--jsonl", there, *options).exit_code == 2
    assert here.read_bytes() == there.read_bytes()
    asked = {
        "--counterfactual": {"counterfactual": True, "proof": "best"},
        "--epsilon": {"epsilon": 0.125, "resize": True},
        "--strength": {"counterfactual": True, "strength": 2.0, "path": 3, "saliency": True},
    }
    wanted = next((asked[option] for option in options if option in asked), {})
    answered = 0
    for line, row in zip(here.read_text(encoding="utf-8").splitlines(), lines(here), strict=True):
        path = Path(row["file"])
        if path.suffix == ".npy":
            head, query = {"Content-Type": "application/x-npy"}, httpx.QueryParams(wanted)
            said = httpx.post(f"{url}/predict", content=path.read_bytes(), headers=head, params=query)
        else:
            document = {"image": base64.b64encode(path.read_bytes()).decode(), **wanted}
            said = httpx.post(f"{url}/predict", json=document)
        if said.status_code == 200:
            assert line.endswith(f'"answer": {said.text}}}')
            answered += 1
        else:
            assert row["error"] == said.json()["detail"]
            assert row["answer"] is None
    assert answered == (6 if "--resize" in options else 5)


def test_transparent_and_16_bit_files_are_answered_as_by_the_server(url: str, zoo: Path, tmp_path: Path) -> None:
    random, folder = np.random.default_rng(6), tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 2), np.uint8)).save(folder / "clear.png")
    Image.fromarray(random.integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)).save(folder / "deep.tif")
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    for colour, status in (("#808080", 0), ("808080", 0), ("#ff0000", 2)):
        options = ["--background", colour, "--epsilon", "0"]
        assert predict(folder, "--model", zoo / "grey", "--jsonl", here, *options).exit_code == status
        assert predict(folder, "--server", url, "--jsonl", there, *options).exit_code == status
        assert here.read_bytes() == there.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        predict(folder, "--background", "white")


def test_the_table_has_one_row_for_each_file_sorted_without_clutter(
    url: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures.parent)
    result = predict("pictures", "--server", url)
    assert result.exit_code == 2
    shown = [line for line in result.output.splitlines() if not line.startswith("error: ")]
    head, *rows, counted, caution = shown
    assert head.split() == ["file", "label", "radius", "certified", "runner-up"]
    names = [row.removeprefix("pictures/").split("  ")[0] for row in rows]
    assert names == ["a.png", "array.npy", "b.png", "broken.png", "large.png", 'sub/=odd, "name"?[1m.png', "sub/c.bmp"]
    column = head.index("certified")
    assert [row[column:].split()[0] for row in rows if "error: " not in row] == ["yes"] * 5
    assert "\x1b" not in result.output
    assert counted == "7 files: 5 certified, 0 abstained, 2 not answered"
    assert caution == ("A certified answer of grey is stable, not necessarily right: its card states no accuracy.")
    reported = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1].rpartition("/")[2] for line in reported] == ["broken.png", "large.png"]


def test_the_default_model_answers_and_its_card_says_how_often_it_is_right() -> None:
    result = predict(ROOT / "service/static/samples/mnist-7.png", "--counterfactual", "--epsilon", "1")
    assert result.exit_code == 0
    head, row, _, caution = result.output.splitlines()
    assert head.split()[1:] == ["label", "radius", "certified", "runner-up", "robust", "other", "distance"]
    assert row.split()[1:] == ["7", "3.1068", "yes", "9", "yes", "9", "3.5301"]
    assert caution.endswith("mnist is stable, not necessarily right: it is right on 98.40% of its test images.")


def test_a_csv_file_has_every_float_to_the_last_bit(url: str, pictures: Path, tmp_path: Path) -> None:
    out, exact = tmp_path / "out.csv", tmp_path / "out.jsonl"
    saved = tmp_path / "saved"
    result = predict(pictures, "--server", url, "--csv", out, "--counterfactual", "--save", saved)
    assert result.output.count("\n") == 4
    predict(pictures, "--server", url, "--jsonl", exact, "--counterfactual", "--save", saved)
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert len(rows) == 7
    for row, line in zip(rows, lines(exact), strict=True):
        assert (row["file"], row["error"]) == (line["file"], line["error"] or "")
        if line["answer"] is None:
            assert {row[name] for name in list(COLUMNS)[2:]} == {""}
            continue
        answer, certificate = line["answer"], line["answer"]["certificate"]
        assert float(row["radius"]) == certificate["radius"]
        assert (row["label"], row["certified"]) == (answer["label"], json.dumps(certificate["certified"]))
        assert float(row["counterfactual_distance"]) == answer["counterfactual"]["distance"]
        assert row["counterfactual_file"] == line["counterfactual_file"]
        content = Path(row["counterfactual_file"]).read_bytes()
        assert base64.b64encode(content).decode() == answer["counterfactual"]["image"]
        said = httpx.post(f"{url}/predict", content=content, headers={"Content-Type": "image/png"}).json()
        assert said["label"] == row["counterfactual_label"]
    assert len(list(saved.iterdir())) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.jsonl", "pictures", "saved"]


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_a_parquet_file_has_the_rows_with_their_types(url: str, pictures: Path, tmp_path: Path) -> None:
    parquet = importlib.import_module("pyarrow.parquet")
    out, exact = tmp_path / "out.parquet", tmp_path / "out.jsonl"
    predict(pictures, "--server", url, "--parquet", out)
    predict(pictures, "--server", url, "--jsonl", exact)
    table = parquet.read_table(out).to_pydict()
    assert list(table) == list(COLUMNS)
    assert table["file"] == [line["file"] for line in lines(exact)]
    assert table["radius"] == [line["answer"] and line["answer"]["certificate"]["radius"] for line in lines(exact)]
    assert set(map(type, table["certified"])) == {bool, type(None)}


def test_parquet_without_pyarrow_says_what_to_install(
    url: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pyarrow" else find(name, *a))
    result = predict(pictures, "--server", url, "--parquet", tmp_path / "out.parquet")
    assert result.exit_code == 2
    assert "pip install 'pyarrow'" in result.output
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(("words", "library"), [(["--server", "http://127.0.0.1:1"], "httpx"), ([], "onnxruntime")])
def test_a_missing_library_is_a_sentence(words: list[str], library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == library else find(name, *a))
    result = predict("a.png", *words)
    assert result.exit_code == 2
    assert f"needs {library}, which is not installed: `pip install 'lipcert[" in result.output


def test_exit_status_tells_small_radii_abstentions_and_failures_apart(tmp_path: Path) -> None:
    # f_0 - f_1 = 2 (x - 1/2) on one pixel: the radius is |x - 1/2|, and 128 / 255 is 1/510 above.
    builders.write(
        tmp_path / "one", builders.linear(np.array([[1.0], [-1.0]]), np.array([-0.5, 0.5]), (1, 1, 1)), "one"
    )
    builders.write(tmp_path / "tie", builders.linear(np.array([[1.0], [1.0]]), np.zeros(2), (1, 1, 1)), "tie")
    for value in (0, 255, 128):
        Image.new("L", (1, 1), value).save(tmp_path / f"{value}.png")
    files = [tmp_path / "0.png", tmp_path / "255.png"]
    one = ["--model", tmp_path / "one"]
    assert predict(*files, *one).exit_code == 0
    assert predict(*files, *one, "--min-radius", "0.49").exit_code == 0
    assert predict(*files, tmp_path / "128.png", *one).exit_code == 0
    below = predict(*files, tmp_path / "128.png", *one, "--min-radius", "0.25")
    assert below.exit_code == 1
    assert "3 files: 3 certified, 1 of them below 0.25, 0 abstained, 0 not answered" in below.output
    tie = predict(files[0], "--model", tmp_path / "tie")
    assert tie.exit_code == 1
    assert "1 files: 0 certified, 1 abstained" in tie.output
    missing = predict(*files, tmp_path / "missing.png", *one, "--min-radius", "5")
    assert missing.exit_code == 2
    assert "missing.png: it cannot be read (No such file or directory)" in missing.output
    assert "3 files: 2 certified, 2 of them below 5, 0 abstained, 1 not answered" in missing.output


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--save", "x"], "add --counterfactual"),
        (["--strength", "2"], "strength is that of the counterfactual"),
        (["--path", "3"], "path leads to the counterfactual"),
        (["--counterfactual", "--strength", "9"], "--strength: Input should be less than or equal to 3"),
        (["--counterfactual", "--path", "1"], "--path: Input should be greater than or equal to 2"),
        (["--api-key-file", "x"], "for --server"),
        (["--model", "missing"], "card.json"),
        (["--csv", "."], "not a regular file"),
        (["--csv", "/dev/null"], "not a regular file"),
        (["--csv", "missing/out.csv"], "the output cannot be written"),
        (["--server", "localhost:8000"], "not the URL of a service"),
        (["--server", "http://127.0.0.1:1", "--api-key-file", "missing"], "No such file"),
    ],
)
def test_a_command_that_cannot_run_is_one_sentence_and_status_2(
    words: list[str], reason: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--model" not in words and "--server" not in words:
        words = [*words, "--model", str(zoo / "grey")]
    result = predict("a.png", *words)
    assert result.exit_code == 2
    assert reason in result.output
    assert result.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [[], ["a", "--csv", "b", "--jsonl", "c"], ["a", "--epsilon", "nan"], ["a", "--min-radius=-1"]]
)
def test_options_that_are_not_valid_end_with_status_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        predict(*words)
    assert stopped.value.code == 2


def test_patterns_are_expanded_and_folders_without_files_are_reported(url: str, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    (pictures / "empty").mkdir()
    words = [pictures / "*.png", pictures / "**" / "*.bmp", pictures / "empty", pictures / "*.tif", pictures / "b.png"]
    assert predict(*words, "--server", url, "--jsonl", out).exit_code == 2
    found = [Path(row["file"]).relative_to(pictures).as_posix() for row in lines(out)]
    assert found == ["a.png", "b.png", "broken.png", "large.png", "sub/c.bmp", "empty", "*.tif", "b.png"]
    assert [row["error"] for row in lines(out)][-3:-1] == [
        "it cannot be read (Is a directory)",
        "it cannot be read (No such file or directory)",
    ]


def test_pipes_and_huge_files_are_rows_and_nothing_blocks(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIPCERT_MAX_BODY_BYTES", "1000")
    monkeypatch.setenv("LIPCERT_MAX_PIXELS", "100")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge.png").write_bytes(bytes(1001))
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("L", (11, 11)).save(tmp_path / "pixels.png")
    out = tmp_path / "out.jsonl"
    names = ["pipe", "huge.png", "empty.png", "pixels.png"]
    assert predict(*(tmp_path / name for name in names), "--model", zoo / "grey", "--jsonl", out).exit_code == 2
    errors = [row["error"] for row in lines(out)]
    assert errors[0] == "it is not a regular file"
    assert errors[1] == "it has 1001 bytes, and at most 1000 are read"
    assert errors[2] == "the file is empty"
    assert "11 x 11 = 121 pixels" in errors[3]


def test_an_output_file_is_replaced_only_when_it_is_complete(zoo: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("old")
    failing = f"""
import sys
from service.sheets import in_process
def interrupted(self, content):
    raise KeyboardInterrupt
in_process.InProcess.answer = interrupted
from lipcert.__main__ import main
sys.exit(main(["predict", {str(pictures)!r}, "--model", {str(zoo / "grey")!r}, "--csv", {str(out)!r}]))
"""
    result = subprocess.run(
        [sys.executable, "-c", failing], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 130, result.stderr
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.name != "pictures"] == ["out.csv"]
    predict(pictures, "--model", zoo / "grey", "--csv", out)
    assert out.read_text().startswith("file,error,model")
    assert out.stat().st_mode & 0o777 == 0o644


def test_an_interrupt_does_not_wait_for_pauses(url: str, pictures: Path, tmp_path: Path) -> None:
    described = [response("200 OK", httpx.get(f"{url}{path}").content) for path in ("/models", "/models/grey")]
    busy = problem("503 Service Unavailable", "overloaded", "Retry-After: 25")
    with ScriptedServer(*described, busy) as server:
        command = [sys.executable, "-m", "lipcert", "predict", str(pictures), "--server", server.url]
        command += ["--csv", str(tmp_path / "out.csv")]
        # A shell ignores the signal for what it runs in the background, and so for all that it starts.
        heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
            wait_until(lambda: len(server.requests) > 3)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=10)
    assert process.returncode == 130
    assert error == "interrupted; no output file was written\n"
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_one_unexpected_error_loses_no_row(
    zoo: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.sheets import in_process

    answer = in_process.InProcess.answer
    calls = iter(range(100))

    def once(self: Any, content: bytes) -> Any:
        if next(calls) == 0:
            raise RuntimeError("boom")
        return answer(self, content)

    monkeypatch.setattr(in_process.InProcess, "answer", once)
    out = tmp_path / "out.jsonl"
    assert predict(pictures / "b.png", pictures / "a.png", "--model", zoo / "grey", "--jsonl", out).exit_code == 2
    assert sorted(str(row["error"]) for row in lines(out)) == ["None", "unexpected RuntimeError: boom"]


def test_a_server_that_is_gone_or_another_is_a_sentence(pictures: Path, tmp_path: Path) -> None:
    html = response("200 OK", b"<html>", media_type="text/html")
    with ScriptedServer(html) as server:
        result = predict(pictures, "--server", server.url)
    assert result.exit_code == 2
    assert "not an answer of this service: text/html" in result.output
    assert result.output.count("\n") == 1


def test_the_model_of_a_server_is_chosen_by_name_and_the_key_comes_from_a_file(
    classifiers: Mapping[str, Classifier], pictures: Path, tmp_path: Path
) -> None:
    from service.access.keys import new_key

    key, line = new_key("test", ["predict"])
    (tmp_path / "key").write_text(f"{key}\n")
    with LiveServer(create_app(Settings(default_model="grey", api_keys=line), classifiers)) as server:
        url = f"http://127.0.0.1:{server.port}"
        refused = predict(pictures / "a.png", "--server", url)
        assert refused.exit_code == 2
        assert "401 Unauthorized" in refused.output
        keyed = ["--server", url, "--api-key-file", tmp_path / "key"]
        assert predict(pictures / "a.png", *keyed).exit_code == 0
        assert "answer of binary is stable" in predict(pictures / "a.png", *keyed, "--model", "binary").output
        assert "there is no model 'x'" in predict(pictures / "a.png", *keyed, "--model", "x").output


def test_a_server_that_ends_in_the_middle_leaves_a_row_for_every_file(
    url: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.client import retries

    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.001)
    described = [response("200 OK", httpx.get(f"{url}{path}").content) for path in ("/models", "/models/grey")]
    with ScriptedServer(*described, b"") as server:
        out = tmp_path / "out.jsonl"
        result = predict(*[pictures / "a.png"] * 40, "--server", server.url, "--jsonl", out)
        assert result.exit_code == 2
        assert len(lines(out)) == 40
        assert lines(out)[-1]["error"] == "it was not sent: the server could no longer be reached"
        # Two descriptions, and five tries for each of the files that were under way.
        assert len(server.requests) <= 2 + 5 * 24


def test_progress_is_shown_on_a_terminal_alone(
    url: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.sheets import command

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(command, "_PROGRESS_S", 0.001)
    # The server, in this process, has started its threads afterwards.
    assert "\r" not in predict(pictures, "--server", url, "--csv", tmp_path / "out.csv").output
    started = threading.active_count()
    error = Terminal()
    monkeypatch.setattr(sys, "stderr", error)
    assert main(["predict", str(pictures), "--server", url, "--csv", str(tmp_path / "out.csv")]) == 2
    assert " of 7 files, " in error.getvalue()
    assert error.getvalue().endswith("\r\x1b[K")
    assert threading.active_count() == started


def test_the_shown_radius_is_never_larger_than_the_radius() -> None:
    assert rounded_down(0.00009999) == "0.0000"
    assert rounded_down(1.99999999) == "1.9999"
    assert rounded_down(0.3) == "0.2999"
    assert rounded_down(0.0) == "0.0000"
    assert rounded_down(1e300) == "99999.9999"
    assert rounded_down(float("nan")) == "nan"


def test_a_counterfactual_that_cannot_be_written_is_an_error_beside_the_answer(
    url: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.sheets import command

    def full(path: Path, write: Any) -> None:
        raise OSError(28, "No space left on device")

    long = pictures / f"{'ä' * 120}.png"
    long.write_bytes((pictures / "a.png").read_bytes())
    words = [long, "--server", url, "--counterfactual", "--save", tmp_path / "saved"]
    assert predict(*words).exit_code == 0
    assert len(list((tmp_path / "saved").iterdir())) == 1
    monkeypatch.setattr(command, "write_atomically", full)
    result = predict(*words)
    assert result.exit_code == 2
    assert "its counterfactual cannot be written" in result.output
    assert "No space left" in result.output
    assert "1 files: 0 certified, 0 abstained, 1 not answered" in result.output


def test_a_closed_pipe_ends_the_command_quietly(url: str, pictures: Path) -> None:
    command = f"{sys.executable} -m lipcert predict {' '.join([str(pictures / 'a.png')] * 50)} --server {url}"
    result = subprocess.run(
        ["bash", "-c", f"{command} | head -1"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.stdout.startswith("file")
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


def test_help_states_the_exit_statuses_and_loads_nothing_large() -> None:
    code = """
import sys
from lipcert.__main__ import main
try:
    main(["predict", "--help"])
finally:
    assert not {"numpy", "onnx", "onnxruntime", "pydantic", "httpx"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Exit status: 0 every file is answered; 1 " in " ".join(result.stdout.split())


def test_with_a_server_nothing_of_the_runtime_is_loaded(url: str, pictures: Path) -> None:
    code = f"""
import sys
from lipcert.__main__ import main
status = main(["predict", {str(pictures / "a.png")!r}, "--server", {url!r}])
assert not {{"onnx", "onnxruntime", "fastapi", "numpy"}} & set(sys.modules), set(sys.modules)
sys.exit(status)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
