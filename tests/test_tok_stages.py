"""tok_train and tok_eval end to end on a made-up source."""

import re
import subprocess
import sys
import time

import pytest
import tiktoken

from nanochat.config import InputError
from nanochat.tok_eval_texts import LANGUAGES, TEXTS
from nanochat.tokenizer import PATTERNS, Tokenizer, get_tokenizer
from scripts import tok_eval, tok_train

DOCUMENTS = [f"Document {i}: the cat sat on mat number {i * i}. It's a 한국어 day!" for i in range(100)]


class Shelf:
    """A source with two training blocks and one of validation."""

    name = "shelf"
    blocks = {"train": [DOCUMENTS[:50], DOCUMENTS[50:90]], "val": [DOCUMENTS[90:]]}  # noqa: RUF012

    def num_blocks(self, split):
        return len(self.blocks[split])

    def read_block(self, split, i):
        return self.blocks[split][i]


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    for stage in (tok_train, tok_eval):
        monkeypatch.setattr(stage, "open_source", lambda name, **settings: Shelf())
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def train(**kwargs):
    return tok_train.run(tok_train.TokTrainConfig(dataset="shelf", **{"vocab_size": 360, **kwargs}))


def read(source=None, **kwargs):
    """The texts that training sees."""
    reader = tok_train.Reader(source or Shelf(), tok_train.TokTrainConfig(**kwargs))
    return list(reader), reader


def test_flags_have_the_names_and_defaults_of_the_reference():
    cfg = tok_train.TokTrainConfig()
    assert (cfg.max_chars, cfg.doc_cap, cfg.vocab_size, cfg.dataset) == (10**10, 10_000, 65_536, "climbmix")


def test_the_trained_tokenizer_lies_in_the_base_directory_with_a_note_of_its_data():
    tokenizer = train()
    loaded = get_tokenizer()
    assert loaded.get_vocab_size() == 360
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.metadata["dataset"] == "shelf"
    assert loaded.metadata["documents"] == 90
    assert loaded.metadata["characters"] == sum(map(len, DOCUMENTS[:90]))


def test_only_the_training_split_is_read_in_order():
    assert read()[0] == DOCUMENTS[:90]


def test_documents_are_cropped_to_doc_cap_characters():
    texts, reader = read(doc_cap=10)
    assert texts == [document[:10] for document in DOCUMENTS[:90]]
    assert reader.num_chars == 900


def test_reading_stops_after_the_document_that_crosses_max_chars():
    # 10 characters each: after 3 the count is 30, which does not exceed 30; the fourth crosses and is used
    assert len(read(doc_cap=10, max_chars=30)[0]) == 4
    assert len(read(doc_cap=10, max_chars=29)[0]) == 3
    assert len(read(doc_cap=10, max_chars=1)[0]) == 1


