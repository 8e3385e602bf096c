"""Models carried to transformers and back: the same logits, the same greedy text, the same bits."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint, environment
from nanochat.exports import huggingface
from nanochat.gpt import GPT
from nanochat.report import get_report
from nanochat.runtime import Runtime
from nanochat.scaling import EXTRAS
from nanochat.tok_eval_texts import TEXTS
from nanochat.tokenizer import Tokenizer, get_tokenizer
from scripts import export
from tests.conftest import save_checkpoint, tiny_gpt

transformers = pytest.importorskip("transformers")

RT = Runtime(torch.device("cpu"), torch.float32)
VOCAB = 301  # no multiple of 64, and 3 more than the tokenizer's
TOKENIZER = Tokenizer.train_from_iterator(TEXTS.values(), 298)
CACHE = "cache" if hasattr(transformers.modeling_outputs.CausalLMOutputWithPast(), "cache") else "past_key_values"
BOS, END = TOKENIZER.get_bos_token_id(), TOKENIZER.encode_special("<|assistant_end|>")
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, grouped heads": {"n_kv_head": 2},
    "plain, windows": {"window_pattern": "SL"},
    "modern": {"arch": "modern"},
    "modern, grouped heads, windows": {"arch": "modern", "n_kv_head": 1, "n_layer": 4, "window_pattern": "SL"},
    **{f"modern, only {extra}": {"arch": "modern", "extras": (extra,)} for extra in EXTRAS},
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": [{"type": "python", "text": "2+2"}, {"type": "python_output", "text": "4"}]},
    {"role": "user", "content": "  And\n twice that?\n"},
]


@pytest.fixture(scope="module", autouse=True)
def _modules_cache(tmp_path_factory):
    """Where transformers copies a folder's own class to: not into a home folder."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a thousand tiny products, in which two threads mostly wait for each other
        yield
        torch.set_num_threads(threads)


def make_model(name: str) -> GPT:
    """Random in every weight; short windows of 5 positions, so that tests of 16 see their edge."""
    sizes = {"short_window": 5} if "windows" in name else {}
    model = tiny_gpt(vocab_size=VOCAB, **sizes, **MODELS[name])
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory) -> tuple[GPT, Any]:
    """Our model, and what transformers loads from its export."""
    model = make_model(request.param)
    folder = tmp_path_factory.mktemp("exported")
    huggingface.write_model(folder, model, TOKENIZER, {})
    return model, load(folder)


def load(folder: Path, **settings: Any) -> Any:
    modern = (folder / huggingface.MODERN_FILE.name).exists()
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=modern, output_loading_info=True, **settings
    )
    assert not any(report.values()), report
    assert type(loaded).__name__ == ("NanoChatModernForCausalLM" if modern else "NanoChatForCausalLM")
    return loaded


def random_ids(rows: int, T: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, T), generator=torch.Generator().manual_seed(1))


