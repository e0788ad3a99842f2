"""Answers and errors as Arrow tables; the columns have the names of `lipcert predict`."""

from __future__ import annotations

import importlib
import itertools
import json
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from service.api.answers import image_bytes, in_columns
from service.api.schema import Options
from service.artefact.files import write_atomically
from service.inference.classifier import Classifier
from service.inference.outcome import Outcome
from service.pixels.images import image_digests

arrow: Any = importlib.import_module("pyarrow")
parquet: Any = importlib.import_module("pyarrow.parquet")

GRID = 100
"""Radii are counted in steps of 1 / GRID."""
_RECORD = b"lipcert"
_REPEATED = ["file", "digest", "class_id", "label", "runner_up", "proof", "lipschitz_bound", "logit_error"]
"""Columns that are written with a dictionary: values of the others are nearly all different."""
_SOURCE = {"row": "int64", "file": "string", "item": "string", "key": "string"}
_ANSWER = {
    "digest": "names",
    "class_id": "int64",
    "label": "names",
    "radius": "float64",
    "certified": "bool_",
    "runner_up": "names",
    "proof": "string",
    "lipschitz_bound": "float64",
    "logit_error": "float64",
    "logits": "numbers",
    "image_digest": "string",
    "resized": "bool_",
}
_NUMBERS = ("class_id", "radius", "certified", "runner_up", "lipschitz_bound", "logit_error", "logits")
"""Columns that `in_columns` gives."""
_EPSILON = {"epsilon": "float64", "robust_at_epsilon": "bool_"}
_COUNTERFACTUAL = {
    "counterfactual": "binary",
    "counterfactual_label": "names",
    "counterfactual_distance": "float64",
    "counterfactual_reached": "bool_",
}
_NOVELTY = {"novel": "bool_", "novelty_radius": "float64"}


class Origin(NamedTuple):
    """Where an input is."""

    row: int
    """Its number among all inputs of the run."""
    file: str
    item: str | None
    key: str | None


class Record(NamedTuple):
    """Counts of one part, stored in the file of its answers."""

    run: str
    """Digest of the manifest."""
    part: int
    answered: int
    errors: int
    certified: int
    robust: int
    """Answers with `robust_at_epsilon`."""
    radii: dict[str, int]
    """Certified answers by their radius in steps of 1 / GRID, rounded down."""


def answer_schema(options: Options) -> Any:
    """Return the columns of answers."""
    columns = {**_SOURCE, **_ANSWER}
    if options.epsilon is not None:
        columns |= _EPSILON
    if options.coverage is not None:
        columns |= {"set": "texts"}
    if options.max_error is not None:
        columns |= {"decision": "string"}
    if options.counterfactual:
        columns |= _COUNTERFACTUAL
    if options.novelty:
        columns |= _NOVELTY
    types = {
        "names": arrow.dictionary(arrow.int32(), arrow.string()),
        "numbers": arrow.list_(arrow.float64()),
        "texts": arrow.list_(arrow.string()),
    }
    return arrow.schema([(name, types.get(kind) or getattr(arrow, kind)()) for name, kind in columns.items()])


class Answers(NamedTuple):
    """Answers about images of one shape."""

    origins: Sequence[Origin]
    values: Mapping[str, np.ndarray | list[Any]]
    """Columns, one value for each origin; classes as their numbers."""


def answers(outcome: Outcome[Options], origins: Sequence[Origin]) -> Answers:
    """Return the columns of the answers about images of one shape, but for those of the origins.

    Args:
        outcome: of these images.
        origins: one for each image.
    """
    classifier, options = outcome.classifier, outcome.options
    found = in_columns(outcome)
    labels, count = classifier.labels, len(origins)
    values: dict[str, np.ndarray | list[Any]] = {
        **{name: found[name] for name in _NUMBERS},
        "label": found["class_id"],
        "proof": found["proof"].tolist(),
        "image_digest": image_digests(outcome.image_NCHW),
        "resized": np.full(count, outcome.image_NCHW.shape[2:] != classifier.input_shape[1:]),
    }
    if options.epsilon is not None:
        values["epsilon"] = np.full(count, options.epsilon)
        values["robust_at_epsilon"] = found["certified"] & (options.epsilon <= found["radius"])
    if options.coverage is not None:
        values["set"] = [[labels[k] for k in np.flatnonzero(row_K)] for row_K in found["set"]]
    if options.max_error is not None:
        values["decision"] = found["decision"].tolist()
    if options.counterfactual:
        values["counterfactual"] = [image_bytes(pixels_CHW)[0] for pixels_CHW in found["counterfactual"]]
        values["counterfactual_label"] = found["counterfactual_class_id"]
        values |= {name: found[name] for name in ("counterfactual_distance", "counterfactual_reached")}
    if options.novelty:
        values |= {name: found[name] for name in _NOVELTY}
    return Answers(origins, values)


