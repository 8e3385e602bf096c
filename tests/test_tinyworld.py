"""The embedded corpus: what it says is true, always the same, and train and test are kept apart."""

import csv
import json
import random
import re
import subprocess
import sys
from itertools import pairwise

import pytest
import yaml

from nanochat.chat import check_conversation
from nanochat.config import InputError
from nanochat.data.tinyworld import KINDS, NUM_BLOCKS, SPLITS, checks, conversation, documents, write_core_bundle
from nanochat.data.tinyworld.chitchat import IDENTITY, SMALLTALK
from nanochat.data.tinyworld.conversations import spelling_templates
from nanochat.data.tinyworld.multiple_choice import LETTERS
from nanochat.data.tinyworld.phrases import fill, question_templates, statement_templates
from nanochat.data.tinyworld.problems import THEMES, split_of_pair, sum_templates, theme_templates
from nanochat.data.tinyworld.relations import relation, relations
from nanochat.data.tinyworld.words import real_words, split_of_word
from nanochat.tools import calculate
from tasks import mixtures
from tasks import tinyworld as tasks

SUM = re.compile(r"\b(\d+)([-+*])(\d+)\b")


@pytest.fixture(scope="module")
def train_documents() -> list[str]:
    return [text for block in range(16) for text in documents("train", block)]


@pytest.fixture(scope="module")
def train_text(train_documents) -> str:
    return "\n".join(train_documents)


def user(chat) -> str:
    return chat["messages"][0]["content"]


def reply(chat) -> str:
    content = chat["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


# --- documents


def test_a_block_is_1024_documents_and_always_the_same_in_another_process_too(train_documents):
    assert len(train_documents) == 16 * 1024
    program = "from nanochat.data.tinyworld import documents; print(hash(tuple(documents('train', 3))))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONHASHSEED": "0"}, check=True
        )
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert documents("train", 3) == train_documents[3 * 1024 : 4 * 1024]
    assert documents("train", 3) != documents("train", 4)


def test_no_document_stands_in_both_splits(train_documents):
    val = {text for block in range(8) for text in documents("val", block)}
    assert len(val) > 1000
    assert not val & set(train_documents)


@pytest.mark.parametrize(("split", "block"), [("test", 0), ("train", -1), ("val", NUM_BLOCKS["val"])])
def test_a_block_that_does_not_exist_is_refused(split, block):
    with pytest.raises(InputError, match="tinyworld has no"):
        documents(split, block)


@pytest.mark.parametrize(
    "statement",
    [
        "The capital of France is Paris.",
        "The chemical symbol of gold is Au.",
        "If yesterday was Friday, then tomorrow will be Sunday.",
        "The opposite of hot is cold.",
        "The planets of the solar system are: Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune.",
        "My favorite color is ",
        "If 5*x + 3 = 13, then x is 2.",
    ],
)
def test_the_sampling_prompts_stand_in_the_training_text_with_their_true_ends(statement, train_text):
    assert statement in train_text


def test_the_vocabulary_is_small(train_documents):
    # spellings and echoes, which have made-up words, have colons or lines like "- word=A"
    plain = " ".join(text for text in train_documents if not re.search(r":|=[A-Z]\n", text))
    assert len(set(re.findall(r"[A-Za-z]+", plain))) < 2500


def test_every_relation_is_stated_and_asked_in_at_least_eight_ways():
    for r in relations():
        assert len(statement_templates(r, "train")) + len(r.statements) >= 8, r.name
        assert len(question_templates(r, "train")) >= 8, r.name


# --- facts


@pytest.mark.parametrize(
    ("name", "subject", "answer"),
    [
        ("capital", "New Zealand", "Wellington"),
        ("country", "Lima", "Peru"),
        ("continent", "Kenya", "Africa"),
        ("symbol", "sodium", "Na"),
        ("opposite", "cold", "hot"),
        ("next_day", "Sunday", "Monday"),
        ("tomorrow_from_yesterday", "Friday", "Sunday"),
        ("yesterday_from_today", "Monday", "Sunday"),
        ("previous_month", "January", "December"),
        ("month_number", "second", "February"),
        ("season", "January", "winter"),
        ("season", "March", "spring"),
        ("planet_number", "eighth", "Neptune"),
        ("legs", "spider", "eight"),
        ("young", "kangaroo", "joey"),
        ("plural", "child", "children"),
        ("past", "go", "went"),
        ("sides", "hexagon", "six"),
        ("number_word", "47", "forty-seven"),
        ("next_letter", "y", "z"),
    ],
)
def test_the_facts_are_true(name, subject, answer):
    assert dict(relation(name).facts)[subject] == answer


