import json
import os

import numpy as np
import pytest
import tiktoken
import torch

import rustbpe
from nanochat.config import InputError
from nanochat.tok_eval_texts import TEXTS
from nanochat.tokenizer import FILE_NAME, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, get_tokenizer

TRAINING_TEXTS = [line for text in TEXTS.values() for line in text.splitlines()]
HARD_TEXT = "I'm 12,345 years old; we'll SEE -- €3.50 日本語 한국어 👩‍🚀 \t\n\n  x"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(TRAINING_TEXTS, 600)


def byte_tokenizer():
    """No merges: ids 0 to 255 are bytes, 256 to 264 the special tokens."""
    return Tokenizer.from_ranks([bytes([byte]) for byte in range(256)])


def test_the_vocabulary_has_the_size_asked_for_and_the_special_tokens_are_its_last_nine(tokenizer):
    assert tokenizer.get_vocab_size() == 600
    assert [tokenizer.encode_special(name) for name in SPECIAL_TOKENS] == list(range(591, 600))
    assert tokenizer.get_bos_token_id() == 591
    assert tokenizer.get_special_tokens() == set(SPECIAL_TOKENS)
    assert tokenizer.id_to_token(599) == "<|output_end|>"


def test_the_tokens_are_those_of_the_trainer_with_digits_by_two(tokenizer):
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(TRAINING_TEXTS, 591, pattern=SPLIT_PATTERN)
    assert [tokenizer.decode_bytes([i]) for i in range(591)] == [t for t, _ in trainer.get_mergeable_ranks()]
    assert tokenizer.encode(HARD_TEXT) == trainer.encode(HARD_TEXT)
    digits = Tokenizer.train_from_iterator(["12345"] * 3, 300)
    assert [digits.id_to_token(i) for i in digits.encode("12345")] == ["12", "34", "5"]


def test_a_text_without_pairs_left_gives_a_smaller_vocabulary_without_gaps():
    small = Tokenizer.train_from_iterator(["abc"], 1000)
    assert small.get_vocab_size() == 256 + 2 + 9
    assert small.encode("abc", prepend="<|bos|>") == [258, 257]


def test_a_vocabulary_without_room_for_bytes_and_special_tokens_is_refused():
    assert Tokenizer.train_from_iterator(["ab"], 265).get_vocab_size() == 265
    with pytest.raises(InputError, match="264 must lie between 265"):
        Tokenizer.train_from_iterator(["ab"], 264)


