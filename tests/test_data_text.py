"""Texts, vocabularies, and the loader that deals windows of tokens."""

import json
import os
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from minidist import backend
from minidist.data import BytePairVocabulary, ByteVocabulary, TextLoader, default_text, read_text, split_text
from minidist.data.vocabulary import WORD

DEVICE = os.environ.get("MINIDIST_TEST_DEVICE", "cpu")
TEXT = "She sells sea shells, the shells she sells are sea-shells: 12 shells, 1200 shells.\n\n  Größe\tnaïve 東京\n" * 3

# -- texts --------------------------------------------------------------------------------------------------------


def test_the_default_text_is_english_long_and_repeats_no_paragraph() -> None:
    text = default_text()
    assert len(text) > 200_000
    assert text == default_text()
    assert "Assert statements are a convenient way" in " ".join(text.split())
    paragraphs = text.rstrip("\n").split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))


def test_the_end_of_a_text_is_held_out() -> None:
    text = "".join(map(chr, range(100, 1100)))
    train, held_out = split_text(text)
    assert (train + held_out, len(held_out)) == (text, 100)
    for wrong in (0, 1, -0.5):
        with pytest.raises(ValueError, match=f"held_out {wrong}"):
            split_text(text, wrong)


def test_a_text_file_is_utf8_and_line_ends_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("für\r\n東京".encode())
    assert read_text(path) == read_text(str(path)) == "für\r\n東京"


def test_what_is_no_text_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("für".encode("latin-1"))
    (tmp_path / "empty").touch()
    for name, error, message in (
        ("latin", ValueError, "latin: not UTF-8: byte 0xfc at 1"),
        ("empty", ValueError, "empty: the file is empty"),
        ("", ValueError, "this is a folder"),
        ("none", FileNotFoundError, "none: there is no such file"),
    ):
        with pytest.raises(error, match=message):
            read_text(tmp_path / name)


# -- vocabularies -------------------------------------------------------------------------------------------------


def plain_training(text: bytes, merges: int) -> list[tuple[int, int]]:
    """Byte-pair encoding as the paper's algorithm 1 has it: count everything anew for each merge."""
    words = [list(word) for word in WORD.findall(text)]
    learned: list[tuple[int, int]] = []
    while len(learned) < merges:
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [replaced(word, best, 256 + len(learned)) for word in words]
        learned.append(best)
    return learned


def replaced(word: list[int], pair: tuple[int, int], token: int) -> list[int]:
    result: list[int] = []
    rest = list(word)
    while rest:
        if tuple(rest[:2]) == pair:
            result.append(token)
            del rest[:2]
        else:
            result.append(rest.pop(0))
    return result


def test_bytes_are_their_own_tokens() -> None:
    vocabulary = ByteVocabulary()
    tokens = vocabulary.encode("aé")
    assert (len(vocabulary), tokens.tolist(), tokens.dtype) == (256, [97, 0xC3, 0xA9], np.int64)
    assert vocabulary.decode(tokens) == "aé".encode()


@pytest.mark.parametrize("text", [TEXT, "aaaa aaa aaaaaaa bababab", default_text()[:3000]], ids=len)
def test_training_learns_the_merges_of_the_plain_algorithm(text: str) -> None:
    expected = plain_training(text.encode(), 120)
    assert BytePairVocabulary.train(text, 120).merges == expected
    assert BytePairVocabulary.train(text.encode(), 5).merges == expected[:5]


def test_encoding_applies_the_merges_in_the_order_they_were_learned() -> None:
    vocabulary = BytePairVocabulary.train(TEXT, 100)
    text = b"shells of sea and unseen words"
    words = [list(word) for word in WORD.findall(text)]
    for i, merge in enumerate(vocabulary.merges):
        words = [replaced(word, merge, 256 + i) for word in words]
    assert vocabulary.encode(text).tolist() == [token for word in words for token in word]


def test_every_text_and_all_bytes_come_back_exactly() -> None:
    vocabulary = BytePairVocabulary.train(TEXT, 100)
    drawn = random.Random(0)
    texts = [b"", TEXT.encode(), bytes(range(256)), drawn.randbytes(2000), b"  \n\n a  b \t", "a\x85b c".encode()]
    for text in texts:
        tokens = vocabulary.encode(text)
        assert tokens.dtype == np.int64
        assert b"".join(WORD.findall(text)) == text
        assert vocabulary.decode(tokens) == text == ByteVocabulary().decode(ByteVocabulary().encode(text))
    assert len(vocabulary.encode(TEXT)) < len(TEXT.encode()) / 3


def test_words_that_run_out_of_pairs_end_the_training() -> None:
    assert BytePairVocabulary.train("ab ab", 50).merges == [(97, 98), (32, 256)]
    assert len(BytePairVocabulary.train("", 50)) == 256
    assert len(BytePairVocabulary.train(TEXT, 0)) == 256
    with pytest.raises(ValueError, match="merges -1"):
        BytePairVocabulary.train(TEXT, -1)


