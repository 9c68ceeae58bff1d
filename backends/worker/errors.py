"""What a request is answered with when it cannot be served."""

from __future__ import annotations

__all__ = ["RequestError"]


class RequestError(Exception):
    """The request cannot be served; the message says what is wrong with it."""
