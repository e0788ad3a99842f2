"""Blocks of a sparse matrix: sets of rows that share no column with other rows. Its norm is the largest of theirs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from service.audit.norms import require_block

# Blocks of more entries are not compared with others.
_COMPARED = 2_000_000


def taken(starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the positions of the entries of some rows, in their order."""
    lengths = starts[rows + 1] - starts[rows]
    ends = np.cumsum(lengths)
    return np.repeat(starts[rows] - (ends - lengths), lengths) + np.arange(int(ends[-1]) if len(ends) else 0)


def distinct_blocks(starts: np.ndarray, columns: np.ndarray, values: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """Yield the blocks as dense matrices without empty columns; of equal ones, the first.

    Args:
        starts: position of the first entry of each row, and the number of entries.
        columns: of the entries; different within a row.
        values: of the entries.
        width: number of columns.

    Raises:
        NotAuditableError: a block is too large.
    """
    rows = np.flatnonzero(np.diff(starts))
    if not len(rows):
        return
    label = _labels(starts[rows], columns, width)
    of_row = label[columns[starts[rows]]]
    order = np.argsort(of_row, kind="stable")
    bounds = np.flatnonzero(np.diff(of_row[order], prepend=-1, append=width))
    # Place of each column within its block.
    used = np.unique(columns)
    sorted_columns = used[np.argsort(label[used], kind="stable")]
    first = np.searchsorted(label[sorted_columns], np.arange(width + 1))
    place = np.zeros(width, dtype=np.int64)
    place[sorted_columns] = np.arange(len(used)) - first[label[sorted_columns]]
    seen: set[tuple[int, bytes, bytes, bytes]] = set()
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        block = rows[order[low:high]]
        entries = taken(starts, block)
        lengths = starts[block + 1] - starts[block]
        component = int(of_row[order[low]])
        n_columns = int(first[component + 1] - first[component])
        places, content = place[columns[entries]], values[entries]
        if len(bounds) > 2 and len(entries) <= _COMPARED:
            key = (n_columns, lengths.tobytes(), places.tobytes(), content.tobytes())
            if key in seen:
                continue
            seen.add(key)
        require_block(len(block), n_columns)
        dense = np.zeros((len(block), n_columns))
        dense[np.repeat(np.arange(len(block)), lengths), places] = content
        yield dense


def _labels(starts: np.ndarray, columns: np.ndarray, width: int) -> np.ndarray:
    """Return a label of each column, the same within a block: the least column that it is connected with."""
    label = np.arange(width, dtype=np.int32)
    lengths = np.diff(starts, append=len(columns))
    while True:
        lowest = np.minimum.reduceat(label[columns], starts)
        found = label.copy()
        np.minimum.at(found, columns, np.repeat(lowest, lengths))
        found = found[found]
        if np.array_equal(found, label):
            return label
        label = found
