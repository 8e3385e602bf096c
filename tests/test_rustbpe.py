"""The Rust trainer and encoder against plain Python ones and tiktoken."""

import logging
import random
import signal
import threading
import time
from collections import Counter
from itertools import pairwise

import pyarrow.parquet as pq
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe
from nanochat.tok_eval_texts import TEXTS
from nanochat.tokenizer import SPLIT_PATTERN

ALL_TEXT = "\n".join(TEXTS.values())


def merge_once(ids, pair, new_id):
    out, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            out.append(new_id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def train_plainly(texts, vocab_size, pattern):
    """The bytes of all tokens: recount every pair before each merge; ties go to the smallest pair of ids."""
    chunks = Counter(chunk for text in texts for chunk in regex.findall(pattern, text))
    words = [(list(chunk.encode()), count) for chunk, count in chunks.items()]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size:
        counts = Counter()
        for ids, count in words:
            for pair in pairwise(ids):
                counts[pair] += count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [(merge_once(ids, best, len(tokens)), count) for ids, count in words]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def trained(texts, vocab_size, **kwargs):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **kwargs)
    return tokenizer


def tokens_of(tokenizer):
    ranks = tokenizer.get_mergeable_ranks()
    assert [rank for _, rank in ranks] == list(range(tokenizer.vocab_size))
    return [token for token, _ in ranks]


def test_20_merges_of_100_kilobytes_equal_the_plain_trainer():
    text = (ALL_TEXT * 20)[:100_000]
    fast = trained([text], 276, pattern=SPLIT_PATTERN)
    assert tokens_of(fast) == train_plainly([text], 276, SPLIT_PATTERN)


def test_400_merges_of_real_text_equal_the_plain_trainer():
    texts = ALL_TEXT.split("\n")
    fast = trained(texts, 656, pattern=SPLIT_PATTERN, buffer_size=7)
    assert tokens_of(fast) == train_plainly(texts, 656, SPLIT_PATTERN)