def test_progress_tells_rate_share_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(tok_train, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(Shelf, "blocks", {"train": [["x" * 24_000_000], ["y"]], "val": []})
    clock = iter([0.0, 120.0, 121.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    read(doc_cap=10**8)
    # one block of two took 120 seconds
    line = "read 24.0M characters (50.0%) | 0.2M chars/sec | eta: 2.0m"
    assert capsys.readouterr().out.splitlines()[0] == line


def test_the_report_section_has_the_keys_of_the_reference_then_the_new_ones(base_dir):
    train(max_chars=5_000_000)
    lines = (base_dir / "report" / "tokenizer-training.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "## Tokenizer training"
    keys = [line[2:].split(":")[0] for line in lines if line.startswith("- ")]
    assert keys == [
        *["max_chars", "doc_cap", "vocab_size", "train_time", "num_special_tokens"],
        *["token_bytes_min", "token_bytes_max", "token_bytes_mean", "token_bytes_std"],
        *["dataset", "bad_shards", "pattern", "characters read", "documents read", "ids in use", "fingerprint"],
    ]
    assert "- max_chars: 5,000,000" in lines
    assert "- num_special_tokens: 9" in lines
    assert re.search(r"^- train_time: \d+\.\d{4}$", "\n".join(lines), re.MULTILINE)


def test_token_bytes_statistics_leave_special_tokens_out():
    tokenizer = Tokenizer.from_ranks([bytes([byte]) for byte in range(256)] + [b"ab"])
    # 256 ones and a two: mean 258/257; sample variance ((2 - mean)^2 + 256 (1 - mean)^2) / 256
    assert tok_train.token_bytes_stats(tokenizer) == {
        "token_bytes_min": 1,
        "token_bytes_max": 2,
        "token_bytes_mean": pytest.approx(258 / 257),
        "token_bytes_std": pytest.approx(1 / 257**0.5),
    }


def test_a_vocabulary_that_stays_smaller_is_said_so(capsys):
    vocab_size = train(vocab_size=20_000).get_vocab_size()
    assert 265 < vocab_size < 20_000
    assert f"ids end at {vocab_size - 1:,} instead of 19,999" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--vocab_size=264"], "--vocab_size 264 must lie between 265"),
        (["--vocab_size=2147483649"], "--vocab_size 2147483649 must lie between 265"),
        (["--max_chars=0"], "--max_chars 0 must be at least 1"),
        (["--doc-cap", "0"], "--doc_cap 0 must be at least 1"),
    ],
)
def test_wrong_flags_end_in_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        tok_train.main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_source_without_text_is_refused_and_nothing_is_saved(base_dir, monkeypatch):
    monkeypatch.setattr(Shelf, "blocks", {"train": [[]], "val": []})
    with pytest.raises(InputError, match="--dataset shelf has no training text"):
        train()
    assert not (base_dir / "tokenizer").exists()


def test_the_text_is_cut_by_the_pattern_that_was_asked_for():
    assert train(pattern="gpt4").bpe.get_pattern() == PATTERNS["gpt4"]
    assert get_tokenizer().bpe.get_pattern() == PATTERNS["gpt4"]
    letters = r"\p{L}|\P{L}+"
    tokens = [token for token, _ in train(pattern=letters).bpe.get_mergeable_ranks()]
    assert not any(len(token) > 1 and token.isalpha() for token in tokens)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "is no regular expression"), (r"\w+", r"--pattern \\w\+ leaves out parts of a text")],
)
def test_a_pattern_that_cannot_be_used_is_refused_and_nothing_is_saved(base_dir, pattern, message):
    with pytest.raises(InputError, match=message):
        train(pattern=pattern)
    assert not (base_dir / "tokenizer").exists()


def test_the_longest_tokens_and_those_never_used_are_told(base_dir, monkeypatch):
    monkeypatch.setattr(tok_eval, "fetch", lambda names: dict.fromkeys(names, "no network"))
    train()
    section = tok_eval.run(tok_eval.TokEvalConfig())
    assert "### The 20 longest tokens\n\n- " in section
    used = {i for text in DOCUMENTS[90:] for i in get_tokenizer().encode(text)}
    size = sum(len(text.encode()) for text in DOCUMENTS[90:])
    unused = 351 - len(used)
    share = (
        f"- {100 * unused / 351:.1f}% of the vocabulary ({unused} of 351 tokens) in {size:,} bytes of validation text"
    )
    assert share in section


def test_a_folder_is_noted_by_its_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    monkeypatch.chdir(tmp_path)
    assert tok_train.dataset_name("books") == str(tmp_path / "books")
    assert tok_train.dataset_name("climbmix") == "climbmix"


def test_a_table_row_has_ratios_and_a_signed_difference():
    assert str(tok_eval.Row("news", 1819, 404, 371)) == "| news | 1819 | 404 | 4.50 | 371 | 4.90 | +8.2% |"
    assert str(tok_eval.Row("math", 1834, 936, 966)) == "| math | 1834 | 936 | 1.96 | 966 | 1.90 | -3.2% |"


def test_the_tables_are_those_of_the_reference_report_byte_for_byte(request):
    path = request.config.rootpath.parent / "shared" / "reference" / "report.md"
    if not path.exists():
        pytest.skip("no ../shared/reference/report.md to compare with")
    reference = path.read_text(encoding="utf-8")
    counts = re.findall(r"^\| (\S+) \| (\d+) \| (\d+) \| \S+ \| (\d+) \|", reference, re.MULTILINE)
    rows = [tok_eval.Row(name, *map(int, numbers)) for name, *numbers in counts]
    tables = [tok_eval.format_table(name, rows[i : i + 7]) for i, name in ((0, "GPT-2"), (7, "GPT-4"))]
    assert f"\n\n{tables[0]}\n{tables[1]}\n\n## " in reference