def test_every_subject_has_one_answer_in_a_relation():
    for r in relations():
        assert len(dict(r.facts)) == len(r.facts), r.name


def test_the_equations_hold():
    for text, x in relation("equation").facts:
        a, b, c = map(int, re.fullmatch(r"(\d+)\*x \+ (\d+) = (\d+)", text).groups())
        assert a * int(x) + b == c


# --- train and test are kept apart


def assert_disjoint(parts: dict[str, set[str]], at_least: int = 1) -> None:
    assert all(len(part) >= at_least for part in parts.values())
    assert len(set().union(*parts.values())) == sum(map(len, parts.values()))


def test_no_question_phrasing_is_in_two_splits():
    for r in relations():
        subject, answer = r.facts[0]
        asked = {s: {fill(t, subject, answer) for t in question_templates(r, s)} for s in SPLITS}
        assert_disjoint(asked, at_least=3)
        assert not set(statement_templates(r, "train")) & set(statement_templates(r, "test")), r.name
    assert "Can you tell me the capital of {s}?" in question_templates(relation("capital"), "dev")
    assert "Tell me the capital of {s}." in question_templates(relation("capital"), "test")
    for op in "+-*":
        assert_disjoint({s: set(sum_templates(op, s)) for s in SPLITS})
    for theme in THEMES:
        assert_disjoint({s: set(theme_templates(theme, s)) for s in SPLITS})
    assert_disjoint({s: set(spelling_templates(s)) for s in SPLITS})
    for intent in IDENTITY + SMALLTALK:
        assert_disjoint({s: set(intent.of(s)) for s in SPLITS})


def test_no_saying_of_small_talk_is_in_both_splits_or_means_two_things():
    sayings = [saying for intent in IDENTITY + SMALLTALK for saying in intent.sayings]
    assert len(sayings) == len(set(sayings))


def test_a_held_out_phrasing_uses_only_words_that_training_has(train_text):
    seen = set(re.findall(r"[\w']+", train_text))
    for r in relations():
        for template in (*question_templates(r, "dev"), *question_templates(r, "test")):
            words = set(re.findall(r"[\w']+", fill(template, *r.facts[0])))
            assert words <= seen, (template, words - seen)


def test_no_held_out_question_stands_in_a_training_document(train_text):
    for i in range(400):
        question = user(conversation("facts", ("dev", "test")[i % 2], i))
        if len(question) > 20:  # a short one may be the end of a longer one ("x if ...?")
            assert f"\n{question} " not in train_text and f"Question: {question}\n" not in train_text


def test_no_held_out_way_to_ask_for_a_sum_or_a_spelling_stands_in_training_text_or_chats(train_text):
    chats = [user(conversation(kind, "train", i)) for kind in ("sums", "spelling") for i in range(4000)]
    text = "\n".join((train_text, *chats))
    held_out = [t for split in ("dev", "test") for t in spelling_templates(split)]
    held_out += [t for split in ("dev", "test") for op in "+-*" for t in sum_templates(op, split)]
    for template in held_out:
        pattern = re.escape(template)
        for slot, value in (("{w}", "[a-z]+"), ("{a}", "[0-9]+"), ("{b}", "[0-9]+")):
            pattern = pattern.replace(re.escape(slot), value)
        assert not re.search(rf"(?<!\w){pattern}", text), template


