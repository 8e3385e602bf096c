"""CORE: prompts, scored tokens and decisions, on items whose answers can be worked out by hand."""

import math
import random
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanochat.config import InputError
from nanochat.evals.bundle import (
    CORE_LABELS,
    Bundle,
    CoreTask,
    check_item,
    open_bundle,
    read_bundle,
    unpack_bundle,
)
from nanochat.evals.core import CoreResult, TaskScore, evaluate_core
from nanochat.evals.core_identity import score_example
from nanochat.evals.core_rules import (
    Example,
    Prompt,
    common_prefix,
    crop_left,
    fewshot_indices,
    guess_accuracy,
    majority_accuracy,
    render_prompts,
    scored_spans,
)
from nanochat.runtime import Runtime

HUB_BUNDLE = Path(__file__).parents[2] / "shared" / "hub" / "eval_bundle"
needs_hub = pytest.mark.skipif(not HUB_BUNDLE.exists(), reason="no ../shared/hub/eval_bundle beside the repository")
CPU = Runtime(torch.device("cpu"), torch.float32)
BOS = 256

# label: (examples, guessing %, right answers, centered as printed) of the reference run
REFERENCE = {
    "hellaswag_zeroshot": (10042, 25, 2497, "-0.0018"),
    "jeopardy": (2117, 0, 0, "0.0000"),
    "bigbench_qa_wikidata": (20321, 0, 10, "0.0005"),
    "arc_easy": (2376, 25, 816, "0.1246"),
    "arc_challenge": (1172, 25, 261, "-0.0364"),
    "copa": (100, 50, 48, "-0.0400"),
    "commonsense_qa": (1221, 20, 239, "-0.0053"),
    "piqa": (1838, 50, 992, "0.0794"),
    "openbook_qa": (500, 25, 111, "-0.0373"),
    "lambada_openai": (5153, 0, 98, "0.0190"),
    "hellaswag": (10042, 25, 2460, "-0.0067"),
    "winograd": (273, 50, 148, "0.0842"),
    "winogrande": (1267, 50, 635, "0.0024"),
    "bigbench_dyck_languages": (1000, 0, 8, "0.0080"),
    "agi_eval_lsat_ar": (230, 20, 52, "0.0326"),
    "bigbench_cs_algorithms": (1320, 0, 31, "0.0235"),
    "bigbench_operators": (210, 0, 13, "0.0619"),
    "bigbench_repeat_copy_logic": (32, 0, 0, "0.0000"),
    "squad": (10570, 0, 4, "0.0004"),
    "coqa": (7983, 0, 7, "0.0009"),
    "boolq": (3270, 62, 1845, "-0.1468"),
    "bigbench_language_identification": (10000, 9.1, 2519, "0.1770"),
}


class Bytes:
    """One token a byte, and BOS."""

    fingerprint = "bytes"

    def get_bos_token_id(self):
        return BOS

    def get_vocab_size(self):
        return 257

    def encode(self, texts, prepend=None):
        return [([] if prepend is None else [prepend]) + list(text.encode()) for text in texts]

    def encode_to_arrays(self, texts, prepend):
        return [np.array(ids, np.int32) for ids in self.encode(texts, prepend)]


class Alphabet:
    """A model that expects after each token the one of the next number."""

    config = SimpleNamespace(max_positions=100_000)

    def __call__(self, idx):
        return 5.0 * torch.nn.functional.one_hot((idx + 1) % 257, 257).float()  # (B, T, V)


class Hash(Alphabet):
    """Any fixed preferences that depend on all earlier tokens."""

    def __call__(self, idx):
        state = torch.cumsum(idx * 7919 + 13, dim=1) % 1009  # (B, T)
        return torch.sin(state[..., None] * torch.arange(1, 258) * 0.37) * 3


def task(kind, items, shots=0, delimiter=" ", baseline=0.0, label="t"):
    return CoreTask(label, kind, shots, delimiter, baseline, lambda: list(items))