def greedy(model: GPT, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What follows prompts of one length, by whole forward passes; up to the first end."""
    ids = torch.tensor(prompts)
    for _ in range(tokens):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return [until_end(row) for row in ids[:, len(prompts[0]) :].tolist()]


def until_end(ids: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(ids) if token in (BOS, END)]
    return ids[: ends[0] + 1] if ends else ids


# What transformers computes --------------------------------------------------------------------------


def test_the_logits_are_ours(pair):
    ours, theirs = pair
    idx = random_ids(2, 40)
    expected = ours(idx)
    assert expected.std() > 1  # far from all equal
    torch.testing.assert_close(theirs(idx).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_is_greedy_token_for_token(pair, use_cache):
    ours, theirs = pair
    prompts = random_ids(4, 9)
    found = theirs.generate(prompts, max_new_tokens=12, do_sample=False, use_cache=use_cache)[:, 9:].tolist()
    assert [until_end(row) for row in found] == greedy(ours, prompts.tolist(), 12)


def test_prompts_of_different_lengths_share_a_batch_behind_padding(pair):
    ours, theirs = pair
    prompts = [random_ids(1, n)[0].tolist() for n in (2, 9)]
    ids = torch.tensor([[END] * (9 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (9 - len(p)) + [1] * len(p) for p in prompts])
    found = theirs.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 9:].tolist()
    assert [until_end(row) for row in found] == [greedy(ours, [prompt], 8)[0] for prompt in prompts]


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(pair):
    ours, theirs = pair
    idx, cache, logits = random_ids(2, 17), transformers.DynamicCache(), []
    for piece in idx.split([1, 7, 1, 8], dim=1):
        logits.append(theirs(piece, use_cache=True, **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(logits, 1), ours(idx), atol=1e-4, rtol=0)


def test_beams_of_a_cache_are_those_without_one(pair):
    _, theirs = pair
    idx = random_ids(1, 6)
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    cached, plain = (theirs.generate(idx, use_cache=use, **settings) for use in (True, False))
    assert cached.tolist() == plain.tolist()


def test_the_loss_is_ours(pair):
    ours, theirs = pair
    idx = random_ids(2, 12)
    expected = ours(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(theirs(idx, labels=idx).loss, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["plain", "modern"])
def test_bfloat16_halves_the_file_and_comes_near(name, tmp_path):
    model = make_model(name)
    for dtype in huggingface.DTYPES:
        (tmp_path / dtype).mkdir()
        huggingface.write_model(tmp_path / dtype, model, TOKENIZER, {}, dtype)
    full, half = ((tmp_path / dtype / "model.safetensors").stat().st_size for dtype in huggingface.DTYPES)
    assert half < 0.6 * full
    theirs = load(tmp_path / "bfloat16", dtype="auto")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    idx = random_ids(1, 20)
    assert (theirs(idx).logits - model(idx)).abs().mean() < 0.2


def test_a_cache_that_the_modern_class_cannot_use_is_refused(tmp_path):
    huggingface.write_model(tmp_path, make_model("modern"), TOKENIZER, {})
    with pytest.raises(ValueError, match="runs with a DynamicCache or none"):
        load(tmp_path).generate(random_ids(1, 4), max_new_tokens=2, cache_implementation="static")


# The tokenizer and the chat template -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "modern"])
def test_a_conversation_becomes_our_ids_and_the_model_answers_it(name, tmp_path):
    model = make_model(name)
    huggingface.write_model(tmp_path, model, TOKENIZER, {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=name == "modern")
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    prompt = TOKENIZER.render_for_completion({"messages": [*CHAT, {"role": "assistant", "content": ""}]})
    assert tokenizer(text, add_special_tokens=False).input_ids == prompt
    assert tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False) == prompt
    found = load(tmp_path).generate(torch.tensor([prompt]), max_new_tokens=6)[0].tolist()
    assert found == prompt + greedy(model, [prompt], 6)[0]  # without a word on sampling


def test_generation_ends_at_the_end_of_the_answer_or_of_the_document(tmp_path):
    huggingface.write_model(tmp_path, make_model("plain"), TOKENIZER, {})
    settings = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (settings.eos_token_id, settings.bos_token_id, settings.pad_token_id) == ([BOS, END], BOS, END)


# There and back --------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base directory with the tokenizer, from which `save` makes checkpoints."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    TOKENIZER.save(environment.base_dir() / "tokenizer")
    return tmp_path


def save(model: GPT, source: str = "sft", tag: str = "d2", step: int = 7, dataset: str = "tinyworld") -> Path:
    meta = {"model_config": model.config.to_dict(), "tokenizer": TOKENIZER.fingerprint}
    meta["user_config"] = {"dataset": dataset}
    return save_checkpoint(checkpoint.tag_directory(source, tag), step, model, None, meta)


@pytest.mark.parametrize("name", MODELS)
def test_what_comes_back_is_bit_equal_and_loads_as_a_checkpoint(name, base, monkeypatch, capsys):
    model = make_model(name)
    save(model, "rl", "d2", 7)
    export.main(["-i", "rl", f"--out={base / 'hf'}"])
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base / "other"))  # no tokenizer there yet
    export.main([f"--import_from={base / 'hf'}"])
    loaded, tokenizer, meta = checkpoint.load_model("rl", RT)
    assert (meta["tag"], meta["step"], meta["user_config"]["dataset"]) == ("d2", 7, "tinyworld")
    assert loaded.config == model.config
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert "Exported d2, stage rl, step 7 to" in capsys.readouterr().out


def test_an_import_takes_stage_tag_and_step_from_the_command_line(base):
    save(make_model("plain"))
    export.main([f"--out={base / 'hf'}"])
    export.main([f"--import_from={base / 'hf'}", "-i", "base", "-g", "copy", "-s", "40"])
    assert checkpoint.find("base", "copy", 40).exists()


@pytest.mark.parametrize("name", ["plain", "modern"])
def test_what_transformers_saved_again_comes_back_too(name, base):
    model = make_model(name)
    huggingface.write_model(base, model, TOKENIZER, {})
    load(base).save_pretrained(base / "again")
    shutil.copy(base / "tokenizer.json", base / "again")
    config, weights, _, _ = huggingface.read_model(base / "again")
    assert config == model.config
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_a_bfloat16_folder_comes_back_as_fp32(base):
    model = make_model("plain")
    huggingface.write_model(base, model, TOKENIZER, {}, "bfloat16")
    _, weights, _, _ = huggingface.read_model(base)
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight.bfloat16().float())


def change_config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def change_weights(name: str, value: torch.Tensor | None) -> Any:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights.pop(name, None)
        save_file({**weights, **({} if value is None else {name: value})}, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "is no folder of a model: config.json: No such file"),
        (lambda f: (f / "config.json").write_text("{"), "is no folder of a model: config.json: Expecting"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds no object"),
        (change_config(model_type="llama"), "a model of type 'llama'; nanochat reads nanochat and nanochat_modern"),
        (change_config(hidden_act="silu"), "does not describe a model of nanochat: its hidden_act 'silu'"),
        (change_config(rope_parameters={"rope_theta": 5e5}), "its rope_theta 500000.0"),
        (change_config(num_attention_heads=0), "does not describe a model of nanochat: "),
        (change_config(num_attention_heads="4"), "does not describe a model of nanochat: "),
        (change_config(hidden_size=64, intermediate_size=256), "model.safetensors does not fit config.json: "),
        (change_config(num_hidden_layers=3), "does not fit config.json: model.layers.2.mlp.fc1.weight"),
        (change_weights("lm_head.weight", None), "does not fit config.json: lm_head.weight"),
        (change_weights("lm_head.bias", torch.zeros(3)), "does not fit config.json: lm_head.bias"),
        (change_weights("lm_head.weight", torch.full((VOCAB, 32), torch.nan)), "lm_head.weight hold values that are"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 20), "cannot read model.safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), "cannot read the tokenizer"),
        (lambda f: shutil.rmtree(f), "is no folder of a model"),
    ],
)
def test_a_folder_that_is_no_such_model_is_refused_in_one_line(change, message, base, capsys):
    (base / "hf").mkdir()
    huggingface.write_model(base / "hf", make_model("plain"), TOKENIZER, {})
    change(base / "hf")
    error = refused([f"--import_from={base / 'hf'}", "-i", "sft"], capsys)
    assert message in error
    assert not (environment.base_dir() / "chatsft_checkpoints").exists() or "not finite" in error


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        export.main(argv)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_an_import_replaces_neither_checkpoints_nor_the_tokenizer(base, capsys, monkeypatch):
    save(make_model("plain"))
    export.main([f"--out={base / 'hf'}"])
    argv = [f"--import_from={base / 'hf'}"]
    assert "has checkpoints, which an import does not replace; choose another tag by -g" in refused(argv, capsys)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base / "other"))
    Tokenizer.train_from_iterator(["another text"], 270).save(environment.base_dir() / "tokenizer")
    assert "has another tokenizer" in refused(argv, capsys)


def test_a_folder_of_unknown_stage_needs_one_named(base, capsys):
    (base / "hf").mkdir()
    huggingface.write_model(base / "hf", make_model("plain"), TOKENIZER, {})
    assert "give -i base, mid, sft or rl" in refused([f"--import_from={base / 'hf'}"], capsys)
    assert "step -1 must be 0 or more" in refused([f"--import_from={base / 'hf'}", "-i", "mid", "-s", "-1"], capsys)
    change_config(nanochat={"source": ["sft"], "tag": 5, "step": "x"})(base / "hf")
    export.main([f"--import_from={base / 'hf'}", "-i", "mid"])
    assert checkpoint.find("mid", "d2", 0).exists()
    assert get_tokenizer().metadata["imported from"] == str(base / "hf")


# The folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either --out, the folder to write, or --import_from"),
        (["--out=a", "--import_from=b"], "give either --out"),
        (["--out=a", "-i", "pretraining"], "invalid choice"),
        (["--out=a", "-i", "mid"], "no mid checkpoint in"),
        (["--out=a", "-g", "d9"], "no sft checkpoint with tag 'd9'"),
        (["--out=a", "--dtype=int8"], "invalid choice"),
        (["--out=a", "--to=gguf"], "llama.cpp has no architecture for this model"),
    ],
)
def test_wrong_use_ends_in_one_line(argv, message, base, monkeypatch, capsys):
    monkeypatch.chdir(base)
    save(make_model("plain"))
    assert message in refused(argv, capsys)
    assert not (base / "a").exists()


def test_the_gguf_package_still_knows_no_architecture_for_this_model():
    """The day it does, --to=gguf can be written: then this test fails."""
    gguf = pytest.importorskip("gguf")
    assert "NANOCHAT" not in gguf.MODEL_ARCH.__members__


def test_a_folder_with_anything_in_it_is_left_alone(base, capsys):
    save(make_model("plain"))
    out = base / "hf"
    out.mkdir()
    export.main([f"--out={out}"])  # empty: taken
    assert "is an earlier export; --force replaces it" in refused([f"--out={out}"], capsys)
    (out / "mine.txt").write_text("x")
    export.main([f"--out={out}", "--force"])
    assert not (out / "mine.txt").exists()
    for name in ("config.json", "notes.txt"):
        other = base / f"other-{name}"
        other.mkdir()
        (other / name).write_text("{}")
        assert "is no export of ours; choose another --out" in refused([f"--out={other}", "--force"], capsys)
        assert (other / name).read_text() == "{}"
    assert "is no export of ours" in refused([f"--out={other / name}"], capsys)
    assert "cannot write" in refused([f"--out={other / name / 'below'}"], capsys)


def test_a_full_disk_leaves_nothing_or_what_was_there(base, capsys, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> None:
        raise huggingface.SafetensorError("I/O error: No space left on device (os error 28)")

    save(make_model("plain"))
    export.main([f"--out={base / 'old'}"])
    before = (base / "old" / "model.safetensors").read_bytes()
    monkeypatch.setattr(huggingface, "save_file", full)
    for name in ("old", "new"):
        error = refused([f"--out={base / name}", "--force"], capsys)
        assert f"cannot write {base / name}: I/O error: No space left on device" in error
    assert (base / "old" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in base.iterdir()) == ["base", "old"]


def test_a_killed_export_is_cleared_by_the_next(base, monkeypatch):
    save(make_model("plain"))
    out = base / "hf"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(huggingface.shutil, "rmtree", lambda *a, **kw: None)
        with huggingface.staged(out) as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt
    assert not out.exists()
    export.main([f"--out={out}"])
    assert sorted(p.name for p in base.iterdir()) == ["base", "hf"]
    assert not (out / "half").exists()


def test_only_the_class_in_the_folder_needs_transformers():
    root = Path(export.__file__).parents[1]
    sources = [p for room in ("nanochat", "scripts", "tasks") for p in (root / room).rglob("*.py")]
    users = {p.name for p in sources for node in ast.walk(ast.parse(p.read_text())) if imports(node, "transformers")}
    assert users == {"modeling_nanochat_modern.py"}


def imports(node: ast.AST, package: str) -> bool:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return any(name.split(".")[0] == package for name in names)


def test_a_checkpoint_that_transformers_does_not_know_says_so(base, capsys):
    save(make_model("modern"))
    export.main([f"--out={base / 'hf'}"])
    assert "(needs trust_remote_code=True)" in capsys.readouterr().out
    names = {p.name for p in (base / "hf").iterdir()}
    assert names == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "modeling_nanochat_modern.py"),
    }


# The model card --------------------------------------------------------------------------------------


def log_report(num_params: int, tag: str = "d2", **sft: Any) -> None:
    report = get_report()
    facts = {"model_tag": "", "Number of parameters": num_params, "Number of training tokens": 104857600}
    report.log("Base model training", [facts])
    report.log("Base model loss", [{"val bpb": 1.25, "Model": "base_model (step 7)"}])
    core = {"CORE tinyworld": 0.4, "CORE tinyworld 95% interval": "0.3000 to 0.5000", "model_tag": tag}
    report.log("Base model evaluation", [{"Model": "base_model (step 7)", **core}])
    report.log("Chat SFT", [{"mixture": "tinyworld", "Training rows": 14000, "model_tag": tag}])
    scores = {"GSM8K": 0.0455, "GSM8K 95% interval": "0.0356 to 0.0582 (60 of 1319)", "model_tag": tag, **sft}
    report.log("Chat evaluation sft", [{"task_name": "GSM8K", "step": None, **scores}])
    report.log("Chat evaluation rl", [{"GSM8K": 0.0987, "step": None}])


def card_of(base: Path, source: str = "sft", **settings: Any) -> str:
    export.run(export.ExportConfig(source=source, out=str(base / "hf"), force=True, **settings))
    return (base / "hf" / "README.md").read_text(encoding="utf-8")


def num_params(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_card_tells_the_training_and_this_stages_scores_with_intervals(base):
    model = make_model("plain")
    save(model)
    log_report(num_params(model))
    card = card_of(base)
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"{num_params(model):,} parameters in 2 layers of width 32, a context of\n16 tokens" in card
    assert "- text: tinyworld\n- training tokens: 104,857,600\n" in card
    assert "- fine-tuning conversations: 14,000\n" in card
    assert "| GSM8K | 0.0455 | 0.0356 to 0.0582 (60 of 1319) |" in card
    assert "0.0987" not in card and "CORE" not in card  # other stages'
    assert "Tinyworld is a small made-up world" in card
    assert "trust_remote_code" not in card and "apply_chat_template" in card


def test_the_card_of_a_base_model_has_bpb_and_core(base):
    model = make_model("modern")
    save(model, "base")
    log_report(num_params(model))
    card = card_of(base, "base")
    assert "| val bpb | 1.2500 | not estimated |" in card
    assert "| CORE tinyworld | 0.4000 | 0.3000 to 0.5000 |" in card
    assert "trust_remote_code=True" in card and "apply_chat_template" not in card
    assert "fine-tuning" not in card


@pytest.mark.parametrize(
    ("report", "missing"),
    [
        ({"tag": "d3"}, ["0.0455", "14,000"]),  # another model's evaluation and fine-tuning
        ({"step": 3}, ["0.0455"]),  # another step's evaluation
        ({"num_params": 5}, ["104,857,600"]),  # another base model
    ],
)
def test_what_the_report_says_of_another_model_stays_out(base, report, missing):
    model = make_model("plain")
    save(model)
    log_report(**{"num_params": num_params(model), **report})
    card = card_of(base)
    assert not [text for text in missing if text in card]


def test_scores_of_the_last_step_are_not_told_of_an_earlier_one(base):
    model = make_model("plain")
    save(model, step=3)
    save(model, step=7)
    log_report(num_params(model))
    assert "0.0455" in card_of(base)
    assert "0.0455" not in card_of(base, step=3)


def test_without_a_report_the_card_says_that_nothing_is_known(base):
    save(make_model("plain"), dataset="/home/someone/letters")
    card = card_of(base)
    assert "None measured. There is no training report of this model" in card
    assert "- text: own text\n" in card and "someone" not in card
    assert "someone" not in (base / "hf" / "config.json").read_text()


def test_an_imported_model_has_no_part_in_this_base_directorys_report(base):
    model = make_model("plain")
    save(model)
    log_report(num_params(model))
    card_of(base)
    export.main([f"--import_from={base / 'hf'}", "-i", "mid"])
    get_report().log("Chat evaluation mid", [{"GSM8K": 0.5, "step": None}])
    assert "None measured" in card_of(base, "mid")


def test_the_code_in_the_card_runs(base, capsys):
    for name, source in (("plain", "sft"), ("modern", "base")):
        model = make_model(name)
        save(model, source)
        code = card_of(base, source).split("```python\n")[1].split("```")[0].replace("FOLDER", str(base / "hf"))
        capsys.readouterr()
        exec(code.replace("max_new_tokens=100", "max_new_tokens=3"), {})
        assert capsys.readouterr().out