def test_no_pair_of_operands_is_in_both_splits(train_text):
    def pairs(text):
        return {tuple(sorted((int(a), int(b)))) for a, _, b in SUM.findall(text)}

    def first_calls(kind, split, n):
        calls = (conversation(kind, split, i)["messages"][1]["content"] for i in range(n))
        return pairs(" ".join(next(p["text"] for p in call if p["type"] == "python") for call in calls))

    train = pairs(train_text.replace(" * ", "*").replace(" + ", "+").replace(" - ", "-"))
    train |= first_calls("sums", "train", 2000) | first_calls("word_problems", "train", 2000)
    assert len(train) > 3000 and {split_of_pair(a, b) for a, b in train} == {"train"}
    for split in ("dev", "test"):
        held_out = first_calls("sums", split, 200) | first_calls("word_problems", split, 200)
        assert len(held_out) > 200 and {split_of_pair(a, b) for a, b in held_out} == {split}


@pytest.mark.parametrize("split", ["dev", "test"])
def test_about_one_pair_of_operands_in_sixteen_is_held_out_in_either_order(split):
    grid = [(a, b) for a in range(13, 113) for b in range(13, 113)]
    assert sum(split_of_pair(a, b) == split for a, b in grid) / len(grid) == pytest.approx(1 / 16, abs=0.01)
    assert all(split_of_pair(a, b) == split_of_pair(b, a) for a, b in grid)
    assert all(split_of_pair(a, b) == "train" for a in range(13) for b in range(13))


def test_a_held_out_word_is_never_spelled_nor_written_in_training(train_text):
    assert_disjoint({s: set(real_words(s)) for s in SPLITS}, at_least=30)
    spelled = set(re.findall(r"^(?:.* )?\"?(\w+)\"?:\w(?:,\w)*$", train_text, re.MULTILINE))
    spelled |= {conversation("spelling", "train", i)["answer"] for i in range(2000)}
    assert len(spelled) > 2000
    assert {split_of_word(word) for word in spelled} == {"train"}
    for split in ("dev", "test"):
        assert {conversation("spelling", split, i)["answer"] for i in range(200)} <= set(real_words(split))


# --- conversations


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_conversation_is_well_formed_and_always_the_same(kind, split):
    for i in range(60):
        chat = conversation(kind, split, i)
        check_conversation(chat)
        assert chat == conversation(kind, split, i)
        assert not re.search(
            r"[{}]", json.dumps([m["content"] for m in chat["messages"] if isinstance(m["content"], str)])[1:-1]
        )


@pytest.mark.parametrize(
    ("kind", "split", "index"), [("poems", "train", 0), ("facts", "val", 0), ("facts", "train", -1)]
)
def test_a_conversation_that_does_not_exist_is_refused(kind, split, index):
    with pytest.raises(InputError, match="tinyworld has no"):
        conversation(kind, split, index)


@pytest.mark.parametrize("kind", ["sums", "word_problems"])
def test_tool_calls_return_what_the_calculator_returns(kind):
    for i in range(300):
        parts = conversation(kind, "train", i)["messages"][1]["content"]
        for call, output in pairwise(parts):
            if call["type"] == "python":
                assert output["type"] == "python_output"
                assert output["text"] == calculate(call["text"])


@pytest.mark.parametrize("split", SPLITS)
def test_a_choice_problem_has_five_options_of_which_the_letters_one_is_the_result(split):
    for i in range(200):
        chat = conversation("choice_problems", split, i)
        question, parts = (message["content"] for message in chat["messages"])
        options = dict(re.findall(r"^- (\d+)=([A-E])$", question, re.MULTILINE))
        assert sorted(options.values()) == chat["letters"] == list("ABCDE")
        result = [part["text"] for part in parts if part["type"] == "python_output"][-1]
        assert options[result] == chat["answer_letter"]
        assert parts[-1]["text"].endswith(f"It is {result}={options[result]}\nAnswer: {options[result]}")


def test_a_sum_is_copied_from_the_question_and_ends_with_the_equation():
    for i in range(100):
        chat = conversation("sums", "test", i)
        a, op, b = SUM.fullmatch(chat["expression"]).groups()
        assert re.findall(r"\d+", user(chat)) == [a, b]
        assert reply(chat).endswith(f"{a} {op} {b} = {chat['answer']}.")


