"""Token buckets: exact for each client, of fixed size, never tighter with too many clients, shared by forks."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from fake_clock import Clock
from hypothesis import given
from hypothesis import strategies as st

from service.access import limits
from service.access.limits import Buckets, client_of

ROOT = Path(__file__).resolve().parents[3]


class Bucket:
    """The specification: a bucket that gains tokens with time, in exact arithmetic."""

    def __init__(self, per_s: Fraction, burst: int, now_s: Fraction) -> None:
        self.per_s, self.burst = per_s, burst
        self.tokens, self.at_s = Fraction(burst), now_s

    def take(self, now_s: Fraction) -> bool:
        self.tokens = min(Fraction(self.burst), self.tokens + (now_s - self.at_s) * self.per_s)
        self.at_s = now_s
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


# Steps of a quarter of the period: on the grid the specification is exact, and rounding decides nothing.
@given(
    st.integers(1, 50),
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12)), max_size=80),
)
def test_each_client_has_the_bucket_of_the_specification(
    per_s: int, burst: int, requests: list[tuple[str, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock().install(patch, limits)
        buckets = Buckets(per_s, burst, slots=64)
        start_s = clock.now_s
        quarters = 0
        exact = {client: Bucket(Fraction(per_s), burst, Fraction(0)) for client in "abc"}
        for client, pause in requests:
            quarters += pause
            clock.now_s = start_s + quarters / (4 * per_s)
            wait_s = buckets.take(client)
            assert (wait_s == 0) is exact[client].take(Fraction(quarters, 4 * per_s))
            if wait_s:
                assert float(exact[client].tokens) + wait_s * per_s == pytest.approx(1, abs=1e-3)


def test_a_flood_of_clients_takes_no_more_memory_and_never_limits_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock().install(monkeypatch, limits)
    buckets = Buckets(1.0, 2, slots=64)
    size = buckets._clients.nbytes + buckets._full_at_s.nbytes
    for number in range(10_000):
        assert buckets.take(f"client {number}") == 0
    assert buckets._clients.nbytes + buckets._full_at_s.nbytes == size == 64 * 16


_FORKS = """
import os
from service.access.limits import Buckets
buckets = Buckets(0.001, 3)
for _ in range(2):
    child = os.fork()
    if not child:
        os._exit(int(buckets.take("a") > 0))
    print(os.waitpid(child, 0)[1])
print(buckets.take("a") > 0, buckets.take("a") > 0)
"""


def test_forked_processes_share_the_buckets() -> None:
    result = subprocess.run([sys.executable, "-c", _FORKS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0", "0", "False", "True"]


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
    ],
)
def test_an_ipv6_client_is_its_network(address: str, client: str) -> None:
    assert client_of(address) == client