def accuracy(kind, items, model=None, max_per_task=None, **kwargs):
    bundle = Bundle("test", (task(kind, items, **kwargs),))
    return evaluate_core(model or Alphabet(), Bytes(), CPU, bundle, max_per_task).tasks[0].accuracy


@pytest.mark.parametrize("label", CORE_LABELS)
def test_the_reference_runs_counts_give_its_centered_scores(label):
    n, percent, correct, printed = REFERENCE[label]
    assert f"{TaskScore(label, correct, n, percent / 100).centered:.4f}" == printed


def test_the_reference_runs_counts_give_its_core_metric():
    scores = [TaskScore(label, c, n, percent / 100) for label, (n, percent, c, _) in REFERENCE.items()]
    assert f"{CoreResult('CORE metric', tuple(scores)).core_metric:.4f}" == "0.0155"


def test_standard_errors_are_those_of_a_share_and_of_a_mean():
    half = TaskScore("t", 50, 100, 0.5)  # sqrt(.5 * .5 / 100) = .05, and the scale is 1 / (1 - .5)
    assert half.stderr == pytest.approx(0.1)
    assert CoreResult("CORE metric", (half, half)).stderr == pytest.approx(0.1 / math.sqrt(2))


def test_a_95_percent_interval_holds_at_the_ends_too():
    low, high = TaskScore("t", 50, 100, 0.5).interval  # Wilson's, as tables have it
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    low, high = TaskScore("t", 0, 10, 0.0).interval
    assert low == 0 and high == pytest.approx(0.2775, abs=1e-4)
    result = CoreResult("CORE metric", (TaskScore("t", 50, 100, 0.5),))
    assert result.interval == (pytest.approx(-0.196, abs=1e-3), pytest.approx(0.196, abs=1e-3))


def test_controls_are_what_no_model_would_reach():
    items = [{"query": "", "choices": ["a", "b"], "gold": 1}] * 3 + [{"query": "", "choices": list("abcd"), "gold": 0}]
    assert guess_accuracy("multiple_choice", items) == (3 / 2 + 1 / 4) / 4
    assert majority_accuracy("multiple_choice", items) == 3 / 4
    free = [{"context": "", "continuation": c} for c in "aab"]
    assert guess_accuracy("language_modeling", free) == 0
    assert majority_accuracy("language_modeling", free) == pytest.approx(2 / 3)
    tasks = (
        TaskScore("x", 9, 10, 0.5, guess=0.5, majority=0.75),
        TaskScore("y", 0, 10, 0.0, guess=0.0, majority=0.1),
    )
    result = CoreResult("CORE metric", tasks)
    assert result.control("guess") == 0 and result.control("majority") == pytest.approx((0.5 + 0.1) / 2)


def test_the_common_prefix_ends_where_the_first_of_all_differs():
    for seed in range(200):
        rng = random.Random(seed)
        rows = [[rng.randrange(2) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 4))]
        expected = 0
        while all(len(r) > expected for r in rows) and len({r[expected] for r in rows}) == 1:
            expected += 1
        assert common_prefix(rows) == expected


def test_multiple_choice_prompts_differ_in_the_choice_only():
    items = [
        {"query": "q1", "choices": ["x", "y"], "gold": 1},
        {"query": "q2", "choices": ["u", "v"], "gold": 0},
    ]
    prompts = render_prompts(task("multiple_choice", items, delimiter="\nAnswer: "), items[1], items[:1])
    assert prompts == ["q1\nAnswer: y\n\nq2\nAnswer: u", "q1\nAnswer: y\n\nq2\nAnswer: v"]


def test_schema_prompts_differ_in_the_context_only():
    item = {"context_options": ["Ann", "Bob"], "continuation": "won.", "gold": 1}
    assert render_prompts(task("schema", []), item, [item]) == [
        "Bob won.\n\nAnn won.",
        "Bob won.\n\nBob won.",
    ]


