"""Tokenizers carried to Hugging Face and tiktoken and back, against those programs themselves."""

import base64
import json

import pytest
import tiktoken
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanochat.config import InputError
from nanochat.tok_eval_texts import LANGUAGES, TEXTS
from nanochat.tokenizer import PATTERNS, SPECIAL_TOKENS, Tokenizer, get_tokenizer
from nanochat.tokenizer_formats import export_huggingface, export_tiktoken, import_tokenizer
from scripts import tok_convert

ALL_TEXTS = [*TEXTS.values(), *LANGUAGES.values()]
HARD_TEXTS = ["", " ", "a  b\n\n c\r\n", "it'S we'LL ſ'ſ", "1234567", "👩‍🚀 é e\u0301", "\u00a0\u3000x", "\x00\x85y"]
CHATS = [
    [("user", "Hi!"), ("assistant", "Hello.")],
    [("system", "Be brief."), ("user", "What is 2+2?"), ("assistant", "4"), ("user", "Sure?"), ("assistant", "Yes.")],
    [
        ("user", "6*7?"),
        (
            "assistant",
            [
                {"type": "text", "text": "Let me see. "},
                {"type": "python", "text": "6*7"},
                {"type": "python_output", "text": "42"},
                {"type": "text", "text": "It is 42."},
            ],
        ),
    ],
]


@pytest.fixture(scope="module", params=sorted(PATTERNS))
def tokenizer(request):
    return Tokenizer.train_from_iterator(ALL_TEXTS, 900, PATTERNS[request.param])


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """The tokenizer in Hugging Face's form."""
    directory = tmp_path_factory.mktemp("hf")
    export_huggingface(tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def ours():
    return Tokenizer.train_from_iterator(ALL_TEXTS, 900)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    path, _ = export_huggingface(ours, tmp_path_factory.mktemp("hf"))
    return tokenizers.Tokenizer.from_file(str(path))


def as_chat(turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_tokenizers_gives_the_same_ids_and_text(tokenizer, exported):
    theirs = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert theirs.get_vocab_size() == 900
    assert theirs.token_to_id("<|output_end|>") == 899
    for text in [*ALL_TEXTS, *HARD_TEXTS]:
        ids = tokenizer.encode(text)
        assert theirs.encode(text).ids == ids, text
        assert theirs.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=30) | st.text("ab '\n\r.1é", max_size=30))
def test_tokenizers_gives_the_same_ids_for_any_text(ours, theirs, text):
    assume(not any(name in text for name in SPECIAL_TOKENS))  # which theirs reads as the token
    assert theirs.encode(text).ids == ours.encode(text)


@pytest.mark.parametrize("turns", CHATS)
def test_transformers_loads_it_and_its_chat_template_renders_what_we_render(tokenizer, exported, turns):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(exported))
    assert len(theirs) == 900
    assert theirs.bos_token_id == tokenizer.get_bos_token_id()
    messages = as_chat(turns)["messages"]
    ids, _ = tokenizer.render_conversation({"messages": messages})
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert theirs.encode(text, add_special_tokens=False) == ids
    prompt = theirs.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert theirs.encode(prompt, add_special_tokens=False) == tokenizer.render_for_completion({"messages": messages})


