"""Vocabularies: text to tokens (numbers) and back. Bytes as they are, or byte pairs learned from a text.

Source  Sennrich, Haddow & Birch 2016, Neural Machine Translation of Rare Words with Subword Units, section 3.2; on
        bytes as in GPT-2 (Radford et al. 2019), so that any text can be told, and with words cut beforehand alike
"""

from __future__ import annotations

import heapq
import json
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from os import PathLike
from pathlib import Path

import numpy as np

Pair = tuple[int, int]

# What no token reaches across: a run of letters (or of what is no ASCII), of digits or of signs, with one space before
# it; a run of blanks, but for that space. Together the matches are the whole text.
WORD = re.compile(rb" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?!\S)|\s+")


class Vocabulary(ABC):
    """len(v) tokens, numbered from 0. v.decode(v.encode(text)) is the text's bytes, whatever they are."""

    @abstractmethod
    def __len__(self) -> int:
        """How many tokens there are."""

    @abstractmethod
    def encode(self, text: str | bytes) -> np.ndarray:
        """The tokens of a text.   (n,) int64; a str is told in UTF-8"""

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> bytes:
        """The bytes that tokens stand for; `.decode(errors="replace")` makes them text. Errors  ValueError: no token"""


class ByteVocabulary(Vocabulary):
    """256 tokens, a byte each."""

    def __len__(self) -> int:
        return 256

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.frombuffer(_bytes(text), np.uint8).astype(np.int64)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return b"".join(_of(token, _BYTES) for token in tokens)


class BytePairVocabulary(Vocabulary):
    """256 bytes, and a token for each merge: merge i makes token 256 + i of two earlier ones.

    merges  the pairs, in the order in which they were learned, and in which they are applied to a word
    Errors  ValueError: a pair that is not of two earlier tokens, or stands there twice
    """

    def __init__(self, merges: Iterable[Iterable[int]]):
        self.merges: list[Pair] = []
        self.rank: dict[Pair, int] = {}  # the token that a pair makes; also when: the lowest is applied first
        self.meaning = list(_BYTES)
        self._known: dict[bytes, list[int]] = {}  # words that were encoded already: most come again and again
        for merge in merges:
            tokens = tuple(merge)
            fits = len(tokens) == 2 and all(type(t) is int and 0 <= t < len(self.meaning) for t in tokens)
            if not fits or tokens in self.rank:
                raise ValueError(f"merge {len(self.merges)} is {tokens}: not two of the tokens before it, or not new")
            pair = (tokens[0], tokens[1])
            self.rank[pair] = len(self.meaning)
            self.merges.append(pair)
            self.meaning.append(self.meaning[pair[0]] + self.meaning[pair[1]])

    @classmethod
    def train(cls, text: str | bytes, merges: int) -> BytePairVocabulary:
        """Learn so many merges (fewer, if the words run out of pairs): each time the pair that is most frequent.

        Of pairs that are equally frequent, the one with the lower tokens; so one text gives one vocabulary everywhere.

        Cost    per merge only words that hold its pair are looked at: 1,000 merges of 400 KB take less than a second
        Errors  ValueError: fewer merges than 0
        """
        if merges < 0:
            raise ValueError(f"merges {merges}: must not be negative")
        counted = Counter(WORD.findall(_bytes(text)))
        words, counts = [list(word) for word in counted], list(counted.values())
        # 1. How often each pair occurs, and in which words.
        frequency: Counter[Pair] = Counter()
        where: defaultdict[Pair, set[int]] = defaultdict(set)
        for i, word in enumerate(words):
            for pair in pairwise(word):
                frequency[pair] += counts[i]
                where[pair].add(i)
        # 2. Merge the first of the queue, again and again. Invariant: each pair stands in the queue with its frequency
        #    or a larger one, of earlier; that is found out when it comes first, and put right.
        queue = [(-n, pair) for pair, n in frequency.items()]
        heapq.heapify(queue)
        learned: list[Pair] = []
        while queue and len(learned) < merges:
            n, best = heapq.heappop(queue)
            if -n != frequency[best]:
                if frequency[best]:
                    heapq.heappush(queue, (-frequency[best], best))
                continue
            token = 256 + len(learned)
            learned.append(best)
            changed: set[Pair] = set()
            for i in where.pop(best):
                for pair in pairwise(words[i]):
                    frequency[pair] -= counts[i]
                words[i] = _merged(words[i], best, token)
                for pair in pairwise(words[i]):
                    frequency[pair] += counts[i]
                    if token in pair:
                        where[pair].add(i)
                        changed.add(pair)
            for pair in changed:
                heapq.heappush(queue, (-frequency[pair], pair))
        return cls(learned)

    def __len__(self) -> int:
        return len(self.meaning)

    def encode(self, text: str | bytes) -> np.ndarray:
        tokens: list[int] = []
        for word in WORD.findall(_bytes(text)):
            if word not in self._known:
                self._known[word] = self._encode_word(word)
            tokens += self._known[word]
        return np.array(tokens, np.int64)

    def _encode_word(self, word: bytes) -> list[int]:
        tokens = list(word)
        while len(tokens) > 1:
            first = min(pairwise(tokens), key=lambda pair: self.rank.get(pair, len(self.meaning)))
            if first not in self.rank:
                break
            tokens = _merged(tokens, first, self.rank[first])
        return tokens

    def decode(self, tokens: Iterable[int]) -> bytes:
        return b"".join(_of(token, self.meaning) for token in tokens)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the merges, as JSON."""
        Path(path).write_text(json.dumps({"merges": self.merges}) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> BytePairVocabulary:
        """Read what `save` has written. Errors  FileNotFoundError; ValueError: it is something else, and what"""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file")
        try:
            content = json.loads(path.read_bytes())
            return cls(content["merges"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path}: not a vocabulary of byte pairs: {type(error).__name__}: {error}") from None


def _merged(tokens: list[int], pair: Pair, token: int) -> list[int]:
    """With `token` in the place of each occurrence of the pair, from the left."""
    merged, i = [], 0
    while i < len(tokens):
        if tokens[i] == pair[0] and i + 1 < len(tokens) and tokens[i + 1] == pair[1]:
            merged.append(token)
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged


_BYTES = [bytes([b]) for b in range(256)]


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _of(token: int, meaning: list[bytes]) -> bytes:
    if not 0 <= token < len(meaning):
        raise ValueError(f"token {token} is not one of {len(meaning)}")
    return meaning[token]