def test_language_modeling_prompts_are_trimmed_and_the_first_ends_without_a_space():
    item = {"context": " one two ", "continuation": "three"}
    prompts = render_prompts(task("language_modeling", []), item, [item])
    assert prompts == ["one two three\n\none two", "one two three\n\none two three"]


def test_multiple_choice_scores_what_follows_the_common_prefix():
    assert [p.start for p in scored_spans("multiple_choice", [[9, 1, 2, 3], [9, 1, 4]])] == [2, 2]


def test_a_choice_that_begins_all_others_still_has_a_scored_token():
    assert [p.start for p in scored_spans("multiple_choice", [[9, 1, 2], [9, 1, 2, 3]])] == [2, 2]
    item = {
        "query": "Q",
        "choices": ["b", "bcdef"],
        "gold": 1,
    }  # one surprise alone, or shared with four sure tokens
    assert accuracy("multiple_choice", [item]) == 1


def test_schema_scores_the_common_suffix():
    assert [p.start for p in scored_spans("schema", [[9, 1, 5, 6], [9, 2, 3, 5, 6]])] == [2, 3]
    assert [p.start for p in scored_spans("schema", [[9, 5, 6], [9, 5, 6]])] == [1, 1]  # never BOS


def test_language_modeling_scores_what_the_continuation_adds():
    assert scored_spans("language_modeling", [[9, 1, 2], [9, 1, 2, 3, 4]]) == [Prompt([9, 1, 2, 3, 4], 3)]


@pytest.mark.parametrize(("gold", "right"), [(0, 0.0), (1, 1.0)])
def test_the_choice_with_the_lowest_mean_loss_is_taken(gold, right):
    # by total loss "z" would win: one surprise against the one of "acdefgh"
    item = {"query": "Q", "choices": ["z", "acdefgh"], "gold": gold}
    assert accuracy("multiple_choice", [item]) == right


def test_the_schema_option_after_which_the_continuation_is_likely_is_taken():
    item = {"context_options": ["b", "y"], "continuation": "z", "gold": 1}
    assert accuracy("schema", [item], delimiter="") == 1
    assert accuracy("schema", [{**item, "gold": 0}], delimiter="") == 0


def test_language_modeling_counts_only_when_every_token_is_the_greedy_one():
    assert accuracy("language_modeling", [{"context": "ab", "continuation": "cde"}], delimiter="") == 1
    assert accuracy("language_modeling", [{"context": "ab", "continuation": "cdd"}], delimiter="") == 0


def test_a_model_of_nan_is_right_about_nothing():
    class Broken(Alphabet):
        def __call__(self, idx):
            return torch.full((*idx.shape, 257), math.nan)

    assert accuracy("multiple_choice", [{"query": "a", "choices": ["b", "c"], "gold": 0}], Broken()) == 0


def test_examples_are_shuffled_with_seed_1337_and_cropped():
    # only items 0 and 1 are solved; which of ten come first follows from the seed
    solved = {"context": "ab", "continuation": "c"}, {"context": "ab", "continuation": "z"}
    items = [solved[0 if i < 2 else 1] for i in range(10)]
    order = list(range(10))
    random.Random(1337).shuffle(order)
    expected = sum(i < 2 for i in order[:4]) / 4
    assert accuracy("language_modeling", items, delimiter="", max_per_task=4) == expected


def test_shots_are_drawn_with_seed_1234_plus_position_from_the_other_examples():
    assert fewshot_indices(3, 2, 6, 100) == random.Random(1237).sample([0, 1, 2, 4, 5], 2)
    for index in range(12):
        drawn = fewshot_indices(index, 10, 12, 100)
        assert index not in drawn and len(set(drawn)) == 10 and max(drawn) < 12