def test_texts_come_back_from_their_ids(tokenizer):
    for text in [*TEXTS.values(), HARD_TEXT, "", " ", "\ufeff\x00"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_many_texts_get_the_ids_of_each_one(tokenizer):
    texts = [*TRAINING_TEXTS, ""]
    assert tokenizer.encode(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer(["a"]) == [tokenizer("a")] == [[97]]
    assert tokenizer.encode([]) == []


def test_prepend_and_append_add_one_token_to_each_text_by_id_or_name():
    t = byte_tokenizer()
    assert t.encode("hi", prepend="<|bos|>", append=7) == [256, 104, 105, 7]
    assert t.encode(["h", ""], prepend=0, append="<|assistant_end|>") == [[0, 104, 260], [0, 260]]
    with pytest.raises(KeyError):
        t.encode("hi", prepend="<|eos|>")


def test_special_token_strings_inside_a_text_stay_text(tokenizer):
    text = "".join(SPECIAL_TOKENS)
    assert max(tokenizer.encode(text)) < 591
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_two_million_spaces_encode_and_come_back(tokenizer):
    text = "a" + " " * 2_000_000 + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode([text, "b"]) == [tokenizer.encode(text), tokenizer.encode("b")]


@pytest.mark.parametrize("text", ["a", " ", "\n", "😀", "e\u0301", "\u0301", "日", "1", ".", "ab", " \n"])
def test_a_megabyte_of_one_thing_encodes_and_comes_back(tokenizer, text):
    text *= 1_000_000 // len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_arrays_hold_the_ids_of_each_text(tokenizer):
    texts = [HARD_TEXT, "", "ab", *TRAINING_TEXTS]
    for prepend in (None, 591):
        arrays = tokenizer.encode_to_arrays(texts, prepend)
        assert [a.tolist() for a in arrays] == tokenizer.encode(texts, prepend=prepend)
        assert {a.dtype for a in arrays} == {np.dtype(np.int32)}
    assert tokenizer.encode_to_arrays([]) == []
    assert [a.tolist() for a in tokenizer.encode_to_arrays([""])] == [[]]


def test_half_a_surrogate_pair_is_refused_with_its_place(tokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_to_arrays):
        with pytest.raises(InputError, match=r"text 1 has half a surrogate pair.*position 2.*replace it"):
            encode(["ok", "ab\ud800"])
    with pytest.raises(InputError, match="half a surrogate pair"):
        Tokenizer.train_from_iterator(["\udc00"], 300)


def test_an_unknown_id_is_a_key_error_with_the_known_range(tokenizer):
    for i in (600, -1):
        with pytest.raises(KeyError, match=rf"token id {i} is not in the vocabulary \(ids 0 to 599\)"):
            tokenizer.decode([97, i])


def test_no_text_is_refused():
    for texts in ([], [""]):
        with pytest.raises(InputError, match="gave no text"):
            Tokenizer.train_from_iterator(texts, 300)


def test_special_tokens_must_have_ids_of_their_own():
    bytes_only = rustbpe.Tokenizer()
    for special in ({"<|bos|>": 255}, {"<|bos|>": 256, "<|end|>": 256}):
        with pytest.raises(InputError, match="ids of their own from 256 on"):
            Tokenizer(bytes_only, special, "<|bos|>")
    with pytest.raises(InputError, match="'<|bos|>' is not among".replace("|", r"\|")):
        Tokenizer(bytes_only, {"<|end|>": 256}, "<|bos|>")


def test_half_a_character_decodes_to_the_replacement_character():
    assert byte_tokenizer().decode([0xE2, 0x82]) == "\ufffd"
    assert byte_tokenizer().decode_bytes([0xE2, 0x82]) == b"\xe2\x82"


def test_token_bytes_counts_raw_bytes_and_nothing_for_special_tokens():
    num_bytes = Tokenizer.train_from_iterator(["日日"], 268).token_bytes()  # three bytes, twice
    assert num_bytes.dtype == torch.int32
    # a lone byte of 日 counts 1 though it decodes to the three bytes of U+FFFD
    assert num_bytes.tolist() == [1] * 256 + [2, 3, 6] + [0] * 9


def test_bytes_of_ids_add_up_to_the_bytes_of_the_text(tokenizer):
    ids = tokenizer.encode(HARD_TEXT)
    assert int(tokenizer.token_bytes()[ids].sum()) == len(HARD_TEXT.encode())


def test_save_and_load_give_the_same_tokenizer(tokenizer, tmp_path):
    named = Tokenizer(tokenizer.bpe, tokenizer.special_tokens, "<|bos|>", {"dataset": "tinyworld"})
    named.save(tmp_path)
    loaded = Tokenizer.from_directory(tmp_path)
    assert loaded.encode(HARD_TEXT) == tokenizer.encode(HARD_TEXT)
    assert loaded.get_bos_token_id() == 591
    assert loaded.metadata == {"dataset": "tinyworld"}
    assert loaded.fingerprint == tokenizer.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]
    json.loads((tmp_path / FILE_NAME).read_text())  # JSON: nothing in it can run


def test_the_fingerprint_tells_vocabularies_apart_but_not_their_notes(tokenizer):
    other = Tokenizer.train_from_iterator(TRAINING_TEXTS, 599)
    assert len({tokenizer.fingerprint, other.fingerprint, byte_tokenizer().fingerprint}) == 3
    assert Tokenizer(tokenizer.bpe, tokenizer.special_tokens, "<|bos|>", {"a": 1}).fingerprint == tokenizer.fingerprint


def test_get_tokenizer_reads_the_base_directory(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"no tokenizer at .*; train one: python -m scripts.tok_train"):
        get_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    assert get_tokenizer().fingerprint == tokenizer.fingerprint
    assert get_tokenizer(tmp_path / "tokenizer").fingerprint == tokenizer.fingerprint


def damage_merge(record):
    record["merges"] = "AAAA" + record["merges"][4:]


def drop_merge(record):
    record["merges"] = record["merges"][:-32]


def damage_note(record):
    record["metadata"] = {"dataset": "another"}


def drop_pattern(record):
    del record["pattern"]


@pytest.mark.parametrize("damage", [damage_merge, drop_merge, damage_note, drop_pattern])
def test_a_changed_file_is_refused(tokenizer, tmp_path, damage):
    path = tokenizer.save(tmp_path)
    record = json.loads(path.read_text())
    damage(record)
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="is damaged"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"format": "nanochat-tokenizer-1"'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        Tokenizer.from_directory(tmp_path)


def test_a_truncated_file_is_refused(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="is damaged"):
        Tokenizer.from_directory(tmp_path)


def test_a_file_of_another_format_is_refused_by_its_name(tmp_path):
    (tmp_path / FILE_NAME).write_text('{"format": "nanochat-tokenizer-9"}')
    with pytest.raises(InputError, match="nanochat-tokenizer-9"):
        Tokenizer.from_directory(tmp_path)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)

    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        byte_tokenizer().save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]
    assert Tokenizer.from_directory(tmp_path).fingerprint == tokenizer.fingerprint


def test_a_pretrained_name_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="tiktoken cannot give gpt-nothing"):
        Tokenizer.from_pretrained("gpt-nothing")


def test_a_vocabulary_that_cannot_be_fetched_is_told_in_one_line(monkeypatch):
    def no_network(name):
        raise ConnectionError("many\nlines")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(InputError, match=r"cannot fetch it \(ConnectionError\); set TIKTOKEN_CACHE_DIR") as error:
        Tokenizer.from_pretrained("gpt2")
    assert "\n" not in str(error.value)


def test_gpt2_from_the_hub_mirror_starts_documents_with_its_end_of_text(monkeypatch, request):
    hub = request.config.rootpath.parent / "shared" / "hub"
    if not (hub / "tiktoken_cache").is_dir():
        pytest.skip("no ../shared/hub/tiktoken_cache: the vocabulary would need the network")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(hub / "tiktoken_cache"))
    gpt2 = Tokenizer.from_pretrained("gpt2")
    assert gpt2.get_vocab_size() == 50257
    assert gpt2.get_bos_token_id() == 50256
    assert gpt2.decode(gpt2.encode(HARD_TEXT)) == HARD_TEXT
    assert gpt2.token_bytes()[50256] == 0
