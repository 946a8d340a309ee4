"""Exception groups of a handler's own nurseries, read as what the handler meant to raise."""

from __future__ import annotations

from collections.abc import Iterator

from p2p.errors import P2PError, Refused


def plain(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a handler's nurseries have wrapped: one exception, or one of several remote faults."""
    found = list(leaves(group))
    if len(found) == 1:
        return found[0]
    if all(isinstance(leaf, P2PError) for leaf in found):
        return next((leaf for leaf in found if isinstance(leaf, Refused)), found[0])
    return group


def leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from leaves(part)
    else:
        yield error