def test_tiktoken_gives_the_same_ids(tokenizer, tmp_path):
    path, rest = export_tiktoken(tokenizer, tmp_path)
    lines = [line.split() for line in path.read_text().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    theirs = tiktoken.Encoding("exported", mergeable_ranks=ranks, **json.loads(rest.read_text()))
    assert theirs.n_vocab == 900
    for text in [*ALL_TEXTS, *HARD_TEXTS]:
        assert theirs.encode_ordinary(text) == tokenizer.encode(text)


def test_what_was_exported_comes_back_the_same(tokenizer, exported, tmp_path):
    assert import_tokenizer(exported / "tokenizer.json").fingerprint == tokenizer.fingerprint
    path, _ = export_tiktoken(tokenizer, tmp_path)
    assert import_tokenizer(path).fingerprint == tokenizer.fingerprint


def test_a_list_of_ranks_alone_takes_our_pattern_and_special_tokens_unless_told(tokenizer, tmp_path):
    path = tmp_path / "ranks.json"
    path.write_text(json.dumps([[list(token), rank] for token, rank in tokenizer.bpe.get_mergeable_ranks()]))
    ours = import_tokenizer(path)
    assert ours.special_tokens == {name: 891 + i for i, name in enumerate(SPECIAL_TOKENS)}
    assert ours.bpe.get_pattern() == PATTERNS["ours"]
    other = import_tokenizer(path, pattern="gpt2", special_tokens="<|endoftext|>,<|pad|>")
    assert (other.special_tokens, other.bos_token) == ({"<|endoftext|>": 891, "<|pad|>": 892}, "<|endoftext|>")
    assert other.bpe.get_pattern() == PATTERNS["gpt2"]


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_the_public_vocabularies_give_the_ids_of_tiktoken(name, monkeypatch, request):
    hub = request.config.rootpath.parent / "shared" / "hub"
    if not (hub / "tiktoken_cache").is_dir():
        pytest.skip("no ../shared/hub/tiktoken_cache: the vocabulary would need the network")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(hub / "tiktoken_cache"))
    ours, theirs = Tokenizer.from_pretrained(name), tiktoken.get_encoding(name)
    assert ours.get_vocab_size() == theirs.n_vocab
    for text in [*ALL_TEXTS, *HARD_TEXTS, "a" * 1000, "ab" * 1000, "=" * 999]:
        ids = theirs.encode_ordinary(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"model": {**c["model"], "type": "WordPiece"}}, "no plain byte-level BPE"),
        (lambda c: {"normalizer": {"type": "NFC"}}, "no plain byte-level BPE"),
        (lambda c: {"added_tokens": []}, "no added tokens"),
        (lambda c: {"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer is not one pattern"),
        (lambda c: {"model": {**c["model"], "merges": c["model"]["merges"][::-1]}}, "not in the order of their ids"),
        (lambda c: {"model": {**c["model"], "vocab": {"a": 0, "b": 7}}}, "do not run from 0 to 1"),
        (lambda c: {"model": {**c["model"], "vocab": {"語": 0}}}, "neither a tokenizer.json nor a list of ranks"),
    ],
)
def test_a_tokenizer_that_bytes_and_merges_cannot_express_is_refused(exported, tmp_path, change, message):
    content = json.loads((exported / "tokenizer.json").read_text(encoding="utf-8"))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**content, **change(content)}), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        import_tokenizer(path)


@pytest.mark.parametrize("text", ["", "hello", "YQ==", "YQ== x", "{}", "[1]", "[[[300], 0]]", "YQ== 0"])
def test_a_file_of_another_kind_is_refused_with_its_name(tmp_path, text):
    path = tmp_path / "ranks.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=r"ranks\.txt"):
        import_tokenizer(path)
    with pytest.raises(InputError, match=r"cannot read the tokenizer .*: No such file"):
        import_tokenizer(tmp_path / "none.json")


def test_tok_convert_carries_the_base_tokenizer_out_and_another_in(ours, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "a"))
    ours.save(tmp_path / "a" / "tokenizer")
    for kind in ("hf", "tiktoken"):
        tok_convert.main([f"--to={kind}", f"--out={tmp_path / kind}"])
    assert f"900 ids, fingerprint {ours.fingerprint[:12]}" in capsys.readouterr().out
    for file in ("hf/tokenizer.json", "tiktoken/tokenizer.tiktoken"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / file.replace("/", "-")))
        tok_convert.main([f"--read={tmp_path / file}"])
        assert get_tokenizer().fingerprint == ours.fingerprint
        assert get_tokenizer().metadata["imported from"] == str(tmp_path / file)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to do: give --read FILE"),
        (["--to=hf"], "--to hf needs --out"),
        (["--to=gguf", "--out=x"], "invalid choice"),
        (["--read=none.json"], "cannot read the tokenizer none.json"),
    ],
)
def test_wrong_use_of_tok_convert_ends_in_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as exit_:
        tok_convert.main(argv)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_tok_convert_does_not_overwrite_another_tokenizer(ours, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    Tokenizer.train_from_iterator(["other text"], 270).save(tmp_path / "tokenizer")
    path, _ = export_tiktoken(ours, tmp_path / "new")
    with pytest.raises(InputError, match="has another tokenizer"):
        tok_convert.run(tok_convert.TokConvertConfig(read=str(path)))