def test_the_multiple_choice_frame_is_exact():
    frame = re.compile(
        r"Multiple Choice question: [^\n]+\n"
        r"- ([^\n]+)=A\n- ([^\n]+)=B\n- ([^\n]+)=C\n- ([^\n]+)=D\n\n"
        r"Say the answer, then its letter\."
    )
    golds = []
    for i in range(400):
        chat = conversation("multiple_choice", "test", i)
        choices = frame.fullmatch(user(chat)).groups()
        assert len(set(choices)) == 4
        letter = chat["answer_letter"]
        right = choices[LETTERS.index(letter)]
        assert chat["letters"] == list(LETTERS) and reply(chat).endswith(f" It is {right}={letter}")
        assert right in reply(chat).split(" It is ")[0]  # the sentence before knows it
        golds.append(letter)
    assert all(70 < golds.count(letter) < 130 for letter in LETTERS)


def test_spelling_is_the_word_a_colon_and_letters_with_commas():
    chat = conversation("spelling", "test", 0)
    written = re.search(rf'"?{chat["answer"]}"?', user(chat))[0]  # quoted as in the question
    assert reply(chat) == f"The letters of {written}:{','.join(chat['answer'])}"


# --- checks


def fact(question, answer, *candidates):
    return {"messages": [{"role": "user", "content": question}], "accept": [answer], "candidates": list(candidates)}


@pytest.mark.parametrize(
    ("answer", "candidates", "response", "is_right"),
    [
        ("Paris", ("Rome",), "The capital of France is Paris.", True),
        ("Paris", ("Rome",), "paris", True),
        ("Paris", ("Rome",), "The capital of France is Rome.", False),
        ("Paris", ("Rome",), "Paris or Rome.", False),
        ("Paris", ("Rome",), "Parisian", False),
        ("Paris", ("Rome",), "", False),
        ("Au", ("Ag",), "The chemical symbol of gold is Au.", True),
        ("Au", ("Ag",), "au", False),
        ("one hundred", ("one",), "100 in words is one hundred.", True),
        ("one", ("one hundred",), "1 in words is one hundred.", False),
        ("one", ("twenty",), "twenty-one", False),
        ("Mexico", ("Cuba",), "Mexico City is the capital of Mexico.", True),
    ],
)
def test_a_fact_is_right_when_it_names_the_answer_whole_and_no_other(answer, candidates, response, is_right):
    assert checks.is_right_fact(fact("?", answer, *candidates), response) == is_right


def test_every_reference_answer_is_right_and_anothers_is_wrong():
    for task in (
        tasks.TinyFacts,
        tasks.TinySums,
        tasks.TinyWordProblems,
        tasks.TinySpelling,
        tasks.TinyMC,
        tasks.TinyIdentity,
        tasks.TinyStories,
    ):
        for split in SPLITS:
            examples = list(task(split, size=150))
            assert all(examples[0] is not None and task(split).evaluate(chat, reply(chat)) for chat in examples), task
            assert not any(task(split).evaluate(chat, "Hmm.") for chat in examples), task
            assert not any(task(split).evaluate(chat, "") for chat in examples), task
    for i in range(300):
        chat = conversation("facts", "test", i)
        for other in chat["candidates"]:
            assert not checks.is_right_fact(chat, reply(chat).replace(chat["answer"], other)), (chat, other)


@pytest.mark.parametrize(
    ("response", "is_right"),
    [
        ("The capital of France is Paris. It is Paris=C", True),
        ("It is Paris=C.", True),
        ("Rome=A, no, Paris=C", True),
        ("Paris=C or Rome=A", False),
        ("C", False),
        ("Paris=Cat", False),
        ("", False),
    ],
)
def test_a_choice_is_judged_by_the_last_letter_behind_an_equals_sign(response, is_right):
    assert checks.is_right_choice({"answer_letter": "C"}, response) == is_right


def test_a_sum_is_judged_by_the_last_number_outside_the_tool():
    chat = {"answer": "132"}
    work = "Let me calculate. <|python_start|>47+85<|python_end|><|output_start|>132<|output_end|>"
    assert checks.is_right_sum(chat, work + "47 + 85 = 132.")
    assert not checks.is_right_sum(chat, work + "47 + 85 = 131.")
    assert not checks.is_right_sum(chat, work)
    assert not checks.is_right_sum(chat, "47 + 85 = 1320.")


