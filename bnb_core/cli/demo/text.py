"""Text that every machine with Python has: the language reference behind `help()`, from the standard library."""

from __future__ import annotations

import functools
from typing import List, NamedTuple, Set

import click

#: Every character that the text may hold, in the order of their codes in the character-level model.
ALPHABET = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))

_HELD_OUT_EVERY = 8
#: Paragraphs with a smaller share of letters and spaces are code, grammar or a heading.
_PROSE = 0.85
_TYPOGRAPHY = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})


class Text(NamedTuple):
    """Text to train on, and text of other topics to measure on; a paragraph a line."""

    training: str
    held_out: str


@functools.lru_cache(maxsize=None)
def language_reference() -> Text:
    """Return the prose of Python's language reference, every eighth topic held out.

    Topics quote each other, so a paragraph is kept only where it first occurs: none is in both parts.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise click.ClickException(
            "this Python lacks pydoc_data, its own documentation, which the demo trains on; install the complete standard library"
        ) from error
    training: List[str] = []
    held_out: List[str] = []
    seen: Set[str] = set()
    for number, name in enumerate(sorted(topics)):
        part = held_out if number % _HELD_OUT_EVERY == 0 else training
        for paragraph in topics[name].translate(_TYPOGRAPHY).split("\n\n"):
            line = " ".join("".join(filter(ALPHABET.__contains__, paragraph)).split())
            if line not in seen and _is_prose(line):
                seen.add(line)
                part.append(line)
    return Text("\n".join(training), "\n".join(held_out))


def _is_prose(line: str) -> bool:
    return sum(character.isalpha() or character == " " for character in line) > _PROSE * len(line)