# Unassigned characters are left out: which of them are letters depends on the Unicode version of each regex engine.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(CHARACTERS, max_size=20) | st.text("ab 1\n", max_size=40)))
def test_any_texts_equal_the_plain_trainer_and_tiktoken_and_decode_back(texts):
    texts = ["a", *texts]  # some text is needed
    fast = trained(texts, 300, pattern=SPLIT_PATTERN)
    tokens = tokens_of(fast)
    assert tokens == train_plainly(texts, 300, SPLIT_PATTERN)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    reference = tiktoken.Encoding("reference", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in texts:
        ids = fast.encode(text)
        assert ids == reference.encode_ordinary(text)
        assert fast.decode(ids) == text
    assert fast.batch_encode(texts) == [fast.encode(text) for text in texts]


def test_encoding_equals_tiktoken_on_real_text():
    fast = trained(TEXTS.values(), 900, pattern=SPLIT_PATTERN)
    ranks = dict(fast.get_mergeable_ranks())
    reference = tiktoken.Encoding("reference", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert fast.encode(ALL_TEXT) == reference.encode_ordinary(ALL_TEXT)


@pytest.mark.slow
def test_the_scanner_and_the_regular_expression_learn_the_same_of_a_whole_corpus(request):
    folder = request.config.rootpath.parent / "shared" / "hub" / "datasets" / "local" / "edu-text-small"
    if not folder.is_dir():
        pytest.skip("no ../shared/hub/datasets/local/edu-text-small to read")

    def texts():
        for path in sorted(folder.glob("*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches():
                yield from batch.column("text").to_pylist()

    scanned = trained(texts(), 32_768, pattern=SPLIT_PATTERN)
    assert scanned.get_merges() == trained(texts(), 32_768, pattern=f"(?:{SPLIT_PATTERN})").get_merges()


def test_of_equally_frequent_pairs_the_smaller_ids_are_merged_first():
    assert tokens_of(trained(["bc ad ac"], 259, pattern=r"\w+"))[256:] == [b"ac", b"ad", b"bc"]


def test_the_result_does_not_depend_on_the_buffer():
    texts = ALL_TEXT.split(" ")
    assert tokens_of(trained(texts, 500, buffer_size=1)) == tokens_of(trained(texts, 500))


def test_without_a_pattern_digits_come_by_three():
    tokenizer = trained(["1234 1234 1234"], 300)
    assert r"\p{N}{1,3}" in tokenizer.get_pattern()
    assert tokenizer.get_pattern() == SPLIT_PATTERN.replace("{1,2}", "{1,3}")
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234")] == ["123", "4"]


def test_any_other_pattern_is_used_as_given():
    tokenizer = trained(["ababab"], 300, pattern="(?:ab)(?=ab)|.")
    assert tokenizer.get_pattern() == "(?:ab)(?=ab)|."
    assert tokens_of(tokenizer)[256:] == [b"ab"]


def test_training_stops_when_no_pair_is_left():
    assert trained(["abc"], 1000).vocab_size == 258


@pytest.mark.parametrize(
    ("texts", "kwargs", "error", "message"),
    [
        ([], {"vocab_size": 255}, ValueError, "255 is below"),
        ([], {"vocab_size": 2**31 + 1}, ValueError, "2147483649 is above"),
        ([], {"vocab_size": 2**40}, ValueError, "1099511627776 is above"),
        ([], {"vocab_size": 300}, ValueError, "gave no text"),
        (["", ""], {"vocab_size": 300}, ValueError, "gave no text"),
        (["a", "b\ud800"], {"vocab_size": 300}, ValueError, "text 1 has half a surrogate pair"),
        ([], {"vocab_size": 300, "buffer_size": 0}, ValueError, "buffer_size is 0"),
        ([], {"vocab_size": 300, "pattern": "("}, ValueError, "no regular expression"),
        (["a", 5], {"vocab_size": 300}, TypeError, "must yield str, but item 1 is <class 'int'>"),
        ([" " * 2_000_000 + "x"], {"vocab_size": 300, "pattern": r"\s+(?!\S)|\S"}, ValueError, "crop"),
    ],
)
def test_wrong_input_raises_and_leaves_the_tokenizer_as_it_was(texts, kwargs, error, message):
    tokenizer = trained(["aaa"], 300)
    with pytest.raises(error, match=message):
        tokenizer.train_from_iterator(iter(texts), **kwargs)
    assert tokens_of(tokenizer)[256:] == [b"aa", b"aaa"]


def test_an_error_inside_the_iterator_comes_out_of_training():
    def texts():
        yield "a"
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        trained(texts(), 300, buffer_size=1)


def test_an_unknown_id_is_a_key_error_with_the_known_range():
    with pytest.raises(KeyError, match=r"256 is not in the vocabulary \(ids 0 to 255\)"):
        rustbpe.Tokenizer().decode([97, 256])


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(ValueError, match="text 0 has half a surrogate pair"):
        rustbpe.Tokenizer().encode("a\ud800")
    with pytest.raises(ValueError, match="text 1 has half a surrogate pair"):
        rustbpe.Tokenizer().batch_encode(["a", "\udfff"])


def test_merges_or_tokens_alone_make_the_same_tokenizer_again():
    first = trained([ALL_TEXT], 700, pattern=SPLIT_PATTERN)
    by_merges = rustbpe.Tokenizer.from_merges(SPLIT_PATTERN, bytes(range(256)), first.get_merges())
    by_tokens = rustbpe.Tokenizer.from_tokens(SPLIT_PATTERN, tokens_of(first))
    for other in (by_merges, by_tokens):
        assert tokens_of(other) == tokens_of(first)
        assert other.get_merges() == first.get_merges()
        assert other.encode(ALL_TEXT) == first.encode(ALL_TEXT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rustbpe.Tokenizer.from_tokens(".", [b"a"]), "256 single bytes"),
        (
            lambda: rustbpe.Tokenizer.from_tokens(".", [*map(lambda i: bytes([i]), range(256)), b"abc"]),
            "two tokens before",
        ),
        (lambda: rustbpe.Tokenizer.from_merges(".", bytes(256), b""), "256 single bytes"),
        (lambda: rustbpe.Tokenizer.from_merges(".", bytes(range(256)), bytes([0, 1, 0, 0] * 2)), "cannot be the merge"),
        (lambda: rustbpe.Tokenizer.from_merges(".", bytes(range(256)), bytes(9)), "merges has 9 bytes"),
        (lambda: rustbpe.Tokenizer.from_merges("(", bytes(range(256)), b""), "no regular expression"),
    ],
)
def test_what_is_no_vocabulary_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_progress_is_told_up_to_the_last_merge():
    calls = []
    trained([ALL_TEXT], 456, progress=lambda done, planned: calls.append((done, planned)))
    assert calls[-1] == (200, 200)
    assert calls == sorted(set(calls))


def test_an_error_in_progress_comes_out_of_training():
    def progress(done, planned):
        raise RuntimeError("the terminal is gone")

    with pytest.raises(RuntimeError, match="the terminal is gone"):
        trained([ALL_TEXT], 456, progress=progress)


def test_bytes_that_are_no_utf8_decode_to_the_replacement_character():
    assert rustbpe.Tokenizer().decode([0xF0, 0x9F, 97]) == "\ufffda"


def random_words(n, length=12):
    rng = random.Random(0)
    return [" ".join("".join(rng.choices("abcdefghij", k=length)) for _ in range(100)) for _ in range(n // 100)]


def test_progress_is_logged_to_python_each_percent(caplog):
    with caplog.at_level(logging.INFO, logger="rustbpe"):
        trained(random_words(1000), 256 + 400)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("merges:")]
    assert len(lines) == 100
    assert lines[0] == "merges: 1% (4/400)"
    assert lines[-1] == "merges: 100% (400/400)"


def test_other_threads_run_while_merging():
    texts, is_merging = random_words(60_000), threading.Event()

    def all_texts():
        yield from texts
        is_merging.set()

    worker = threading.Thread(target=trained, args=(all_texts(), 20_000))
    worker.start()
    is_merging.wait()
    ticks = 0
    while worker.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 20


def test_a_signal_stops_the_merge_loop():
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    def texts():
        yield from random_words(60_000)
        signal.setitimer(signal.ITIMER_REAL, 0.15)  # reading is over; the merges take much longer than this

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(Stop):
            trained(texts(), 1_000_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
