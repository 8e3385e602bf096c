"""Rendering by hand: without merges an id is a byte, and the special tokens are 256 to 264."""

import copy

import pytest

from nanochat.chat import check_conversation
from nanochat.config import InputError
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

BOS, USER, USER_END, ASSISTANT, ASSISTANT_END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = range(256, 265)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_ranks([bytes([byte]) for byte in range(256)])


def talk(*contents):
    """A conversation: user, assistant, user, ..."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def part(kind, text):
    return {"type": kind, "text": text}


def with_system(system, conversation):
    return {"messages": [{"role": "system", "content": system}, *conversation["messages"]]}


def test_a_turn_is_framed_and_only_the_answer_and_its_end_are_learned(tokenizer):
    ids, mask = tokenizer.render_conversation(talk("hi", "yo"))
    assert ids == [BOS, USER, *b"hi", USER_END, ASSISTANT, *b"yo", ASSISTANT_END]
    assert mask == [0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_bos_comes_once_and_every_answer_is_learned(tokenizer):
    ids, mask = tokenizer.render_conversation(talk("a", "b", "c", "d"))
    expected = [
        (BOS, 0),
        *[(USER, 0), (97, 0), (USER_END, 0), (ASSISTANT, 0), (98, 1), (ASSISTANT_END, 1)],
        *[(USER, 0), (99, 0), (USER_END, 0), (ASSISTANT, 0), (100, 1), (ASSISTANT_END, 1)],
    ]
    assert list(zip(ids, mask, strict=True)) == expected


def test_a_tool_call_is_learned_and_its_output_is_not(tokenizer):
    answer = [part("text", "= $"), part("python", "2*3"), part("python_output", "6"), part("text", "6.")]
    ids, mask = tokenizer.render_conversation(talk("?", answer))
    expected = [
        *[(BOS, 0), (USER, 0), (ord("?"), 0), (USER_END, 0), (ASSISTANT, 0)],
        *[(byte, 1) for byte in b"= $"],
        *[(PYTHON, 1), *((byte, 1) for byte in b"2*3"), (PYTHON_END, 1)],
        *[(OUTPUT, 0), (ord("6"), 0), (OUTPUT_END, 0)],
        *[(byte, 1) for byte in b"6."],
        (ASSISTANT_END, 1),
    ]
    assert list(zip(ids, mask, strict=True)) == expected


def test_one_text_part_equals_the_string(tokenizer):
    parts = tokenizer.render_conversation(talk("hi", [part("text", "yo")]))
    assert parts == tokenizer.render_conversation(talk("hi", "yo"))


def test_parts_are_encoded_one_by_one_even_where_their_join_would_merge():
    merged = Tokenizer.from_ranks([*(bytes([byte]) for byte in range(256)), b"ab"])
    together, _ = merged.render_conversation(talk("q", "ab"))
    apart, _ = merged.render_conversation(talk("q", [part("text", "a"), part("text", "b"), part("text", "")]))
    assert together[-2:-1] == [256]
    assert apart[-3:-1] == [97, 98]


def test_a_system_message_goes_before_the_users_words_and_the_input_is_unchanged(tokenizer):
    conversation = with_system("be kind", talk("hi", "yo"))
    before = copy.deepcopy(conversation)
    assert tokenizer.render_conversation(conversation) == tokenizer.render_conversation(talk("be kind\n\nhi", "yo"))
    assert conversation == before


def test_special_token_strings_in_a_message_never_become_special_ids(tokenizer):
    attack = "".join(SPECIAL_TOKENS)
    ids, _ = tokenizer.render_conversation(talk(attack, attack))
    assert [i for i in ids if i >= 256] == [BOS, USER, USER_END, ASSISTANT, ASSISTANT_END]


@pytest.mark.parametrize("max_tokens", [1, 5, 8, 9, 10])
def test_ids_and_mask_are_cut_to_max_tokens_from_the_right(tokenizer, max_tokens):
    ids, mask = tokenizer.render_conversation(talk("hi", "yo"))  # 9 tokens
    assert tokenizer.render_conversation(talk("hi", "yo"), max_tokens) == (ids[:max_tokens], mask[:max_tokens])


def test_the_default_limit_is_2048_tokens(tokenizer):
    ids, mask = tokenizer.render_conversation(talk("a" * 3000, "b"))
    assert len(ids) == len(mask) == 2048
    assert sum(mask) == 0


def test_completion_drops_the_last_answer_and_opens_a_new_one(tokenizer):
    ids = tokenizer.render_for_completion(talk("hi", "yo"))
    assert ids == [BOS, USER, *b"hi", USER_END, ASSISTANT]
    whole, _ = tokenizer.render_conversation(talk("a", "b", "c", "d"))
    assert tokenizer.render_for_completion(talk("a", "b", "c", "d")) == whole[: 1 + 6 + 4]


def test_completion_cuts_the_prompt_before_it_opens_the_answer(tokenizer):
    assert tokenizer.render_for_completion(talk("hello", "yo"), max_tokens=4) == [BOS, USER, *b"he", ASSISTANT]


def test_completion_needs_an_answer_to_leave_out_and_does_not_change_its_input(tokenizer):
    conversation = with_system("s", talk("hi", "yo"))
    before = copy.deepcopy(conversation)
    ids = tokenizer.render_for_completion(conversation)
    assert ids == [BOS, USER, *b"s\n\nhi", USER_END, ASSISTANT]
    assert conversation == before
    with pytest.raises(InputError, match="the last message must be the assistant's"):
        tokenizer.render_for_completion(talk("hi"))


def test_the_picture_is_green_where_learned_and_red_elsewhere(tokenizer):
    picture = tokenizer.visualize_tokenization([BOS, 97], [0, 1])
    assert picture == "\033[91m<|bos|>\033[0m|\033[92ma\033[0m"
    picture = tokenizer.visualize_tokenization([97], [1], with_token_id=True)
    assert picture == "\033[92ma\033[0m\033[90m(97)\033[0m"


@pytest.mark.parametrize(
    "conversation",
    [
        talk("a"),
        talk("a", "b", "c"),
        with_system("s", talk("a", "b")),
        talk("", [part("text", ""), part("python", "1+1"), part("python_output", "2")]),
        talk("a", []),
        {**talk("a", "b"), "letters": ["A", "B"]},
    ],
)
def test_good_conversations_pass(conversation):
    check_conversation(conversation)


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([], "at least one message"),
        ({}, "at least one message"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hi"}, "at least one message"),
        ({"messages": ["hi"]}, "must have role and content, got 'hi'"),
        ({"messages": [{"role": "user"}]}, "must have role and content"),
        ({"messages": [{"role": "system", "content": "s"}]}, "followed by a user message"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "message 0: role is 'assistant', not 'user'"),
        ({"messages": talk("a")["messages"] * 2}, "message 1: role is 'user', not 'assistant'"),
        (with_system("s", with_system("s", talk("a"))), "message 1: role is 'system', not 'user'"),
        (with_system(["s"], talk("a")), r"message 0 \(system\): content must be a string"),
        (with_system("s", talk("a", None)), r"message 2 \(assistant\): content must be a string or a list"),
        (talk(3), r"message 0 \(user\): content must be a string, got 3"),
        (talk([part("text", "a")], "b"), r"message 0 \(user\): content must be a string"),
        (talk("a", [part("image", "b")]), "part type 'image' is not known; use text, python, python_output"),
        (talk("a", [{"type": "text"}]), "a part must be"),
        (talk("a", ["b"]), "a part must be"),
    ],
)
def test_bad_conversations_are_refused_with_place_and_reason(tokenizer, conversation, reason):
    with pytest.raises(InputError, match=f"^chats.jsonl line 3: .*{reason}"):
        check_conversation(conversation, where="chats.jsonl line 3")
    with pytest.raises(InputError, match=reason):
        tokenizer.render_conversation(conversation)