@pytest.mark.parametrize(("num_examples", "num_items", "expected"), [(10, 50, 10), (11, 50, 10), (2, 4, 3), (1, 1, 0)])
def test_fewer_examples_than_shots_draw_from_the_whole_data_set(num_examples, num_items, expected):
    drawn = fewshot_indices(0, 10, num_examples, num_items)
    assert len(drawn) == expected and all(0 < i < num_items for i in drawn)


def test_a_long_prompt_loses_its_beginning_but_not_bos():
    assert crop_left(Prompt([9, 1, 2, 3, 4, 5], 4), 4) == Prompt([9, 3, 4, 5], 2)
    assert crop_left(Prompt([9, 1, 2], 1), 3) == Prompt([9, 1, 2], 1)
    assert crop_left(Prompt([9, 1, 2, 3], 1), 2) == Prompt([9, 3], 1)


def test_a_prompt_and_an_answer_beyond_the_limit_are_told(capsys):
    class Short(Alphabet):
        config = SimpleNamespace(max_positions=8)

    items = [{"context": "ab", "continuation": "c"}, {"context": "x" * 20, "continuation": "c"}]
    items.append({"context": "a", "continuation": "bcdefghijkl"})
    bundle = Bundle("test", (task("language_modeling", items, delimiter=""),))
    (score,) = evaluate_core(Short(), Bytes(), CPU, bundle).tasks
    assert (score.num_cropped, score.num_cut) == (2, 1)
    told = capsys.readouterr().out
    assert "2 longer than the context | 1 with an answer longer than the context" in told


def test_no_prompt_is_longer_than_the_models_limit():
    class Short(Alphabet):
        config = SimpleNamespace(max_positions=8)

        def __call__(self, idx):
            assert idx.shape[1] <= 8 and (idx[:, 0] == BOS).all()
            return super().__call__(idx)

    item = {"context": "long " * 20 + "ab", "continuation": "c"}
    assert accuracy("language_modeling", [item], Short(), delimiter="") == 1


def random_items(kind, n, seed):
    rng = random.Random(seed)

    def word():
        return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, 12))).strip() or "a"

    if kind == "multiple_choice":
        return [{"query": word(), "choices": [word() for _ in range(4)], "gold": rng.randrange(4)} for _ in range(n)]
    if kind == "schema":
        return [
            {"context_options": [word(), word()], "continuation": word(), "gold": rng.randrange(2)} for _ in range(n)
        ]
    return [{"context": word(), "continuation": word()} for _ in range(n)]


def plain_correct(kind, items, shots, delimiter):
    """The definition again, one example and one prompt at a time."""
    items = list(items)
    random.Random(1337).shuffle(items)
    t, correct = task(kind, [], shots, delimiter), 0
    for i, item in enumerate(items):
        others = [j for j in range(len(items)) if j != i]
        chosen = [items[j] for j in random.Random(1234 + i).sample(others, shots)]
        spans = scored_spans(kind, Bytes().encode(render_prompts(t, item, chosen), prepend=BOS))
        scores = [score_example(Hash(), Example(kind, (p,), 0), CPU.device)[0] for p in spans]
        if kind == "language_modeling":
            correct += scores[0].greedy
        else:
            losses = [score.loss for score in scores]
            correct += losses.index(min(losses)) == item["gold"]
    return correct


@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
@pytest.mark.parametrize("shots", [0, 3])
def test_an_example_is_decided_as_one_prompt_at_a_time(kind, shots):
    items = random_items(kind, 40, seed=1)
    got = accuracy(kind, items, Hash(), shots=shots)
    assert got * 40 == pytest.approx(plain_correct(kind, items, shots, " "))
    if kind != "language_modeling":
        assert 0 < got < 1


def named_bundle(labels, name="eval_bundle"):
    return Bundle(name, tuple(task("schema", [], label=label) for label in labels))


