"""Errors of a call.

::

    ClientError
      ├─ ServiceError           the service, or a proxy before it, refused the request or failed
      ├─ UnreachableError       no connection, or it ended before the answer was complete
      └─ UnreadableAnswerError  a redirect, or an answer that is not one of this service
"""

from __future__ import annotations

from service.api.schema import Problem


class ClientError(Exception):
    """A call that was not answered."""


class ServiceError(ClientError):
    """An answer with an error status; `problem` is its RFC 9457 document, or one with the same members in its place."""

    def __init__(self, problem: Problem, retry_after_s: float | None = None) -> None:
        """Store the problem, and the seconds after which the server wants another try."""
        super().__init__(problem, retry_after_s)
        self.problem = problem
        self.retry_after_s = retry_after_s

    @property
    def type(self) -> str:
        """Stable identifier of the kind of problem, `urn:problem-type:lipcert:...`."""
        return self.problem.type

    @property
    def status(self) -> int:
        """HTTP status."""
        return self.problem.status

    @property
    def detail(self) -> str:
        """Cause and remedy."""
        return self.problem.detail

    def __str__(self) -> str:
        """Return status, title and detail."""
        return f"{self.status} {self.problem.title}: {self.detail}"


class UnreachableError(ClientError):
    """No connection, or it ended or stopped before the answer was complete."""


class UnreadableAnswerError(ClientError):
    """A redirect, or an answer that is not one of this service: truncated, of a proxy or of another server."""
