"""Bulk certification: `python benchmarks/bulk.py [throughput|memory|kills ...] [--images N] [--processes P]`.

* `throughput`: images per second of the command and of ONNX Runtime alone, in turns, from the first part of the last
  process to start to the last part. ONNX Runtime alone runs `model.onnx` on batches of 256 float64 images that are in
  memory already, in as many processes, one thread each.
* `memory`: largest resident memory of the driver and of a process, for 10,000 images and for N.
* `kills`: N images, the driver killed at a third, a process killed at two thirds; then rows that are missing, doubled
  or different from `POST /predict` about the same image (`--checked` of them, evenly spaced).

Images are the samples of the model with random changes. N = 20,000 takes some minutes of two cores, and
`--images 1000000` an hour and 2 GB in `--folder`.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from service.api.schema import Options  # noqa: E402
from service.artefact.card import read_card  # noqa: E402
from service.artefact.files import CARD_FILE, MODEL_FILE, file_digest  # noqa: E402
from service.bulk.containers import Reading  # noqa: E402
from service.bulk.listing import write_listing  # noqa: E402
from service.bulk.local import run_locally  # noqa: E402
from service.bulk.work import Job  # noqa: E402
from service.client import Client  # noqa: E402
from service.pixels.images import decode_image, encode_png  # noqa: E402

BATCH = 256
SMALL = 10_000
CHUNK = 4096
FORMATS = ("npy", "lists.parquet", "png.parquet")


def images(model: Path, count: int) -> Iterator[np.ndarray]:
    """Yield chunks of images, uint8, N x C x H x W: samples of the model with random changes of at most 20 of 255."""
    random = np.random.default_rng(0)
    samples = np.stack([decode_image(path.read_bytes(), 1 << 24) for path in sorted(model.glob("samples/*.png"))])
    for first in range(0, count, CHUNK):
        chosen = samples[random.integers(len(samples), size=min(CHUNK, count - first))].astype(np.int16)
        yield np.clip(chosen + random.integers(-20, 21, chosen.shape, dtype=np.int16), 0, 255).astype(np.uint8)


def make(model: Path, count: int, file: Path) -> Path:
    """Write the images into a file of one of `FORMATS`, unless it is there."""
    if file.exists():
        return file
    unfinished = file.with_name(f"{file.name}.part")
    shape = read_card(model).input.shape
    if file.suffix == ".npy":
        array = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (count, *shape))
        for number, chunk in enumerate(images(model, count)):
            array[number * CHUNK : number * CHUNK + len(chunk)] = chunk
        array.flush()
    else:
        size = int(np.prod(shape))
        lists = file.name.endswith(FORMATS[1])
        schema = pa.schema([("image", pa.list_(pa.uint8(), size) if lists else pa.binary())])
        with pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
            for chunk in images(model, count):
                flat = pa.FixedSizeListArray.from_arrays(pa.array(chunk.ravel()), size)
                column = flat if lists else pa.array([encode_png(one) for one in chunk])
                writer.write_table(pa.table({"image": column}, schema=schema))
    return unfinished.replace(file)


def alone(model: Path, count: int, seed: int, barrier: Barrier, rates: Any) -> None:
    """Run ONNX Runtime alone on `count` images; put the rate of this process."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model / MODEL_FILE), options, providers=["CPUExecutionProvider"])
    shape = read_card(model).input.shape
    # Different images each time, as the command has them.
    batches = np.random.default_rng(seed).integers(0, 256, (16, BATCH, *shape)) / 255.0
    session.run(None, {"image": batches[0]})
    barrier.wait()
    started = time.monotonic()
    for number in range(max(1, count // BATCH)):
        session.run(None, {"image": batches[number % 16]})
    rates.put(max(1, count // BATCH) * BATCH / (time.monotonic() - started))


def raw_rate(model: Path, count: int, processes: int) -> float:
    """Return images per second of ONNX Runtime alone, in all processes together."""
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(processes), context.Queue()
    runs = [
        context.Process(target=alone, args=(model, count // processes, seed, barrier, rates))
        for seed in range(processes)
    ]
    for run in runs:
        run.start()
    found = [rates.get() for _ in runs]
    for run in runs:
        run.join()
    return sum(found)


def bulk_rate(model: Path, file: Path, processes: int, part_rows: int) -> float:
    """Return images per second of the command, behind the first part of every process."""
    with tempfile.TemporaryDirectory(dir=file.parent) as name:
        out = Path(name)
        for table in ("answers", "errors"):
            (out / table).mkdir()
        reading = Reading(read_card(model).input.shape, None, 1 << 24)
        listing = io.BytesIO()
        write_listing(listing, [str(file)], reading, part_rows)
        digests = file_digest(model / MODEL_FILE), file_digest(model / CARD_FILE)
        job = Job("sha256:", model, digests, Options(), reading, out)
        lines = iter(listing.getvalue().decode().splitlines(keepends=True))
        ends = [(time.monotonic(), record.answered + record.errors) for record in run_locally(job, lines, processes)]
    started, _ = ends[processes - 1]
    # The last parts of a run are not computed by all processes.
    last = len(ends) - processes
    return sum(rows for _, rows in ends[processes : last + 1]) / (ends[last][0] - started)


def throughput(model: Path, folder: Path, count: int, processes: int, rounds: int) -> None:
    """Print the rates, in turns."""
    part_rows = max(64, min(CHUNK, count // (10 * processes)))
    for kind in FORMATS:
        file = make(model, count, folder / f"{model.name}-{count}.{kind}")
        pairs: list[tuple[float, float]] = []
        for number in range(rounds):
            pairs.append((raw_rate(model, count, processes), bulk_rate(model, file, processes, part_rows)))
            raw, bulk = pairs[-1]
            print(
                f"{kind}, round {number + 1}: ONNX Runtime {raw:.0f}, certified {bulk:.0f} images/s, {bulk / raw:.3f}"
            )
        raw, bulk = (float(np.median(column)) for column in zip(*pairs, strict=True))
        ratio = float(np.median([pair[1] / pair[0] for pair in pairs]))
        print(f"{kind}: medians {raw:.0f} and {bulk:.0f} images/s, median ratio {ratio:.3f}", flush=True)


def command(model: Path, file: Path, out: Path, processes: int) -> list[str]:
    """Return the words of the command."""
    words = ["certify-images", file, "--model", model, "--out", out, "--processes", processes]
    return [sys.executable, "-m", "lipcert", *map(str, words)]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    """Start a command of this checkout, with its output thrown away."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def workers_of(pid: int) -> list[int]:
    """Return the processes of a driver that certify."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "spawn_main" in line]


def peaks(words: list[str]) -> tuple[float, float]:
    """Run a command; return the largest resident memory of the driver and of a process that certifies, in MB."""
    driver, largest = start(words), [0.0, 0.0]
    while driver.poll() is None:
        for place, pids in enumerate(([driver.pid], workers_of(driver.pid))):
            for pid in pids:
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                found = re.search(r"VmHWM:\s+(\d+) kB", status)
                largest[place] = max(largest[place], int(found[1]) / 1000 if found else 0.0)
        time.sleep(0.05)
    assert driver.returncode == 0
    return largest[0], largest[1]


def memory(model: Path, folder: Path, count: int, processes: int) -> None:
    """Print the largest resident memory for few and for many images."""
    for kind in FORMATS:
        found: list[float] = []
        for images_ in (SMALL, count):
            file, out = make(model, images_, folder / f"{model.name}-{images_}.{kind}"), folder / "memory"
            driver, worker = peaks(command(model, file, out, processes))
            shutil.rmtree(out)
            found.append(driver + processes * worker)
            print(f"{kind}, {images_} images: driver {driver:.0f} MB, each process {worker:.0f} MB at most")
        print(f"{kind}: {count} images take {found[1] / found[0] - 1.0:+.1%} of the memory of {SMALL}", flush=True)


def kills(model: Path, folder: Path, count: int, processes: int, checked: int) -> None:
    """Print what two kills have changed."""
    file, out = make(model, count, folder / f"{model.name}-{count}.npy"), folder / "kills"
    shutil.rmtree(out, ignore_errors=True)
    words, parts = command(model, file, out, processes), -(-count // CHUNK)

    def wait(done: int, driver: subprocess.Popen[bytes]) -> None:
        while driver.poll() is None and len(list(out.glob("answers/part-*"))) < done:
            time.sleep(0.01)

    driver = start(words)
    wait(parts // 3, driver)
    driver.kill()
    driver.wait()
    print(f"driver killed with {len(list(out.glob('answers/part-*')))} of {parts} parts")
    driver = start(words)
    wait(2 * parts // 3, driver)
    if victims := workers_of(driver.pid):
        os.kill(victims[0], signal.SIGKILL)
    print(f"process {'killed' if victims else 'NOT killed'} with {len(list(out.glob('answers/part-*')))} parts")
    assert driver.wait() == 0
    table = pyarrow.dataset.dataset(out / "answers").to_table().sort_by("row")
    rows = table["row"].to_numpy()
    doubled = len(rows) - len(np.unique(rows))
    print(f"{len(np.setdiff1d(np.arange(count), rows))} rows missing, {doubled} doubled", flush=True)
    array = np.load(file, mmap_mode="r")
    differing = 0
    with Served(model) as client:
        for place in np.linspace(0, count - 1, min(count, checked)).astype(int):
            answer, row = client.predict(array[place]), table.slice(place, 1).to_pylist()[0]
            said = (answer.digest, answer.class_id, answer.logits, answer.certificate.radius, answer.image.digest)
            kept = (row["digest"], row["class_id"], row["logits"], row["radius"], row["image_digest"])
            differing += said != kept
    print(f"{differing} of {min(count, checked)} different from POST /predict")
    shutil.rmtree(out)


class Served:
    """A server of the model, as a context that gives a client."""

    def __init__(self, model: Path) -> None:
        self._model = model

    def __enter__(self) -> Client:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "LIPCERT_PORT": str(port),
            "LIPCERT_MODELS": str(self._model.parent),
            "LIPCERT_DEFAULT_MODEL": self._model.name,
        }
        self._server = subprocess.Popen(
            [sys.executable, "-m", "service"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._client = Client(f"http://127.0.0.1:{port}")
        while self._server.poll() is None:
            try:
                self._client.models()
                break
            except Exception:
                time.sleep(0.2)
        return self._client

    def __exit__(self, *error: object) -> None:
        self._client.close()
        self._server.terminate()
        self._server.wait()


def main() -> None:
    """Run the measurements that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="throughput|memory|kills", help="default: all of them")
    parser.add_argument("--images", type=int, default=20_000, metavar="N")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "zoo" / "mnist", metavar="DIR")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="P")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checked", type=int, default=1000, help="answers that are compared with those of a server")
    parser.add_argument("--folder", type=Path, default=Path("build") / "bulk", help="for images; they are used again")
    chosen = parser.parse_args()
    folder, model = chosen.folder.absolute(), chosen.model.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    what = chosen.what or ["throughput", "memory", "kills"]
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, onnxruntime {onnxruntime.__version__}, {model.name}")
    if "throughput" in what:
        throughput(model, folder, chosen.images, chosen.processes, chosen.rounds)
    if "memory" in what:
        memory(model, folder, chosen.images, chosen.processes)
    if "kills" in what:
        kills(model, folder, chosen.images, chosen.processes, chosen.checked)


if __name__ == "__main__":
    main()
