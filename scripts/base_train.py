"""Pretrain the base model.

    python -m scripts.base_train --depth=4 --dataset=tinyworld              # one CPU
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train --depth=20   # one node
    python -m scripts.base_train --plan --depth=20 --vocab_size=65536       # sizes, time and cost only

Reads tokenizer/ and the data set; writes base_checkpoints/<tag>/.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from nanochat import checkpoint, guards, resume, runtime, scaling
from nanochat.attention import describe
from nanochat.checkpoint import Checkpoint
from nanochat.config import InputError, flag, report_config, run_cli
from nanochat.data.loader import PackingLoader
from nanochat.data.sources import Source, open_source
from nanochat.environment import print0
from nanochat.evals.bpb import evaluate_bpb
from nanochat.evals.bundle import open_bundle
from nanochat.evals.core import evaluate_core
from nanochat.evals.samples import sample_texts
from nanochat.fit import check_rows, find_rows
from nanochat.fp8 import ALIGNMENT, MIN_WIDTH, convert_to_fp8
from nanochat.gpt import GPT, GPTConfig
from nanochat.memory import half_depth
from nanochat.optim import MuonAdamW
from nanochat.plan import COMPILE_FLOPS, h100s, plan_lines, this_cpu
from nanochat.ranks import is_same_everywhere, together
from nanochat.report import get_report
from nanochat.resume import LoopState
from nanochat.saver import Saver
from nanochat.tokenizer import Tokenizer, get_tokenizer
from nanochat.tracking import DUMMY, Tracker
from nanochat.trainer import Trainer, compiles, make_optimizer


@dataclass(frozen=True)
class BaseTrainConfig:
    run: str = flag(DUMMY, "wandb run name; dummy = no wandb")
    device_type: str | None = flag(None, "cuda, mps or cpu; empty = the best there is", off="")
    depth: int = flag(20, "transformer layers; width, heads and horizon follow from it")
    max_seq_len: int = flag(2048, "context length in tokens")
    num_iterations: int | None = flag(None, "optimizer steps; -1 = from the flags below", off=-1)
    target_flops: float | None = flag(None, "train for this many FLOPs; -1 = off", off=-1.0)
    target_param_data_ratio: float | None = flag(
        None, "train on this many tokens per parameter (modern: of blocks and head); -1 = auto: plain 20", off=-1
    )
    device_batch_size: int | None = flag(None, "rows a forward pass and rank; -1 = auto: what fits", off=-1)
    total_batch_size: int | None = flag(
        None, "tokens per optimizer step over all ranks; -1 = auto: plain 524288, modern from the depth", off=-1
    )
    embedding_lr: float | None = flag(
        None, "AdamW learning rate of the token embedding, at width 768; -1 = auto: plain 0.2", off=-1
    )
    unembedding_lr: float | None = flag(
        None, "AdamW learning rate of the output head, at width 768; -1 = auto: plain 0.004", off=-1
    )
    weight_decay: float | None = flag(None, "of AdamW; -1 = auto: plain 0.0", off=-1)
    matrix_lr: float | None = flag(None, "Muon learning rate of the matrices; -1 = auto: plain 0.02", off=-1)
    grad_clip: float | None = flag(
        None, "largest gradient norm; 0 = no clipping, -1 = auto: plain 1.0, modern 0", off=-1
    )
    eval_every: int | None = flag(250, "steps between validations; -1 = never", off=-1)
    eval_tokens: int = flag(20 * 524288, "tokens of a validation, at most all of the split")
    core_metric_every: int | None = flag(2000, "steps between CORE estimates; -1 = never", off=-1)
    core_metric_max_per_task: int | None = flag(500, "examples of each CORE task; -1 = all", off=-1)
    sample_every: int | None = flag(2000, "steps between sample completions; -1 = never", off=-1)
    model_tag: str | None = flag(None, "name of the checkpoint directory; empty = d<depth>", off="")
    warmup_ratio: float | None = flag(
        None, "part of the steps that the learning rate rises over; -1 = auto: 0", off=-1, new=True
    )
    warmdown_ratio: float | None = flag(
        None, "part of the steps that it falls over; -1 = auto: plain 0.2, modern 0.6", off=-1, new=True
    )
    final_lr_frac: float | None = flag(None, "where it ends; -1 = auto: plain 0, modern 0.05 to 0.2", off=-1, new=True)
    dataset: str = flag("climbmix", "climbmix, fineweb-edu, tinyworld, or a folder of text", new=True)
    bad_shards: str = flag("stop", "a damaged shard ends the run, or is left out", choices=("stop", "skip"), new=True)
    arch: str = flag("plain", "the model's architecture", choices=scaling.ARCHS, new=True)
    window_pattern: str = flag(
        "L", "S(hort) and L(ong) attention windows, over and over; the last layer's is long", new=True
    )
    short_window: int | None = flag(
        None, "positions that a short window reaches back; -1 = auto: a quarter of the context", off=-1, new=True
    )
    fp8: bool = flag(False, "matrix products of wide layers in fp8 (Hopper and newer)", new=True)
    aspect_ratio: int = flag(scaling.ASPECT_RATIO, "width per layer", new=True)
    head_dim: int = flag(scaling.HEAD_DIM, "size of an attention head", new=True)
    save_every: int | None = flag(1000, "steps between checkpoints; -1 = only the last", off=-1, new=True)
    keep_last: int | None = flag(2, "how many checkpoints to keep; -1 = all", off=-1, new=True)
    resume: str = flag("none", "go on from a checkpoint: none, auto or a step", new=True)
    accept_changes: bool = flag(False, "resume although tokenizer or text changed", new=True)
    guard_sigma: float | None = flag(
        guards.SIGMA,
        "skip a step whose loss or gradient is this many sigma off; 0 = only if not finite",
        off=0,
        new=True,
    )
    deterministic: bool = flag(False, "the same result to the bit, also where that is slower (GPU)", new=True)
    recompute: bool = flag(False, "compute activations again in the backward pass: less memory", new=True)
    compile: bool | None = flag(
        None,
        f"torch.compile; default: on a GPU, and on a CPU if training takes {COMPILE_FLOPS:.0e} FLOPs or more",
        off="None",
        new=True,
    )
    seed: int = flag(42, "of the initial weights", new=True)
    bundle: str | None = flag(None, "CORE bundle: a folder or .zip", off="None", new=True)
    vocab_size: int | None = flag(None, "for --plan without a tokenizer", off="None", new=True)
    plan: bool = flag(False, "print sizes, time and cost, and train nothing", new=True)

    def __post_init__(self) -> None:
        sizes = ("max_seq_len", "device_batch_size", "eval_tokens", "aspect_ratio", "short_window", "num_iterations")
        for name, least in (*((size, 1) for size in sizes), ("head_dim", 2)):
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"--{name} {value} must be at least {least}; try --{name}={least}")
        if self.short_window is not None and self.short_window > self.max_seq_len:
            raise InputError(
                f"--short_window {self.short_window} is longer than the context of {self.max_seq_len} tokens; try "
                f"--short_window={self.max_seq_len}"
            )
        width = shape_of(self, vocab_size=1).n_embd
        scaling.windows(self.window_pattern, self.depth, self.max_seq_len, self.short_window)
        if self.fp8 and (width < MIN_WIDTH or width % ALIGNMENT):
            depth = scaling.least_depth(MIN_WIDTH, ALIGNMENT, self.aspect_ratio, self.head_dim)
            raise InputError(
                f"--fp8 takes layers at least {MIN_WIDTH} wide, a multiple of {ALIGNMENT}, and these have {width}; "
                + (f"try --depth={depth}" if depth else "leave it out")
            )
        if self.deterministic and self.device_batch_size is None and not self.plan:
            raise InputError("--deterministic needs --device_batch_size: what fits depends on the memory that is free")
        if self.vocab_size is not None and not self.plan:
            raise InputError("--vocab_size goes with --plan only; the tokenizer decides it: scripts.tok_train")
        for name in ("eval_every", "core_metric_every", "sample_every", "save_every"):
            if (getattr(self, name) or 1) < 1 or getattr(self, name) == 0:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1, or -1 for never")

    @property
    def tag(self) -> str:
        return self.model_tag or f"d{self.depth}"


Decided = Any  # a BaseTrainConfig with nothing left open; its types say that None may be


def shape_of(cfg: BaseTrainConfig, vocab_size: int) -> scaling.Shape:
    shape = scaling.shape_from_depth(cfg.depth, vocab_size, cfg.max_seq_len, cfg.aspect_ratio, cfg.head_dim, cfg.arch)
    return replace(shape, window_pattern=cfg.window_pattern, short_window=cfg.short_window)


def model_config(cfg: BaseTrainConfig, shape: scaling.Shape) -> GPTConfig:
    return GPTConfig(
        shape.sequence_len,
        shape.vocab_size,
        shape.n_layer,
        shape.n_head,
        shape.n_kv_head,
        shape.n_embd,
        cfg.arch,
        window_pattern=cfg.window_pattern,
        short_window=cfg.short_window,
    )


def decided(cfg: BaseTrainConfig, rt: runtime.Runtime, saved: Checkpoint | None = None) -> Decided:
    """The config with nothing left open: what the run had so far, where it is resumed; else batch, horizon and rates
    from the depth, rows from the memory, whether to compile from the FLOPs."""
    if saved is not None:
        names = [*(f.name for f in fields(scaling.Settings)), "compile"]
        cfg = replace(cfg, **{k: saved.meta["user_config"][k] for k in names if getattr(cfg, k) is None})
    shape = shape_of(cfg, get_tokenizer().get_vocab_size())
    whole: Decided = scaling.with_settings(cfg, shape, rt.world_size)
    if whole.compile is None or whole.compile == "None":  # the latter: a checkpoint from before this was decided here
        is_long = whole.compile is None and training_flops(whole, shape) >= COMPILE_FLOPS
        whole = replace(whole, compile=rt.device.type == "cuda" or (rt.device.type == "cpu" and is_long))
    config = model_config(cfg, shape)
    if cfg.device_batch_size is not None:
        check_rows(config, rt, cfg.device_batch_size, cfg.recompute)
        return whole
    most = scaling.rows_per_rank(whole.total_batch_size, cfg.max_seq_len, rt.world_size)
    if saved is not None and most % saved.meta["device_batch_size"] == 0:  # the same passes add up to the same sums
        before = saved.meta["user_config"]
        return replace(whole, device_batch_size=before["device_batch_size"], recompute=before["recompute"])
    rows, recompute = find_rows(config, rt, most, cfg.recompute, whole.compile, cfg.fp8)
    return replace(whole, device_batch_size=rows, recompute=recompute)


def num_iterations(cfg: Decided, shape: scaling.Shape) -> tuple[int, str]:
    return scaling.num_iterations(
        shape, cfg.total_batch_size, cfg.num_iterations, cfg.target_flops, cfg.target_param_data_ratio
    )


def training_flops(cfg: Decided, shape: scaling.Shape) -> int:
    return shape.flops_per_token * cfg.total_batch_size * num_iterations(cfg, shape)[0]


def horizon(cfg: Decided, shape: scaling.Shape) -> int:
    steps, rule = num_iterations(cfg, shape)
    if rule == "num_iterations":
        print0(f"Using user-provided number of iterations: {steps:,}")
    else:
        print0(f"Calculated number of iterations from {rule}: {steps:,}")
    return steps


def check_text(cfg: Decided, source: Source, tokenizer: Tokenizer, world_size: int) -> None:
    """
    Raises:
        InputError: the training text is shorter than one step, so that a step would see it more than once.
    """
    num_tokens = 0
    for block in range(source.num_blocks("train")):
        for ids in tokenizer.encode_to_arrays(source.read_block("train", block)):
            num_tokens += len(ids) + 1  # and BOS
        if num_tokens >= cfg.total_batch_size:
            return
    row = cfg.max_seq_len * world_size  # one on each rank
    one_pass = cfg.device_batch_size * row
    T = num_tokens // world_size
    way_out = f"--max_seq_len={T} --device_batch_size=1 --total_batch_size={T * world_size}" if T else "more text"
    if num_tokens >= one_pass:
        way_out = f"--total_batch_size={num_tokens // one_pass * one_pass}"
    elif num_tokens >= row:
        rows = num_tokens // row
        way_out = f"--total_batch_size={rows * row} --device_batch_size={rows}"
    raise InputError(
        f"--dataset {cfg.dataset} has {num_tokens:,} tokens to train on, fewer than the {cfg.total_batch_size:,} of "
        f"one step; try {way_out}"
    )


def model_and_optimizer(cfg: Decided, config: GPTConfig, rt: runtime.Runtime) -> tuple[GPT, MuonAdamW]:
    model = checkpoint.build_model(config, rt)
    model.recompute = cfg.recompute
    if cfg.fp8:
        print0(f"fp8: the matrix products of {convert_to_fp8(model)} layers, bf16 for the rest")
    # on a CPU the optimizer is eager: what takes its time there are library calls
    compile = rt.device.type == "cuda" and compiles(rt, cfg.compile)
    return model, make_optimizer(model, cfg, rt, compile)


def open_text(cfg: BaseTrainConfig, rt: runtime.Runtime) -> Source:
    """
    Raises:
        InputError: there is none, it is damaged, or the ranks do not see the same, so that their rows would differ.
    """
    source = open_source(cfg.dataset, bad_shards=cfg.bad_shards)
    if not is_same_everywhere(source.fingerprint()):
        raise InputError(
            f"--dataset {cfg.dataset} is not the same on all ranks; wait for downloads, or share the folder"
        )
    return source


def batches(
    cfg: Decided, rt: runtime.Runtime, source: Source, split: str, cursor: dict[str, Any] | None = None
) -> PackingLoader:
    return PackingLoader(
        source,
        split,
        get_tokenizer(),
        batch_size=cfg.device_batch_size,
        sequence_len=cfg.max_seq_len,
        rank=rt.rank,
        world_size=rt.world_size,
        device=rt.device,
        cursor=cursor,
        repeat=split == "train",
    )


def build(
    cfg: Decided, rt: runtime.Runtime, source: Source, saved: Checkpoint | None
) -> tuple[Trainer, dict[str, Any]]:
    """The trainer, and the outcome lines that are known before training. The config is `decided`."""
    tokenizer = get_tokenizer()
    shape = shape_of(cfg, tokenizer.get_vocab_size())
    steps = horizon(cfg, shape)
    accum = scaling.grad_accum_steps(cfg.total_batch_size, cfg.device_batch_size, cfg.max_seq_len, rt.world_size)
    check_text(cfg, source, tokenizer, rt.world_size)
    config = model_config(cfg, shape)
    with runtime.memory_advice(None, f"--depth={half_depth(cfg.depth)}"):
        model, optimizer = model_and_optimizer(cfg, config, rt)
        meta = resume.stage_facts(cfg, model, tokenizer, source.fingerprint(), cfg.dataset)
        meta |= {"device_batch_size": cfg.device_batch_size, "max_seq_len": cfg.max_seq_len}
        state, cursor = resume.restore(saved, model, optimizer, meta, cfg.accept_changes)
    directory = checkpoint.tag_directory("base", cfg.tag)

    def schedule(state: LoopState) -> tuple[float, float]:
        return scaling.schedule(cfg, state.step, steps, cfg.arch)

    trainer = Trainer(
        rt=rt,
        stage="base",
        model=model,
        optimizer=optimizer,
        loader=batches(cfg, rt, source, "train", cursor),
        tracker=Tracker("base", cfg.run, rt, meta["user_config"]),
        saver=Saver(rt, directory, model, optimizer, meta, state, cfg.save_every, cfg.keep_last),
        tokens_per_step=cfg.total_batch_size,
        schedule=schedule,
        grad_accum_steps=accum,
        num_iterations=steps,
        grad_clip=cfg.grad_clip or None,
        guard_sigma=cfg.guard_sigma,
        flops_per_token=shape.flops_per_token,
        compile=cfg.compile,
        state=state,
    )
    facts = facts_of(cfg, shape, steps, rt.world_size)
    print_sizes(shape, facts, accum, cfg)
    windows = {block.attn.window for block in model.blocks}
    print0("Attention: " + "; ".join(sorted({describe(rt.device, rt.dtype, window) for window in windows})))
    return trainer, facts


def facts_of(cfg: Decided, shape: scaling.Shape, steps: int, world_size: int) -> dict[str, Any]:
    """Lines of the report."""
    tokens = cfg.total_batch_size * steps
    return {
        "Number of parameters": shape.num_params,
        "Number of FLOPs per token": f"{shape.flops_per_token:e}",
        "Calculated number of iterations": steps,
        "Number of training tokens": tokens,
        "Tokens : Params ratio": tokens / shape.num_params,
        "DDP world size": world_size,
        "warmup_ratio": cfg.warmup_ratio,
        "warmdown_ratio": cfg.warmdown_ratio,
        "final_lr_frac": cfg.final_lr_frac,
    }


def print_sizes(shape: scaling.Shape, facts: dict[str, Any], accum: int, cfg: Decided) -> None:
    per_rank = cfg.device_batch_size * cfg.max_seq_len
    print0(f"Vocab size: {shape.vocab_size:,}")
    print0(f"num_layers: {shape.n_layer}\nmodel_dim: {shape.n_embd}")
    print0(f"num_heads: {shape.n_head}\nnum_kv_heads: {shape.n_kv_head}")
    print0(f"Tokens / micro-batch / rank: {cfg.device_batch_size} x {cfg.max_seq_len} = {per_rank:,}")
    print0(f"Total batch size {cfg.total_batch_size:,} => gradient accumulation steps: {accum}")
    print0(f"Number of parameters: {shape.num_params:,}")
    print0(f"Estimated FLOPs per token: {shape.flops_per_token:e}")
    print0(f"Total number of training tokens: {facts['Number of training tokens']:,}")
    print0(f"Tokens : Params ratio: {facts['Tokens : Params ratio']:.2f}")
    total = shape.flops_per_token * facts["Number of training tokens"]
    print0(f"Total training FLOPs estimate: {total:e}")


def evals_of(cfg: Decided, trainer: Trainer, source: Source) -> list[Any]:
    """Validate, then estimate CORE, then sample; all but validation leave step 0 out."""
    rt, model, tokenizer = trainer.rt, trainer.model, get_tokenizer()
    token_bytes = tokenizer.token_bytes().to(rt.device)
    eval_steps = max(1, cfg.eval_tokens // (cfg.device_batch_size * cfg.max_seq_len * rt.world_size))
    bundle = open_bundle(cfg.bundle, cfg.dataset) if cfg.core_metric_every is not None else None

    def validate(state: LoopState) -> None:
        model.eval()
        with contextlib.closing(batches(cfg, rt, source, "val")) as loader:
            bpb = evaluate_bpb(model, loader, token_bytes, eval_steps)
        state.record_val_bpb(bpb)
        print0(f"Step {state.step:05d} | Validation bpb: {bpb:.4f}")
        trainer.tracker.log(state.step, val_bpb=bpb)

    def core(state: LoopState) -> None:
        if state.step and bundle is not None:
            model.eval()
            result = evaluate_core(model, tokenizer, rt, bundle, cfg.core_metric_max_per_task)
            name = bundle.metric_name.replace("CORE metric", "CORE metric estimate")
            state.outcome[name] = result.core_metric
            print0(f"Step {state.step:05d} | {name}: {result.core_metric:.4f}")
            trainer.tracker.log(state.step, core_metric=result.core_metric)

    def sample(state: LoopState) -> None:
        if state.step:
            model.eval()
            for text in together(lambda: sample_texts(model, tokenizer) if rt.is_master else []):
                print0(text)

    return [(cfg.eval_every, validate), (cfg.core_metric_every, core), (cfg.sample_every, sample)]


def plan(cfg: BaseTrainConfig) -> None:
    shape = shape_of(cfg, cfg.vocab_size or get_tokenizer().get_vocab_size())
    rt = runtime.start("cpu")
    cpu = this_cpu(runtime.peak_flops(rt), runtime.available_memory(rt), rt.dtype.itemsize)
    whole: Decided = scaling.with_settings(cfg, shape, world_size=1)
    steps, _ = num_iterations(whole, shape)
    print("\n".join(plan_lines(shape, steps, whole, (h100s(1), h100s(8), cpu))))


def run(cfg: BaseTrainConfig) -> LoopState | None:
    if cfg.plan:
        plan(cfg)
        return None
    rt = runtime.start(cfg.device_type, cfg.seed, cfg.deterministic)
    if cfg.fp8:
        runtime.require_fp8(rt)
    saved = resume.find(rt, checkpoint.tag_directory("base", cfg.tag), cfg.resume)
    rt = resume.same_dtype(rt, saved)
    whole = decided(cfg, rt, saved)
    source = open_text(whole, rt)
    trainer, facts = build(whole, rt, source, saved)
    state = trainer.run(evals_of(whole, trainer, source))
    flops = facts["Number of training tokens"] * trainer.flops_per_token
    peak = runtime.peak_memory_mib(rt.device)
    print0(f"Peak memory usage: {peak:.2f}MiB\nTotal training time: {state.train_seconds / 60:.2f}m")
    old, new = report_config(whole)
    for key in (*(k for k in facts if k in new), "plan", "vocab_size"):
        new.pop(key, None)
    outcome = {
        "Minimum validation bpb": state.min_val_bpb,
        "Final validation bpb": state.val_bpb,
        "CORE metric estimate": state.outcome.pop("CORE metric estimate", None),
        "MFU %": f"{trainer.mfu:.2f}%",
        "Total training flops": f"{flops:e}",
        "Total training time": f"{state.train_seconds / 60:.2f}m",
        "Peak memory usage": f"{peak:.2f}MiB",
    }
    data = {"Device": str(rt.device), "Compute dtype": str(rt.dtype).removeprefix("torch.")}
    get_report().log("Base model training", [old, facts, outcome, new, state.outcome, state.history.facts(), data])
    trainer.tracker.finish()
    runtime.stop()
    return state


def main(argv: Sequence[str] | None = None) -> None:
    run_cli(BaseTrainConfig, run, argv, about=__doc__)


if __name__ == "__main__":
    main()