def test_the_five_texts_are_about_as_long_as_those_of_the_reference():
    reference = {"news": 1819, "korean": 893, "code": 1259, "math": 1834, "science": 1112}
    assert list(TEXTS) == list(reference)
    for name, text in TEXTS.items():
        assert 0.7 < len(text.encode()) / reference[name] < 1.3


@pytest.mark.parametrize(
    ("dataset", "prefix"),
    [("fineweb-edu", "fwe"), ("climbmix", "climbmix"), ("tinyworld", "tinyworld"), ("/data/my-books", "my-books")],
)
def test_the_last_two_rows_are_the_first_block_of_each_split(dataset, prefix):
    texts = tok_eval.data_texts(Shelf(), dataset)
    assert texts == {
        f"{prefix}-train": "\n".join(DOCUMENTS[:50]),
        f"{prefix}-val": "\n".join(DOCUMENTS[90:]),
    }


def test_tok_eval_reports_seven_rows_for_each_baseline(base_dir, monkeypatch, capsys):
    bytes_only = tok_eval.Coder(265, lambda text: list(text.encode()), bytes)
    monkeypatch.setattr(tok_eval, "fetch", lambda names: dict.fromkeys(names, bytes_only))
    ours = train()
    tok_eval.main([])
    section = (base_dir / "report" / "tokenizer-evaluation.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| (\S+) \| \d", section, re.MULTILINE)
    seven = ["news", "korean", "code", "math", "science", "shelf-train", "shelf-val"]
    assert names == [*seven, *seven, *seven, *LANGUAGES]
    num_bytes = len(TEXTS["news"].encode())
    row = str(tok_eval.Row("news", num_bytes, num_bytes, len(ours.encode(TEXTS["news"]))))
    assert section.count(row) == 2
    assert "GPT-2: 265\nGPT-4: 265\nOurs: 360\n" in capsys.readouterr().out


def test_without_the_vocabularies_the_report_says_so_and_the_stage_goes_on(base_dir, monkeypatch):
    def no_network(name):
        raise InputError(f"tiktoken cannot give {name}: no route\nto host")

    monkeypatch.setattr(tok_eval, "get_tiktoken", no_network)
    train()
    tok_eval.main([])
    section = (base_dir / "report" / "tokenizer-evaluation.md").read_text(encoding="utf-8")
    note = "### Comparison with GPT-4\n\nNot compared: tiktoken cannot give cl100k_base: no route to host\n"
    assert note in section


def test_a_vocabulary_that_does_not_arrive_is_not_waited_for(monkeypatch):
    bytes_only = tiktoken.Encoding(
        "bytes", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )

    def slow_network(name):
        if name == "cl100k_base":
            time.sleep(0.5)
        return bytes_only

    monkeypatch.setattr(tok_eval, "get_tiktoken", slow_network)
    found = tok_eval.fetch({"GPT-2": "gpt2", "GPT-4": "cl100k_base"}, seconds=0.1)
    assert found["GPT-2"].vocab_size == 256
    assert found["GPT-4"] == "its vocabulary did not arrive within 0.1 s"


def test_a_tokenizer_that_loses_text_is_refused():
    lossy = tok_eval.Coder(1, lambda text: [0], lambda ids: b"?")
    with pytest.raises(InputError, match="the trained tokenizer does not give back the text 'news'"):
        tok_eval.count_tokens(lossy, {"news": "text"}, "trained")


def test_tok_eval_without_a_tokenizer_says_how_to_train_one(capsys):
    with pytest.raises(SystemExit) as exit_:
        tok_eval.main([])
    assert exit_.value.code == 2
    assert "train one: python -m scripts.tok_train" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["tok_train", "tok_eval"])
def test_stages_import_silently_and_answer_help(stage):
    command = [sys.executable, "-W", "error", "-m", f"scripts.{stage}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage:")