def test_only_all_22_tasks_are_called_core():
    assert named_bundle(CORE_LABELS).metric_name == "CORE metric"
    assert named_bundle(CORE_LABELS[:-1]).metric_name == "CORE metric (21 of 22 tasks)"
    assert named_bundle(CORE_LABELS, "tinyworld").metric_name == "CORE tinyworld"
    assert named_bundle(["capitals"], "mine").metric_name == "CORE custom (mine)"


def write_bundle(folder, items=('{"context": "ab\u2028", "continuation": "c"}',), label="copa", baseline="50"):
    (folder / "eval_data").mkdir(parents=True)
    (folder / "core.yaml").write_text(
        f"icl_tasks:\n- label: {label}\n  dataset_uri: t.jsonl\n  num_fewshot: [10]\n"
        '  icl_task_type: language_modeling\n  continuation_delimiter: "\\nA: "\n'
    )
    (folder / "eval_meta_data.csv").write_text(f"Eval Task,Random baseline\ncopa,{baseline}\n")
    (folder / "eval_data" / "t.jsonl").write_text("\n".join(items) + "\n", encoding="utf-8")
    return folder


def zip_of(folder, path):
    with zipfile.ZipFile(path, "w") as z:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                z.write(file, Path("eval_bundle") / file.relative_to(folder))
    return path


def test_a_folder_and_its_zip_are_the_same_bundle(tmp_path):
    folder = write_bundle(tmp_path / "eval_bundle")
    for path in (folder, zip_of(folder, tmp_path / "copy.zip")):
        (t,) = read_bundle(path).tasks
        assert (t.label, t.kind, t.num_fewshot, t.delimiter, t.baseline) == (
            "copa",
            "language_modeling",
            10,
            "\nA: ",
            0.5,
        )
        assert t.read() == [{"context": "ab\u2028", "continuation": "c"}]


def test_a_missing_data_file_is_named_before_anything_runs(tmp_path):
    folder = write_bundle(tmp_path / "b")
    (folder / "eval_data" / "t.jsonl").unlink()
    with pytest.raises(InputError, match=r"task copa has no data file eval_data/t\.jsonl .* remove the task"):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("not json", "no JSON"),
        ("[1]", "no JSON object"),
        ('{"context": "a"}', "no text 'continuation'"),
        ('{"context": 5, "continuation": "a"}', "no text 'context'"),
        ('{"context": "a", "continuation": ""}', "no text 'continuation'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, wrong):
    good = '{"context": "", "continuation": "c"}'
    folder = write_bundle(tmp_path / "b", items=[good, "", line])
    with pytest.raises(InputError, match=rf"^line 3 of eval_data/t\.jsonl \(task copa in .*\): {wrong}"):
        read_bundle(folder).tasks[0].read()


@pytest.mark.parametrize(
    ("kind", "item", "wrong"),
    [
        ("multiple_choice", {"query": "q", "choices": ["a", "b"]}, "'gold' None"),
        ("multiple_choice", {"query": "q", "choices": ["a", "b"], "gold": 2}, "'gold' 2 .* 0 to 1"),
        ("multiple_choice", {"query": "q", "choices": ["a", "b"], "gold": True}, "'gold' True"),
        ("multiple_choice", {"query": "q", "choices": ["a"], "gold": 0}, "'choices'"),
        ("multiple_choice", {"query": "q", "choices": ["a", 1], "gold": 0}, "'choices'"),
        ("schema", {"context_options": "ab", "continuation": "c", "gold": 0}, "'context_options'"),
    ],
)
def test_an_item_that_cannot_be_scored_is_named(kind, item, wrong):
    with pytest.raises(InputError, match=wrong):
        check_item(kind, item)


def test_a_task_without_items_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"eval_data/t\.jsonl \(task copa in .*\) has no line"):
        read_bundle(write_bundle(tmp_path / "b", items=[""])).tasks[0].read()


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("core.yaml", "icl_tasks: [", "core.yaml in .* is no YAML"),
        ("core.yaml", "tasks: []", "no list icl_tasks"),
        ("core.yaml", "icl_tasks:\n- label: copa\n", "task 1 in core.yaml .* has no dataset_uri"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\ncopa,half\n", "baseline of copa .* 'half'"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\ncopa,100\n", "baseline of copa .* '100'"),
        ("eval_meta_data.csv", "a,b\n1,2\n", "no columns"),
    ],
)
def test_a_broken_table_of_a_bundle_is_named(tmp_path, name, text, wrong):
    folder = write_bundle(tmp_path / "b")
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=wrong):
        read_bundle(folder)


