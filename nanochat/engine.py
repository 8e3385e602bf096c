"""Generation with a KV cache: many rows of different prompts at once, each with its own tool calls.

A row's result depends on its prompt, its number among equal prompts, and the seed, not on the other rows.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat.config import InputError
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.tokenizer import Tokenizer
from nanochat.tools import calculate

TERMINAL = ("<|assistant_end|>", "<|bos|>")
TOOL = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
PREFILL_TOKENS = 1 << 14  # positions in one prefill pass: bounds its activations
CACHE_BYTES = 8 << 30  # keys and values of the rows that are in flight together
GREEDY_BELOW = 1e-5  # a smaller temperature would overflow fp32; it means argmax anyway
COMPACT_AT = 0.25  # share of finished rows that is worth a copy of the cache (about one or two decode steps)


@dataclass
class Row:
    """One sequence that is being written."""

    prompt: tuple[int, ...]
    budget: int  # new tokens that it may have
    rng: random.Random
    ids: list[int] = field(default_factory=list)  # new tokens, the terminal one included
    mask: list[int] = field(default_factory=list)  # 1 = sampled, 0 = forced by the tool
    forced: deque[int] = field(default_factory=deque)  # the tool's answer, still to be written
    call: list[int] | None = None  # tokens of the open tool call
    stopped: bool = False  # by a terminal token

    @property
    def done(self) -> bool:
        return self.stopped or len(self.ids) >= self.budget


class Engine:
    """Generates with a model. `cache_bytes` bounds how many rows run at once; the others wait their turn."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, cache_bytes: int = CACHE_BYTES) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cache_bytes = cache_bytes
        self.vocab_size = tokenizer.get_vocab_size()
        specials = tokenizer.get_special_tokens()
        self.terminal = {tokenizer.encode_special(name) for name in TERMINAL if name in specials}
        self.terminal.add(tokenizer.get_bos_token_id())
        # A tokenizer without tool tokens (GPT-2's) has no tool.
        self.tool = [tokenizer.encode_special(t) for t in TOOL] if specials.issuperset(TOOL) else [-1] * 4

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Generator[tuple[list[int], list[int]], None, None]:
        """Stream continuations of one prompt, a column of `num_samples` tokens at a time.

        Ends when every row has met <|assistant_end|> or <|bos|>, or after `max_tokens` columns (None = until
        prompt and answer fill the model's sequence_len), or at the last position that the model can address.
        A finished row's later columns repeat its terminal token with mask 0.

        Args:
            temperature: 0 = the most likely token, whatever the seed.
            top_k: sample among the k most likely; None or 0 = all.

        Yields:
            (token column, mask column), lists of num_samples ints; mask 1 = sampled, 0 = forced by the tool.

        Raises:
            InputError: an empty or too long prompt, or a setting out of range.
        """
        _check_sampling(temperature, top_k)
        if num_samples < 1:
            raise InputError(f"num_samples must be at least 1, got {num_samples}")
        rows = self._rows([tokens] * num_samples, max_tokens, seed)
        return self._columns(rows, temperature, top_k)

    def _columns(
        self, rows: list[Row], temperature: float, top_k: int | None
    ) -> Generator[tuple[list[int], list[int]], None, None]:
        column = 0
        for _ in self._decode(rows, temperature, top_k, slots=len(rows)):
            fresh = [len(row.ids) > column for row in rows]
            masks = [row.mask[-1] if new else 0 for row, new in zip(rows, fresh, strict=True)]
            column += 1
            yield [row.ids[-1] for row in rows], masks

    def generate_batch(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(sequences, masks) of num_samples rows: prompt and continuation, without the terminal token.

        Masks are 0 on the prompt and on what the tool wrote. For the arguments see generate().
        """
        if num_samples < 1:
            raise InputError(f"num_samples must be at least 1, got {num_samples}")
        sequences, masks, _ = self.generate_many([tokens] * num_samples, max_tokens, temperature, top_k, seed)
        return sequences, masks

    def generate_many(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> tuple[list[list[int]], list[list[int]], list[int | None]]:
        """Continue many prompts of any lengths; equal prompts share their prefill and get different samples.

        Returns:
            (sequences, masks, ends), in the order of the prompts, as generate_batch() gives them; ends has the
            terminal token that a row ended by, or None for a row that ended for want of room.
        """
        _check_sampling(temperature, top_k)
        rows = self._rows(prompts, max_tokens, seed)
        for _ in self._decode(rows, temperature, top_k, self._slots(rows)):
            pass
        sequences, masks = [], []
        for row in rows:
            end = len(row.ids) - row.stopped
            sequences.append([*row.prompt, *row.ids[:end]])
            masks.append([0] * len(row.prompt) + row.mask[:end])
        return sequences, masks, [row.ids[-1] if row.stopped else None for row in rows]

    def _rows(self, prompts: Sequence[Sequence[int]], max_tokens: int | None, seed: int) -> list[Row]:
        config = self.model.config
        if max_tokens is not None and max_tokens < 0:
            raise InputError(f"max_tokens must be at least 0, got {max_tokens}")
        rows, seen = [], Counter[tuple[int, ...]]()
        for tokens in prompts:
            prompt = tuple(tokens)
            if not prompt:
                raise InputError("the prompt is empty; begin it with <|bos|>")
            if len(prompt) > config.max_positions:
                raise InputError(
                    f"the prompt has {len(prompt)} tokens, more than the {config.max_positions} positions of "
                    "this model; shorten it"
                )
            room = (config.sequence_len if max_tokens is None else config.max_positions) - len(prompt)
            budget = max(0, room if max_tokens is None else min(room, max_tokens))
            # Python's generator, seeded by text, gives the same numbers on every machine and version.
            key = f"{seed}/{seen[prompt]}/".encode() + array("q", prompt).tobytes()
            rows.append(Row(prompt, budget, random.Random(key)))
            seen[prompt] += 1
        return rows

    def _slots(self, rows: list[Row]) -> int:
        """How many rows may be in flight together if each grew to its full length."""
        config = self.model.config
        longest = max((len(row.prompt) + row.budget for row in rows), default=1)
        width = config.n_layer * config.n_kv_head * config.head_dim
        row_bytes = 2 * longest * width * self.model.compute_dtype.itemsize
        return max(1, self.cache_bytes // row_bytes)

    def _decode(self, rows: list[Row], temperature: float, top_k: int | None, slots: int) -> Iterator[None]:
        """Write all rows, at most `slots` at a time; control comes back after every token column."""
        waiting = deque(row for row in rows if row.budget > 0)
        active: list[Row] = []  # the cache's rows, in its order; up to COMPACT_AT of them may be done
        cache: KVCache | None = None
        logits: Tensor | None = None
        while active or waiting:
            free = slots - len(active)
            if waiting and (not active or free >= COMPACT_AT * slots):
                new = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                new_cache, new_logits = self._prefill([row.prompt for row in new])
                cache = new_cache if cache is None else cache.join(new_cache)
                logits = new_logits if logits is None else torch.cat((logits, new_logits))
                active += new
            assert logits is not None and cache is not None
            logits = logits[:, : self.vocab_size]  # the model may have padding ids that mean nothing
            sampled = sample(logits, temperature, top_k, [row.rng for row in active]).tolist()
            for row, token in zip(active, sampled, strict=True):
                if not row.done:
                    self._write(row, token)
            yield
            active, cache = _drop_finished(active, cache)
            logits = self._step(active, cache) if cache is not None else None

    def _write(self, row: Row, sampled: int) -> None:
        """Append the row's next token: one that the tool forces, else the sampled one."""
        is_forced = bool(row.forced)
        token = row.forced.popleft() if is_forced else sampled
        row.mask.append(int(not is_forced))
        row.ids.append(token)
        python_start, python_end, output_start, output_end = self.tool
        if token in self.terminal:
            row.stopped = True
        elif token == python_start:
            row.call = []
        elif row.call is None:
            pass
        elif token == python_end:
            answer = calculate(self.tokenizer.decode(row.call)) if row.call else None
            if answer is not None:
                row.forced.extend([output_start, *self.tokenizer.encode(answer), output_end])
            row.call = None
        else:
            row.call.append(token)

    @torch.inference_mode()
    def _prefill(self, prompts: list[tuple[int, ...]]) -> tuple[KVCache, Tensor]:
        """The cache of the prompts and the (B, V) logits after them; equal prompts are computed once."""
        device = self.model.device
        unique = sorted(dict.fromkeys(prompts), key=len, reverse=True)  # alike lengths: little padding
        cache: KVCache | None = None
        logits, at = [], 0
        while at < len(unique):
            T = len(unique[at])
            chunk = unique[at : at + max(1, PREFILL_TOKENS // T)]
            lengths = torch.tensor([len(prompt) for prompt in chunk])
            idx = torch.zeros(len(chunk), T, dtype=torch.int64)
            for i, prompt in enumerate(chunk):
                idx[i, : len(prompt)] = torch.tensor(prompt)
            part = self.model.new_cache(len(chunk), T)
            x = self.model.features(idx.to(device), part)  # (B, T, C): no logits for positions inside prompts
            part.lengths = lengths.to(device)  # what padding left beyond a row's length gets overwritten
            logits.append(self.model.logits(x[torch.arange(len(chunk)), lengths - 1]))
            cache = part if cache is None else cache.join(part)
            at += len(chunk)
        assert cache is not None
        place = {prompt: i for i, prompt in enumerate(unique)}
        rows = torch.tensor([place[prompt] for prompt in prompts], device=device)
        return cache.select(rows), torch.cat(logits)[rows]

    @torch.inference_mode()
    def _step(self, active: list[Row], cache: KVCache) -> Tensor:
        """Feed each row's last token; (B, V) logits of the next."""
        longest = max(len(row.prompt) + len(row.ids) for row in active if not row.done)
        if longest > cache.max_len:  # grows by half, so that the copies stay cheap beside the steps between
            wider = min(longest + max(64, longest // 2), self.model.config.max_positions)
            everything = cache.select(torch.arange(len(active), device=self.model.device), wider)
            cache.k, cache.v, cache.tokens = everything.k, everything.v, everything.tokens
        idx = torch.tensor([[row.ids[-1]] for row in active], device=self.model.device)
        return self.model(idx, cache=cache)[:, -1]


@torch.inference_mode()
def _drop_finished(active: list[Row], cache: KVCache) -> tuple[list[Row], KVCache | None]:
    """The rows that go on, with their cache. While few are done they stay, unused, to save the copy."""
    alive = [i for i, row in enumerate(active) if not row.done]
    finished = len(active) - len(alive)
    if not alive:
        return [], None
    if finished >= COMPACT_AT * len(active):
        rows = torch.tensor(alive, device=cache.lengths.device)
        return [active[i] for i in alive], cache.select(rows)
    if finished:  # from length 0 on they cannot run past the end of the cache before the others do
        done = torch.tensor([row.done for row in active], device=cache.lengths.device)
        cache.lengths = cache.lengths.masked_fill(done, 0)
    return active, cache


def _check_sampling(temperature: float, top_k: int | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and top_k < 0:
        raise InputError(f"top_k must be 0 (off) or more, got {top_k}")


@torch.inference_mode()
def sample(logits: Tensor, temperature: float, top_k: int | None, rngs: Sequence[random.Random]) -> Tensor:
    """Draw one token a row: (B, V) logits -> (B,) int64.

    By the inverse of the cumulative distribution, which needs a single random number a row: noise for each of
    65,536 logits of 256 rows would cost more than a small model's forward.
    """
    if temperature < GREEDY_BELOW:
        return logits.argmax(dim=-1)
    ids = None
    if top_k:
        logits, ids = logits.topk(min(top_k, logits.size(-1)), dim=-1)
    # fp32 sums of 65,536 terms are off by about the weight of a rare token; Apple's GPUs have no fp64
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).exp()
    cumulative = weights.to(dtype).cumsum(dim=-1)
    uniform = torch.tensor([[rng.random()] for rng in rngs], dtype=dtype).to(logits.device)
    choice = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    choice = choice.clamp(max=logits.size(-1) - 1)  # a uniform that rounds up to 1
    return (choice if ids is None else ids.gather(-1, choice))[:, 0]
