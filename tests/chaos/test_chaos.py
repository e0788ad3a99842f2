"""A short run of `chaos.py`, and what its judge finds."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from chaos import run, served
from exchanges import Answer, Exchange
from judging import Judge

_RIGHT = Answer(200, b'{"class_id": 7}', closes=False)
_CHANGED = Answer(503, b'{"type": "urn:problem-type:lipcert:artefact-changed"}', closes=False)


@pytest.fixture
def judge() -> Judge:
    return Judge(dict.fromkeys(("png", "rotating"), _RIGHT))


def exchange(name: str = "png") -> Exchange:
    return Exchange(name, b"POST", b"", 1.0, has_rotating_key=name == "rotating")


def test_a_server_that_is_disturbed_gives_no_wrong_answer_and_loses_none() -> None:
    async def short() -> None:
        async with served() as server:
            report = await run(server, n_clients=8, seed=1, pause_s=0.05, each_once=True)
            assert report.is_well, "\n".join([*report.lines(), server.log])
            assert report.judge.counts["right"] > 1000
            assert report.judge.refused["artefact-changed"]
            assert report.judge.refused["unauthorized"]

    asyncio.run(short())


def test_one_bit_of_an_answer_is_wrong(judge: Judge) -> None:
    judge.answered(exchange(), dataclasses.replace(_RIGHT, body=b'{"class_id": 6}'), 1.0, 2.0)
    assert judge.counts["wrong"] == 1
    assert not judge.is_well


def test_a_problem_is_a_refusal_only_while_it_has_a_cause(judge: Judge) -> None:
    with judge.cause("artefact-changed", slack_s=0.0) as cause:
        pass
    judge.answered(exchange(), _CHANGED, cause.start_s - 1.0, cause.end_s + 1.0)
    assert judge.refused == {"artefact-changed": 1}
    judge.answered(exchange(), _CHANGED, cause.end_s + 1.0, cause.end_s + 2.0)
    assert judge.counts["wrong"] == 1


def test_a_revoked_key_that_is_served_is_wrong(judge: Judge) -> None:
    with judge.cause(slack_s=0.0) as revoked:
        judge.revoked.append(revoked)
        judge.answered(exchange("rotating"), _RIGHT, revoked.start_s + 1.0, revoked.start_s + 2.0)
        judge.answered(exchange("png"), _RIGHT, revoked.start_s + 1.0, revoked.start_s + 2.0)
        judge.answered(exchange("rotating"), _RIGHT, revoked.start_s - 1.0, revoked.start_s + 2.0)
    assert judge.counts == {"wrong": 1, "right": 2}


def test_a_request_is_lost_unless_its_process_was_killed(judge: Judge) -> None:
    judge.killed.append((10.0, frozenset({4000})))
    judge.lost(exchange(), 4000, 9.0, "reset")
    assert judge.is_well
    judge.lost(exchange(), 4000, 11.0, "the port of a later connection")
    judge.lost(exchange(), 4001, 9.0, "another process")
    assert judge.counts == {"lost with the process": 1, "lost": 2}


@pytest.mark.parametrize("status", [500, 502])
def test_a_failure_of_the_server_is_never_a_refusal(judge: Judge, status: int) -> None:
    with judge.cause("500", "502", slack_s=60.0) as cause:
        judge.answered(exchange(), Answer(status, b"", closes=True), cause.start_s, cause.start_s)
    assert judge.counts["wrong"] == 1