def test_a_task_of_an_unknown_type_is_refused(tmp_path):
    folder = write_bundle(tmp_path / "b")
    (folder / "core.yaml").write_text((folder / "core.yaml").read_text().replace("language_modeling", "essay"))
    with pytest.raises(InputError, match=r"task copa .* has type essay; known are multiple_choice, schema"):
        read_bundle(folder)


def test_a_task_without_a_baseline_is_refused(tmp_path):
    with pytest.raises(InputError, match="task other has no row"):
        read_bundle(write_bundle(tmp_path / "b", label="other"))


@pytest.mark.parametrize("name", ["absent", "file.txt", "empty"])
def test_what_is_no_bundle_is_refused(tmp_path, name):
    (tmp_path / "file.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name):
        open_bundle(str(tmp_path / name))


def test_a_damaged_download_leaves_no_bundle(tmp_path):
    archive = zip_of(write_bundle(tmp_path / "src"), tmp_path / "b.zip")
    data = bytearray(archive.read_bytes())
    data[data.index(b'"context"')] ^= 1
    archive.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        unpack_bundle(archive, tmp_path / "eval_bundle")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.zip", "src"]


def test_unpacking_replaces_a_half_unpacked_folder(tmp_path):
    archive = zip_of(write_bundle(tmp_path / "src"), tmp_path / "b.zip")
    (tmp_path / "eval_bundle" / "eval_data").mkdir(parents=True)
    unpack_bundle(archive, tmp_path / "eval_bundle")
    assert len(read_bundle(tmp_path / "eval_bundle").tasks) == 1


def test_the_base_directorys_bundle_comes_before_the_hubs(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(tmp_path / "hub"))
    write_bundle(tmp_path / "hub" / "eval_bundle", baseline="25")
    assert open_bundle().tasks[0].baseline == 0.25
    write_bundle(tmp_path / "base" / "eval_bundle", baseline="50")
    assert open_bundle().tasks[0].baseline == 0.5


@needs_hub
def test_the_real_bundle_has_the_reference_runs_tasks_counts_and_baselines():
    bundle = read_bundle(HUB_BUNDLE)
    assert bundle.metric_name == "CORE metric (21 of 22 tasks)"  # coqa's data could not be had
    assert [t.label for t in bundle.tasks] == [label for label in CORE_LABELS if label != "coqa"]
    for t in bundle.tasks:
        n, percent = REFERENCE[t.label][:2]
        assert t.baseline == pytest.approx(percent / 100), t.label
        if n < 3000:  # the small ones, for time's sake
            assert len(t.read()) == n, t.label


@needs_hub
def test_a_random_model_runs_all_tasks_of_the_real_bundle(tmp_path, monkeypatch):
    """Fewer examples than shots; byte tokens, so squad's ten shots are beyond the model's positions."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    gpt = pytest.importorskip("nanochat.gpt")
    torch.manual_seed(0)
    config = gpt.GPTConfig(sequence_len=64, vocab_size=257, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)
    model = gpt.GPT(config)
    model.init_weights()
    result = evaluate_core(model, Bytes(), CPU, read_bundle(HUB_BUNDLE), max_per_task=2)
    assert len(result.tasks) == 21 and all(t.num_examples == 2 for t in result.tasks)
    assert all(t.num_correct == 0 for t in result.tasks if t.label in ("squad", "jeopardy"))
    assert math.isfinite(result.core_metric)
