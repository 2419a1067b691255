"""AMBER's descriptions: which nouns are not in the image (`inference.py` of junyangwang0410/AMBER)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from reverie_jax.eval.benchmarks.interface import BenchmarkError

SIMILAR = 0.8

Nouns = Callable[[str], Sequence[str]]
"""Returns the nouns of a text as lemmas, in order, repeats included."""
Similarity = Callable[[str, str], float]


@functools.cache
def tools() -> tuple[Nouns, Similarity]:
    """Return the tools of the official script: NLTK's tagger and lemmas, vectors of spaCy's en_core_web_lg.

    Raises:
        BenchmarkError: They are not installed.
    """
    try:
        import nltk
        import spacy

        lemmatize = nltk.stem.WordNetLemmatizer().lemmatize

        def nouns(text: str) -> list[str]:
            return [lemmatize(word) for word, tag in nltk.pos_tag(nltk.word_tokenize(text)) if tag.startswith("NN")]

        nouns("Dogs.")  # the data is read at the first call
        document = functools.cache(spacy.load("en_core_web_lg"))
    except (ImportError, LookupError, OSError) as error:
        reason = next((line.strip(" *") for line in str(error).splitlines() if line.strip(" *")), type(error).__name__)
        raise BenchmarkError(
            "amber: descriptions are scored with NLTK's punkt_tab, averaged_perceptron_tagger_eng and wordnet and spaCy's "
            f"en_core_web_lg, not all of which are installed ({reason}); run `pip install nltk spacy`, `python -m "
            "nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet` and `python -m spacy download en_core_web_lg`"
        ) from None
    return nouns, functools.cache(lambda one, other: float(document(one).similarity(document(other))))


class _Words:
    """A list of an image's words with their associated words, and which words were mentioned.

    Associated words come before the words themselves, and the first entry that matches is credited; a duplicate in the list
    is never credited.
    """

    def __init__(self, words: Sequence[str], relation: Mapping[str, Sequence[str]]):
        entries = [(other, owner) for owner, word in enumerate(words) for other in relation.get(word, ())]
        self._entries = entries + [(word, owner) for owner, word in enumerate(words)]
        self._credited = [False] * len(words)

    def credit(self, fits: Callable[[str], bool]) -> bool:
        """Credit the first entry that fits, and return whether there is one."""
        for word, owner in self._entries:
            if fits(word):
                self._credited[owner] = True
                return True
        return False

    @property
    def credited(self) -> int:
        return sum(self._credited)

    def __len__(self) -> int:
        return len(self._credited)


def score_description(
    nouns: Sequence[str],
    truth: Sequence[str],
    hallu: Sequence[str],
    relation: Mapping[str, Sequence[str]],
    safe: frozenset[str],
    similarity: Similarity,
) -> tuple[dict[str, float], list[str]]:
    """Return what a description adds to the sums, and its flagged nouns.

    Args:
        nouns: of the description.
        truth: words for what is in the image.
        hallu: words for what models tend to see in it.
        relation: words with the words that go with each.
        safe: words that are never flagged.
        similarity: of two words.
    """
    vocabulary = relation.keys() | {other for others in relation.values() for other in others}
    known = [noun for noun in nouns if noun in vocabulary]
    true, false = _Words(truth, relation), _Words(hallu, relation)
    flagged = []
    for noun in known:
        same = functools.partial(str.__eq__, noun)

        def similar(word: str, noun: str = noun) -> bool:
            return similarity(noun, word) > SIMILAR

        if noun in safe or true.credit(same):
            continue
        # Both, as officially: a similar word may come before the noun itself.
        false.credit(same)
        false.credit(similar)
        if not true.credit(similar):
            flagged.append(noun)
    amounts: dict[str, float] = {
        "generated": 1,
        "clean": not flagged,
        "nouns": len(known),
        "flagged": len(flagged),
        "truth": len(true),
        "covered": true.credited,
        "hallu": len(false),
        "credited": false.credited,
    }
    return amounts, flagged