@pytest.mark.parametrize(
    ("response", "is_right"),
    [
        ("cat:c,a,t", True),
        ("cat: c, a, t", True),
        ("c,a,t", True),
        ("cat:c,a,a,t", False),
        ("cat:c,t,a", False),
        ("cat", False),
    ],
)
def test_a_spelling_must_have_each_letter_once_in_order(response, is_right):
    assert checks.is_right_spelling({"answer": "cat"}, response) == is_right


# --- tasks


def test_the_tasks_of_the_stages_have_distinct_conversations():
    mid, sft = (mixtures.read_table(stage, "tinyworld", "tinyworld") for stage in ("mid", "sft"))
    for a, b in zip(mid.train, sft.train, strict=True):
        assert (a.task, a.first + a.rows) == (b.task, b.first)
    assert all(row.split == "train" for row in mid.train + sft.train)
    assert all(row.split == "dev" for row in mid.validation + sft.validation)
    assert tasks.TinyFacts("test", stop=10)[3] == conversation("facts", "test", 3)
    assert tasks.TinyMC("test").eval_type == "generative" and tasks.RL_TASK("train").eval_type == "generative"
    with pytest.raises(InputError, match="no split"):
        tasks.TinyFacts("validation")


# --- the bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_core_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


def bundle_items(bundle):
    """(task type, item) of every item."""
    for task in yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]:
        for line in (bundle / "eval_data" / task["dataset_uri"]).read_text().splitlines():
            yield task["icl_task_type"], json.loads(line)


def test_the_bundle_has_the_format_of_core(bundle):
    listed = yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]
    rows = list(csv.DictReader((bundle / "eval_meta_data.csv").read_text().splitlines()))
    assert [t["label"] for t in listed] == [r["Eval Task"] for r in rows]
    assert all(t["label"].startswith("tinyworld_") for t in listed)
    assert {t["icl_task_type"] for t in listed} == {"multiple_choice", "schema", "language_modeling"}
    baselines = {"multiple_choice": "25", "schema": "50", "language_modeling": "0"}
    for task, row in zip(listed, rows, strict=True):
        items = (bundle / "eval_data" / task["dataset_uri"]).read_text().splitlines()
        assert 30 <= len(items) <= 100 and int(row["#datapoints"]) == len(items) == len(set(items))
        assert row["Random baseline"] == baselines[task["icl_task_type"]]
    fields = {
        "multiple_choice": {"query", "choices", "gold"},
        "schema": {"context_options", "continuation", "gold"},
        "language_modeling": {"context", "continuation"},
    }
    assert all(set(item) == fields[kind] for kind, item in bundle_items(bundle))


def test_the_bundle_asks_what_training_never_says(bundle, train_text):
    for kind, item in bundle_items(bundle):
        if kind == "schema":
            assert f"{item['context_options'][item['gold']]} {item['continuation']}" not in train_text
        elif kind == "language_modeling":
            assert f"{item['context']} {item['continuation']}." not in train_text
        else:
            assert f"{item['query']} {item['choices'][item['gold']]}." not in train_text


def test_writing_the_bundle_again_changes_nothing_and_a_broken_one_is_replaced(tmp_path):
    directory = write_core_bundle(tmp_path / "bundle")
    before = {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    inode = directory.stat().st_ino
    write_core_bundle(directory)
    assert directory.stat().st_ino == inode
    (directory / "core.yaml").write_text("half")
    write_core_bundle(directory)
    assert {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_drill_asks_many_questions_about_one_list_and_each_letter_stands_by_its_answer():
    from nanochat.data.tinyworld import multiple_choice

    for seed in range(50):
        questions = multiple_choice.drill(random.Random(seed))
        assert len({q.choices for q in questions}) == 1 and len(set(questions[0].choices)) == 4
        named, known = questions[:3], questions[3:]
        assert all(q.choices[q.gold] in q.text and q.reply == f"It is {q.choices[q.gold]}={q.letter}" for q in named)
        assert all(q.choices[q.gold] in q.reason and q.reply.startswith(q.reason) for q in known) and len(known) == 3
