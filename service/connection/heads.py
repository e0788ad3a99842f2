"""Checks of the head of a request: demands of RFC 9112 that the parser does not check, and limits."""

from __future__ import annotations

import re
from collections.abc import Sequence

import httptools

from service.connection.limits import ConnectionLimits
from service.connection.refusals import Refusals, Refused, syntax

_HOST = re.compile(rb"([\w.~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?", re.ASCII)

Headers = Sequence[tuple[bytes, bytes]]


def check_head(url: bytes, version: str, headers: Headers, limits: ConnectionLimits, refusals: Refusals) -> bool:
    """Check a head that the parser accepted; return whether the body is chunked.

    Args:
        url: target of the request line.
        version: of HTTP, such as "1.1".
        headers: with names in lower case.
        limits: on target and headers.
        refusals: the answers to a head beyond them.

    Raises:
        Refused: RFC 9112 or a limit asks for it.
    """
    if version not in ("1.1", "1.0"):
        raise Refused(refusals.version if version == "2.0" else syntax("the request line has no version"))
    if len(url) > limits.target_bytes:
        raise Refused(refusals.target)
    if len(headers) > limits.headers:
        raise Refused(refusals.headers)
    found = dict(headers)
    host = found.get(b"host")
    if host is None:
        if version == "1.1":
            raise Refused(syntax("there is no Host header"))
    elif _HOST.fullmatch(host) is None:
        raise Refused(syntax("the Host header is not a host"))
    elif len(found) != len(headers) and [name for name, _ in headers].count(b"host") > 1:
        raise Refused(syntax("there are several Host headers"))
    coding = found.get(b"transfer-encoding")
    if coding is None:
        return False
    if version == "1.0":
        raise Refused(syntax("HTTP/1.0 has no Transfer-Encoding"))
    if coding.lower() != b"chunked":
        raise Refused(refusals.coding)
    return True


def origin_form(target: bytes) -> bytes:
    """Return path and query of a target with scheme and host, as clients send it to a proxy (RFC 9112 section 3.2.2).

    Raises:
        Refused: the target is not valid.
    """
    try:
        parsed = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        raise Refused(syntax("the target is not valid")) from None
    return (parsed.path or b"/") + (b"?" + parsed.query if parsed.query else b"")


def without_upgrade(method: bytes, url: bytes, version: str, headers: Headers) -> bytes:
    """Return a head without `Upgrade`, which a server may ignore (RFC 9110 section 7.8).

    Args:
        method: of the request line, as the others.
        url: target.
        version: of HTTP, such as "1.1".
        headers: with names in lower case.
    """
    lines = [b"%s %s HTTP/%s" % (method, url, version.encode())]
    lines += [b"%s: %s" % header for header in headers if header[0] != b"upgrade"]
    return b"\r\n".join([*lines, b"\r\n"])
