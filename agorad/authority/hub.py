"""Whose a Hugging Face token is: one question to the hub, and nothing kept.

``huggingface_hub`` asks (``/api/whoami-v2``) in a thread, within ``ANSWER_S``; the answer's ``name`` is the
account. The token is an argument and nothing else: no field, no log, no exception holds it. The library's
own exceptions carry the request with its headers, so they end here, and ours are raised outside of their
handling, with no link to them. A hub that hangs keeps its threads, of which there are at most ``THREADS``;
who finds all of them taken is told to come again.
"""

from __future__ import annotations

import re
from typing import Any, Final

import trio

from agorad.authority.accounts import NAME
from agorad.authority.admission import refusal

ANSWER_S: Final = 10.0
RETRY_S: Final = 20.0
THREADS: Final = 16
_TOKEN: Final = re.compile(r"[\x21-\x7e]{1,256}")
"""What can stand in a header; anything else would be quoted by the error that refuses it."""


class Hub:
    """The hub at ``endpoint``. Its library is imported with the first question."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._threads = trio.CapacityLimiter(THREADS)

    async def whoami(self, token: str) -> str:
        """The name behind a token. ``Refused`` as ``bad_token``, or ``hub_unavailable`` if nobody knows."""
        if not _TOKEN.fullmatch(token):
            raise refusal("bad_token", "the token is none: it has blanks or characters that no token has")
        name, status = None, "no answer in time"
        with trio.move_on_after(ANSWER_S):
            name, status = await trio.to_thread.run_sync(
                _ask, self.endpoint, token, abandon_on_cancel=True, limiter=self._threads
            )
        if name is not None:
            return name
        if status in ("401", "403"):
            raise refusal("bad_token", f"the Hugging Face hub does not know this token (status {status})")
        raise refusal("hub_unavailable", f"the hub at {self.endpoint} could not be asked: {status}", RETRY_S)


def _ask(endpoint: str, token: str) -> tuple[str | None, str]:
    """The name, or None and in a word what the hub said instead. Blocking; never raises."""
    try:
        from huggingface_hub import HfApi

        answer = HfApi(endpoint=endpoint, token=False).whoami(token=token)
    except Exception as error:  # the library has a class for everything, and so has its transport
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        return None, type(error).__name__ if status is None else str(status)
    return _name(answer)


def _name(answer: Any) -> tuple[str | None, str]:
    name = answer.get("name") if isinstance(answer, dict) else None
    if isinstance(name, str) and NAME.fullmatch(name):
        return name, ""
    return None, "its answer names nobody"
