"""What the chaos run does to a server of several processes while it serves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clients import Clients, stall
from exchanges import Exchange
from judging import KEY_SLACK_S, Cause, Judge
from process_table import children_of, is_running

ARTEFACT_SLACK_S = 6.0
"""The server looks at the files every second; a busy machine, later."""
_PAUSE_S = 2.0
_READ_S = 60.0
_HANGS_S = 10.0
"""Silence after which the parent kills a process."""


@dataclass
class Target:
    """The server under test."""

    parent: int
    port: int
    models: Path
    keys: Path
    both_keys: str
    without_rotating: str
    full_disk: Path | None
    """Mount of the temporary folder of the server, small enough to be filled; null where it cannot be mounted."""

    @property
    def processes(self) -> list[int]:
        """Server processes that run."""
        return [pid for pid in children_of(self.parent) if is_running(pid) and not _reads(pid)]


class Disturbances:
    """Each method disturbs for some seconds, puts back what it changed, and tells the judge what that may cause."""

    def __init__(self, target: Target, clients: Clients, judge: Judge, body: Exchange, seed: int) -> None:
        """Disturb nothing yet.

        Args:
            target: the server.
            clients: started in numbers by the flood.
            judge: told of every cause.
            body: a request with a body, for clients that stall.
            seed: of the choices.
        """
        self._target = target
        self._clients = clients
        self._judge = judge
        self._body = body
        self._random = random.Random(seed)
        self.kills = 0
        """Server processes that were ended."""
        self._in_use: set[int] = set()
        self._files = asyncio.Lock()
        self._key_file = asyncio.Lock()

    @property
    def all(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """The disturbances by name."""
        found = {
            "kill -9 of a process": self.kill,
            "SIGTERM of a process": self.restart,
            "SIGSTOP and SIGCONT of a process": self.pause,
            "kill -9 of decoders": self.kill_decoders,
            "SIGSTOP and SIGCONT of a decoder": self.pause_decoder,
            "artefact changed": self.change_artefact,
            "artefact changed, process killed": self.change_artefact_and_kill,
            "SIGHUP": self.hang_up,
            "SIGHUP, artefact damaged": self.hang_up_damaged,
            "keys rotated": self.rotate_keys,
            "keys rotated, damaged, process killed": self.damage_keys,
            "flood": self.flood,
            "stalled bodies": self.stall_bodies,
            "process hangs": self.hang,
        }
        return found | ({"disk full": self.fill_disk} if self._target.full_disk else {})

    async def kill(self) -> None:
        """Kill a server process, and wait for its replacement."""
        await self._end(signal.SIGKILL)

    async def restart(self) -> None:
        """End a server process as a rolling restart does."""
        with self._judge.cause("not ready", slack_s=1.0):
            await self._end(signal.SIGTERM)

    async def pause(self) -> None:
        """Stop a server process for a while."""
        async with self._taken() as pid:
            with self._judge.cause("deadline", "not ready", "too-slow", slack_s=2.0), _stopped(pid):
                await asyncio.sleep(_PAUSE_S)

    async def hang(self) -> None:
        """Stop a server process until the parent kills it."""
        async with self._taken() as pid:
            # Before its first beat a process has minutes.
            await asyncio.sleep(_PAUSE_S)
            with _stopped(pid):
                await _until_stopped(pid)
                self._note_kill(pid)
                until_s = time.monotonic() + 3 * _HANGS_S
                while is_running(pid):
                    assert time.monotonic() < until_s, "a process that hangs was not killed"
                    await asyncio.sleep(0.1)
            await self._wait_for_all()

    async def kill_decoders(self) -> None:
        """Kill the decoders of a server process, or what starts them."""
        for _ in range(3):
            nurseries = children_of(self._any_process())
            decoders = [pid for nursery in nurseries for pid in children_of(nursery)]
            with self._judge.cause("too-costly", slack_s=0.5):
                for pid in nurseries if self._random.random() < 0.3 else decoders:
                    _signal(pid, signal.SIGKILL)
            await asyncio.sleep(0.3)

    async def pause_decoder(self) -> None:
        """Stop a decoder for a while."""
        decoders = [pid for nursery in children_of(self._any_process()) for pid in children_of(nursery)]
        if decoders:
            with _stopped(self._random.choice(decoders)):
                await asyncio.sleep(_PAUSE_S)

    async def change_artefact(self, meanwhile: Callable[[], Awaitable[None]] | None = None) -> None:
        """Flip a byte of a file of an artefact, in place or by another file, and put it back."""
        async with self._files:
            folder = self._random.choice(sorted(path for path in self._target.models.iterdir() if path.is_dir()))
            file = folder / self._random.choice(("model.onnx", "card.json"))
            whole = file.read_bytes()
            place = self._random.randrange(len(whole))
            damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
            with self._judge.cause("artefact-changed", "not ready", slack_s=ARTEFACT_SLACK_S):
                try:
                    if self._random.random() < 0.5:
                        file.write_bytes(damaged)
                    else:
                        _replace(file, damaged)
                    # A change counts when it is met again, a second later.
                    await _pause()
                    await (meanwhile or _pause)()
                finally:
                    _replace(file, whole)

    async def change_artefact_and_kill(self) -> None:
        """Kill a process while a file differs: its replacement must not serve the file."""
        await self.change_artefact(self.kill)

    async def hang_up(self) -> None:
        """Have the folder of models read again and again, though nothing has changed."""
        async with self._files:
            for _ in range(3):
                _signal(self._target.parent, signal.SIGHUP)
                await asyncio.sleep(0.3)
            await self._read_again()

    async def hang_up_damaged(self) -> None:
        """Have a damaged artefact read: the verified version goes on, also in a replacement of its process."""
        async with self._files:
            folder = self._random.choice(sorted(path for path in self._target.models.iterdir() if path.is_dir()))
            file = folder / self._random.choice(("model.onnx", "card.json"))
            whole = file.read_bytes()
            _replace(file, whole[: len(whole) // 2])
            try:
                await self._read_again()
                await self.kill()
                await asyncio.sleep(_PAUSE_S)
            finally:
                _replace(file, whole)
                await self._read_again()

    async def _read_again(self) -> None:
        """Send SIGHUP, and wait until the folder has been read."""
        _signal(self._target.parent, signal.SIGHUP)
        until_s = time.monotonic() + _READ_S
        quiet_s = time.monotonic() + _PAUSE_S
        # A second reading follows the first, and then every process.
        while time.monotonic() < quiet_s:
            if _is_reading(self._target.parent):
                assert time.monotonic() < until_s, "the folder of models is not read to its end"
                quiet_s = time.monotonic() + _PAUSE_S
            await asyncio.sleep(0.1)

    async def rotate_keys(self, meanwhile: Callable[[], Awaitable[None]] | None = None) -> None:
        """Revoke a key for a while."""
        async with self._key_file:
            with self._judge.cause("unauthorized", "rate-limit", slack_s=KEY_SLACK_S):
                _replace(self._target.keys, self._target.without_rotating.encode())
                revoked = Cause(frozenset(), time.monotonic() + KEY_SLACK_S)
                self._judge.revoked.append(revoked)
                try:
                    await asyncio.sleep(KEY_SLACK_S + _PAUSE_S)
                    await (meanwhile or _pause)()
                finally:
                    revoked.end_s = time.monotonic()
                    _replace(self._target.keys, self._target.both_keys.encode())
                    await asyncio.sleep(KEY_SLACK_S)

    async def damage_keys(self) -> None:
        """Revoke a key, damage the file, and kill a process."""

        async def damage() -> None:
            _replace(self._target.keys, b"steady predict scrypt:14:8:1:damaged\n")
            await self.kill()
            await asyncio.sleep(_PAUSE_S)

        await self.rotate_keys(damage)

    async def flood(self) -> None:
        """Start ten times as many clients, which then cut their connections."""
        with self._judge.cause("deadline", "not ready", slack_s=5.0):
            flood = self._clients.start(self._clients.usual * 10)
            await asyncio.sleep(2 * _PAUSE_S)
            for task in flood:
                task.cancel()

    async def stall_bodies(self) -> None:
        """Send half a body on many connections."""
        kinds = await asyncio.gather(*[stall(self._target.port, self._body) for _ in range(20)])
        # The process may be killed meanwhile.
        allowed = {"too-slow", "busy", "overloaded", "artefact-changed", "IncompleteReadError", "ConnectionResetError"}
        assert set(kinds) <= allowed, f"half a body was answered: {kinds}"

    async def fill_disk(self) -> None:
        """Fill the disk of the temporary folder, and kill a process."""
        assert self._target.full_disk is not None
        file = self._target.full_disk / "filled"
        try:
            with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(4096))
            await self.kill()
            await asyncio.sleep(_PAUSE_S)
        finally:
            file.unlink()

    def _any_process(self) -> int:
        return self._random.choice(self._target.processes)

    @contextlib.asynccontextmanager
    async def _taken(self) -> AsyncIterator[int]:
        """Choose a process that no other disturbance stops or ends."""
        while not (free := sorted(set(self._target.processes) - self._in_use)):
            await asyncio.sleep(0.05)
        pid = self._random.choice(free)
        self._in_use.add(pid)
        try:
            yield pid
        finally:
            self._in_use.discard(pid)

    async def _end(self, with_signal: signal.Signals) -> None:
        async with self._taken() as pid:
            if with_signal == signal.SIGKILL:
                # Stopped, it accepts no connection between the look at its connections and its end.
                _signal(pid, signal.SIGSTOP)
                await _until_stopped(pid)
                self._note_kill(pid)
            else:
                self.kills += 1
            _signal(pid, with_signal)
            while is_running(pid):
                await asyncio.sleep(0.05)
            await self._wait_for_all()

    async def _wait_for_all(self) -> None:
        while len(self._target.processes) < 2:
            await asyncio.sleep(0.05)

    def _note_kill(self, pid: int) -> None:
        self.kills += 1
        self._judge.killed.append((time.monotonic(), _client_ports(pid, self._target.port)))


async def _pause() -> None:
    await asyncio.sleep(_PAUSE_S)


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[None]:
    _signal(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(pid, signal.SIGCONT)


async def _until_stopped(pid: int) -> None:
    with contextlib.suppress(OSError):
        while (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] not in "TZX":
            await asyncio.sleep(0.001)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _replace(file: Path, content: bytes) -> None:
    new = file.with_name(f".{file.name}.new")
    new.write_bytes(content)
    new.replace(file)


def _is_reading(parent: int) -> bool:
    """Return whether the process that reads the folder of models runs."""
    return any(map(_reads, children_of(parent)))


def _reads(pid: int) -> bool:
    """Return whether this process reads the folder of models, and is no server process."""
    with contextlib.suppress(OSError):
        return b"service.artefact.rereading" in (Path("/proc") / str(pid) / "cmdline").read_bytes()
    return False


def _client_ports(pid: int, port: int) -> frozenset[int]:
    """Return the ports of the clients whose connections a process has accepted."""
    inodes: set[str] = set()
    for descriptor in (Path("/proc") / str(pid) / "fd").iterdir():
        with contextlib.suppress(OSError):
            link = str(descriptor.readlink())
            if link.startswith("socket:["):
                inodes.add(link[8:-1])
    found = set()
    for fields in map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:]):
        local, remote = (int(fields[place].rsplit(":", 1)[1], 16) for place in (1, 2))
        if local == port and fields[9] in inodes:
            found.add(remote)
    return frozenset(found)