def answer_table(batches: Sequence[Answers], classifier: Classifier, schema: Any) -> Any:
    """Return the table of the answers of a part, by row.

    Args:
        batches: of `answers`, in any order.
        classifier: the model.
        schema: of `answer_schema`.
    """
    if not batches:
        return schema.empty_table()
    origins = [origin for batch in batches for origin in batch.origins]
    values: dict[str, Any] = _sources(origins)
    for name in batches[0].values:
        parts = [batch.values[name] for batch in batches]
        values[name] = list(itertools.chain(*parts)) if isinstance(parts[0], list) else np.concatenate(parts)
    for name in values.keys() & {"label", "runner_up", "counterfactual_label"}:
        values[name] = _names(values[name], classifier.labels)
    values["digest"] = _names(np.zeros(len(origins), np.int32), [classifier.digest])
    values["logits"] = _lists(values["logits"])
    table = _table(values, schema)
    return table if all(map(operator.lt, values["row"], values["row"][1:])) else table.sort_by("row")


def write_part(folder: Path, record: tuple[str, int], table: Any, failures: Sequence[tuple[Origin, str]]) -> Record:
    """Write the results of one part; its file of answers, which also a part without answers has, makes it complete.

    Args:
        folder: of the results.
        record: digest of the manifest, and number of the part.
        table: of `answer_table`.
        failures: inputs without an answer.

    Raises:
        OSError: a file cannot be written; the part is not complete.
    """
    run, part = record
    certified_N = table["certified"].to_numpy().astype(np.bool_)
    # The number of steps at most as large as the radius, exactly: a product would be rounded.
    radii_N = table["radius"].to_numpy()[certified_N]
    steps = np.arange(int(radii_N.max(initial=0.0) * GRID) + 2) / GRID
    counts = Counter((np.searchsorted(steps, radii_N, "right") - 1).tolist())
    at_epsilon = "robust_at_epsilon"
    robust = int(np.count_nonzero(table[at_epsilon].to_numpy())) if at_epsilon in table.column_names else 0
    radii = {str(step): count for step, count in sorted(counts.items())}
    result = Record(run, part, len(table), len(failures), int(certified_N.sum()), robust, radii)
    target = errors_path(folder, part)
    if failures:
        origins = [origin for origin, _ in failures]
        values = {**_sources(origins), "error": [_text(reason) for _, reason in failures]}
        error_schema = arrow.schema([(name, getattr(arrow, kind)()) for name, kind in _SOURCE.items()])
        wrong = _table(values, error_schema.append(arrow.field("error", arrow.string())))
        write_atomically(target, lambda file: parquet.write_table(wrong.sort_by("row"), file))
    else:
        # Of an earlier attempt that ended between the two files.
        target.unlink(missing_ok=True)
    marked = table.replace_schema_metadata({_RECORD: json.dumps(result)})
    write_atomically(answers_path(folder, part), lambda file: parquet.write_table(marked, file, **_writing(table)))
    return result


def read_record(path: Path) -> Record:
    """Return the record of a file of answers.

    Raises:
        OSError, ValueError: the file is damaged or was written by something else.
    """
    metadata: Mapping[bytes, bytes] = parquet.read_schema(path).metadata or {}
    if _RECORD not in metadata:
        raise ValueError("it was not written by lipcert certify-images")
    return Record(*json.loads(metadata[_RECORD]))


def answers_path(folder: Path, part: int) -> Path:
    """Return the file of the answers of a part."""
    return folder / "answers" / f"part-{part:06d}.parquet"


def errors_path(folder: Path, part: int) -> Path:
    """Return the file of the inputs of a part without an answer; it exists where there are some."""
    return folder / "errors" / f"part-{part:06d}.parquet"


def _sources(origins: Sequence[Origin]) -> dict[str, Any]:
    rows, files, items, keys = zip(*origins, strict=True)
    return {"row": rows, "file": _texts(files), "item": _texts(items), "key": _texts(keys)}


def _texts(texts: Sequence[str | None]) -> list[str | None]:
    return [text if text is None or text.isascii() else _text(text) for text in texts]


def _text(text: str) -> str:
    """Return text that can be written in UTF-8; a name of a file may hold any bytes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _writing(table: Any) -> dict[str, Any]:
    """Return the options of a file; to compress logits, or dictionaries of all columns, would take much longer."""
    fields = [field for field in table.schema if field.name != "logits"]
    compressed = [f"{field.name}.list.element" if arrow.types.is_list(field.type) else field.name for field in fields]
    return {
        "use_dictionary": _REPEATED,
        "compression": dict.fromkeys(compressed, "zstd"),
        "compression_level": dict.fromkeys(compressed, 1),
    }


def _names(index_N: np.ndarray, names: Sequence[str]) -> Any:
    return arrow.DictionaryArray.from_arrays(index_N.astype(np.int32), list(names))


def _lists(values_NK: np.ndarray) -> Any:
    offsets = np.arange(len(values_NK) + 1, dtype=np.int32) * values_NK.shape[1]
    return arrow.ListArray.from_arrays(offsets, np.ascontiguousarray(values_NK).ravel())


def _table(values: Mapping[str, Any], schema: Any) -> Any:
    return arrow.table(
        [arrow.array(values[name]) if isinstance(values[name], np.ndarray) else values[name] for name in schema.names],
        schema=schema,
    )