def test_a_vocabulary_is_kept_as_json(tmp_path: Path) -> None:
    vocabulary = BytePairVocabulary.train(TEXT, 40)
    path = tmp_path / "v.json"
    vocabulary.save(path)
    assert json.loads(path.read_text()) == {"merges": [list(pair) for pair in vocabulary.merges]}
    again = BytePairVocabulary.load(path)
    assert again.merges == vocabulary.merges
    np.testing.assert_array_equal(again.encode(TEXT), vocabulary.encode(TEXT))


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"merges": 3}', '{"merges": [[97]]}', '{"merges": [[97, "b"]]}',
                '{"merges": [[97, 256]]}', '{"merges": [[97, 98], [97, 98]]}', '{"merges": [[true, -1]]}', "\udc80"]
)  # fmt: skip
def test_a_file_that_is_no_vocabulary_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "v.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"v\.json: not a vocabulary"):
        BytePairVocabulary.load(path)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        BytePairVocabulary.load(tmp_path / "other.json")


def test_a_token_that_is_not_there_is_refused() -> None:
    for vocabulary, token in ((ByteVocabulary(), 256), (ByteVocabulary(), -1), (BytePairVocabulary([(97, 98)]), 257)):
        with pytest.raises(ValueError, match=f"token {token} is not one of {len(vocabulary)}"):
            vocabulary.decode([97, token])


# -- the loader ---------------------------------------------------------------------------------------------------

N, CONTEXT = 107, 4
TOKENS = np.arange(N)  # a token tells its place


def loader(**options) -> TextLoader:
    return TextLoader(**{"tokens": TOKENS, "context": CONTEXT, "batch_size": 5, "device": DEVICE} | options)


def epoch(dealer: TextLoader, number: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(backend.to_numpy(x), backend.to_numpy(y)) for x, y in dealer.epoch(number)]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_together_deal_the_batches_of_one_rank(size: int, drop_last: bool) -> None:
    alone = epoch(loader(drop_last=drop_last))
    shares = [epoch(loader(rank=rank, size=size, drop_last=drop_last)) for rank in range(size)]
    assert {len(share) for share in shares} == {len(alone)}
    for step, (inputs, targets) in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate([share[step][0] for share in shares]), inputs)
        np.testing.assert_array_equal(np.concatenate([share[step][1] for share in shares]), targets)
        assert [len(share[step][0]) for share in shares] == [len(c) for c in np.array_split(inputs, size)]


def test_windows_lie_side_by_side_and_targets_come_next() -> None:
    for number in range(20):
        batches = epoch(loader(), number)
        inputs, targets = (np.concatenate(parts) for parts in zip(*batches))
        assert (inputs.shape, inputs.dtype, targets.dtype) == ((N // CONTEXT - 1, CONTEXT), np.int64, np.int64)
        np.testing.assert_array_equal(targets, inputs + 1)
        offset = inputs.min()
        assert 0 <= offset < CONTEXT
        assert sorted(inputs.ravel()) == list(range(offset, offset + inputs.size))


def test_without_shuffling_all_windows_come_in_order() -> None:
    for n, windows in ((N, 26), (105, 26), (104, 25), (5, 1)):
        inputs = np.concatenate([x for x, _ in epoch(loader(tokens=TOKENS[:n], shuffle=False), 3)])
        np.testing.assert_array_equal(inputs.ravel(), np.arange(windows * CONTEXT))


def test_epochs_differ_and_repeat_by_seed() -> None:
    def order(seed: int, number: int) -> list[int]:
        return np.concatenate([x[:, 0] for x, _ in epoch(loader(seed=seed), number)]).tolist()

    assert order(0, 0) != order(0, 1) != order(1, 1)
    assert order(5, 2) == order(5, 2)
    assert len({min(order(0, number)) for number in range(20)}) == CONTEXT  # every offset


def test_len_and_batch_sizes_count_global_batches() -> None:
    assert loader(size=4).batch_sizes == [5, 5, 5, 5, 5]
    assert loader(tokens=TOKENS[:-4], size=4).batch_sizes == [5, 5, 5, 5, 4]
    dropping = loader(tokens=TOKENS[:-4], drop_last=True)
    assert dropping.batch_sizes == [5, 5, 5, 5]
    assert len(dropping) == len(epoch(dropping)) == 4


def test_a_batch_is_the_callers_to_keep() -> None:
    batches = loader().epoch(0)
    x, y = next(batches)
    kept = y.copy()
    x[...] = -1
    next(batches)
    np.testing.assert_array_equal(backend.to_numpy(y), backend.to_numpy(kept))


def test_bad_arguments_raise_at_the_call_naming_both_values() -> None:
    for options, message in (
        ({"tokens": TOKENS[:4]}, "4 tokens: fewer than a window of 4"),
        ({"tokens": TOKENS.reshape(1, -1)}, r"tokens of shape \(1, 107\)"),
        ({"batch_size": 26, "drop_last": True}, "25 windows of 4 tokens do not fill a batch of 26"),
        ({"context": 0}, "context 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"rank": 4, "size": 4}, "rank 4 is outside a size of 4"),
        ({"seed": -1}, "seed -1"),
    ):
        with pytest.raises(ValueError, match=message):
            loader(**options)
