"""What a sentence about an error has to be: one line, with the facts, that ends in something to do."""

from __future__ import annotations

import re

VERBS = """
    ask add announce apt buy check choose compare compute copy correct expose free get give install join leave
    list look make move name note open outlast put raise read remove report run set start stop sync tell try
    update use wait write
"""
"""With which something to do begins."""
_MEANT = re.compile(
    "did you mean|must |are possible|needs at least|of the form|is none of|whole numbers? from|in the range|"
    r"\d+ to \d+|see agora(d|ctl) "
)
"""A sentence that says what is right needs no verb."""


def acts(sentence: str) -> bool:
    """Whether some clause says what to do."""
    clauses = re.split(r"[;:,.(]\s+|\s\(|\bor\b|\band\b|\bto\b", sentence)
    words = (re.match(r"\W*([A-Za-z]+)", clause) for clause in clauses[1:])
    return bool(_MEANT.search(sentence)) or any(word and word[1].lower() in VERBS.split() for word in words)


def complete(sentence: str, *facts: str) -> None:
    """Assert that ``sentence`` is one line, has these words in it (the value, the limit, its name), and says
    what to do.
    """
    sentence = sentence.strip()
    assert "\n" not in sentence, f"more than one line: {sentence!r}"
    assert 20 < len(sentence) < 700, sentence
    missing = [fact for fact in facts if fact not in sentence]
    assert not missing, f"{sentence!r} does not say {missing}"
    assert acts(sentence), f"{sentence!r} does not say what to do"
