"""Reader of TensorBoard event files."""

from __future__ import annotations

import struct
from pathlib import Path

from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog


def masked(record: bytes) -> bytes:
    checksum = crc32c(record)
    return struct.pack("<I", (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def events_in(folder: Path) -> list[Event]:
    """Return the events of all files, in order; a record is length, its checksum, the event, its checksum."""
    events: list[Event] = []
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            assert content[8:12] == masked(content[:8])
            record, content = content[12 : 12 + length], content[12 + length :]
            assert content[:4] == masked(record)
            content = content[4:]
            events.append(Event.FromString(record))
    return events


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Return the points of a curve that TensorBoard shows: a start removes those at its step and beyond."""
    shown: list[tuple[int, float]] = []
    for event in events_in(folder):
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            shown = [(step, value) for step, value in shown if step < event.step]
        shown += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
    return shown
