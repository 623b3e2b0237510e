"""Captions whose words are in another order, as in ARO's tests of order, made without knowing what the words are.

Two of ARO's four kinds need to know which words are nouns and adjectives, and are not made here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from .compositional_scores import Case

Words = list[str]


def _trigrams(words: Sequence[str]) -> list[Words]:
    return [list(words[start : start + 3]) for start in range(0, len(words), 3)]


def _all_words(words: Words, rng: random.Random) -> Words:
    return rng.sample(words, len(words))


def _whole_trigrams(words: Words, rng: random.Random) -> Words:
    groups = _trigrams(words)
    return [word for group in rng.sample(groups, len(groups)) for word in group]


def _within_trigrams(words: Words, rng: random.Random) -> Words:
    return [word for group in _trigrams(words) for word in rng.sample(group, len(group))]


SHUFFLES: dict[str, Callable[[Words, random.Random], Words]] = {
    "all words": _all_words, "trigrams": _whole_trigrams, "within trigrams": _within_trigrams,
}  # fmt: skip


def shuffled(caption: str, kind: str) -> str | None:
    """Return a caption with its words in another order, the same in every call; None if no order differs.

    Args:
        caption: words between spaces.
        kind: "all words"; "trigrams", which change places as wholes; or "within trigrams".
    """
    words = caption.split()
    groups = _trigrams(words)
    differs = {
        "all words": len(set(words)) > 1,
        "trigrams": len(set(map(tuple, groups))) > 1,
        "within trigrams": any(len(set(group)) > 1 for group in groups),
    }
    if not differs[kind]:
        return None
    rng, found = random.Random(f"{kind}: {caption}"), words
    while found == words:
        found = SHUFFLES[kind](words, rng)
    return " ".join(found)


def order_case(name: str, image: int, caption: str) -> Case | None:
    """Return a caption against itself in other orders; None if there is no other order."""
    found = {kind: text for kind in SHUFFLES if (text := shuffled(caption, kind))}
    return Case(name, (image,), (caption, *found.values()), wrong=tuple(found)) if found else None
