"""Generation with a KV cache: requests join and leave a running batch at any step, each with its own tool calls.

A request's answer depends on its prompt, its sampling and its number among equal prompts, not on the other requests.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter, deque
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanochat.config import InputError
from nanochat.cuda_graphs import GraphDecoder
from nanochat.gpt import GPT
from nanochat.sampling import Sampling, logprobs, penalise, sample
from nanochat.slots import Request, SlotTable
from nanochat.tokenizer import Tokenizer
from nanochat.tools import calculate

if TYPE_CHECKING:
    from nanochat.cpu_decode import CPUDecoder

TERMINAL = ("<|assistant_end|>", "<|bos|>")
TOOL = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
CACHE_BYTES = 8 << 30  # of keys and values
MAX_ROWS = 256  # at once: their logits, in fp32 and as sums in fp64, take 1 MB each at 65,536 ids
CPU_ROWS = 64  # more rows are as fast by torch's own matrix products
# Of prompts in one step, for which running rows wait with their next token; fewer leave the matmuls short.
PREFILL_TOKENS = {"cpu": 256, "cuda": 4096}


class Engine:
    """Generates with a model. Not thread-safe: one thread owns an engine.

    `cache_bytes` bounds the keys and values of the rows that run at once; the others wait their turn. Memory is taken
    as rows and their lengths grow. What ended rows leave in the cache serves later prompts that begin alike: whoever
    changes the model's weights calls release().
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, cache_bytes: int = CACHE_BYTES) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        specials = tokenizer.get_special_tokens()
        self.terminal = {tokenizer.encode_special(name) for name in TERMINAL if name in specials}
        self.terminal.add(tokenizer.get_bos_token_id())
        # A tokenizer without tool tokens (GPT-2's) has no tool.
        self.tool = [tokenizer.encode_special(t) for t in TOOL] if specials.issuperset(TOOL) else [-1] * 4
        self.cpu_decoder = _cpu_decoder(model)
        self.graphs = GraphDecoder(model, MAX_ROWS) if model.device.type == "cuda" else None
        self.prefill_tokens = PREFILL_TOKENS.get(model.device.type, 1024)
        self.slots = SlotTable(model, cache_bytes, MAX_ROWS)
        self.waiting: deque[Request] = deque()
        self.prompt_tokens = self.generated_tokens = 0  # totals

    # Requests -----------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        sample: int = 0,
    ) -> Request:
        """Queue a request, to be written by step().

        Args:
            max_tokens: None = until prompt and answer fill the model's sequence_len.
            sample: number among requests of an equal prompt and seed: each has random numbers of its own.

        Raises:
            InputError: an empty or too long prompt, an id that the tokenizer does not have, a negative max_tokens.
        """
        request = self._request(prompt, max_tokens, sampling or Sampling(), sample)
        self.waiting.append(request)
        return request

    def step(self) -> list[Request]:
        """Decode one token of each running row, then admit waiting requests and compute some of their prompts.

        Returns:
            The requests that got a token or ended.
        """
        with torch.inference_mode():
            touched = self._decode()
            ended = self._admit()
            return touched + ended + self._prefill()

    def cancel(self, request: Request) -> None:
        """End a request where it stands, and free its slot; nothing happens to one that has ended."""
        if request.done:
            return
        request.finish_reason = "cancelled"
        if request.slot < 0:
            self.waiting.remove(request)
        else:
            with torch.inference_mode():
                self.slots.retire(request)

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self.waiting or self.slots.live)

    def stats(self) -> dict[str, int]:
        """Rows and tokens of the cache now; prompt_tokens (computed, not copied) and generated_tokens in all."""
        live = self.slots.live
        return {
            "running": len(live),
            "waiting": len(self.waiting),
            "slots": self.slots.num_slots,
            "cache_tokens_used": sum(row.length for row in live),
            "cache_tokens_total": self.slots.max_tokens,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
        }

    def release(self) -> None:
        """Give the cache's memory back, and forget what ended rows left in it. Only while not busy."""
        assert not self.busy
        self._forget()

    def reset(self) -> None:
        """Forget every request and the cache, in whatever state an error left them.

        Raises:
            RuntimeError: the GPU can no longer be used.
        """
        self.waiting.clear()
        self._forget()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def _forget(self) -> None:
        self.slots.release()
        if self.graphs is not None:
            self.graphs.clear()

    # Whole answers ------------------------------------------------------------------------------

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
        rows = self._requests(_repeat(tokens, num_samples), max_tokens, Sampling(temperature, top_k, seed=seed))
        return self._columns(rows)

    def _columns(self, rows: list[Request]) -> Generator[tuple[list[int], list[int]], None, None]:
        self.waiting.extend(rows)
        try:
            for column in range(max(row.budget for row in rows)):
                while any(not row.done and len(row.ids) <= column for row in rows):
                    self.step()
                fresh = [len(row.ids) > column for row in rows]
                if not any(fresh):
                    return
                ids = [row.ids[column] if new else row.ids[-1] for row, new in zip(rows, fresh, strict=True)]
                yield ids, [row.mask[column] if new else 0 for row, new in zip(rows, fresh, strict=True)]
        finally:
            self._leave(rows)

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
        prompts = _repeat(tokens, num_samples)
        sequences, masks, _ = self.generate_many(prompts, max_tokens, temperature, top_k, seed)
        return sequences, masks

    def generate_many(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> tuple[list[list[int]], list[list[int]], list[int | None]]:
        """Continue many prompts of any lengths; what they begin with alike is computed once; equal ones get different
        samples.

        Returns:
            (sequences, masks, ends), in the order of the prompts, as generate_batch() gives them; ends has the
            terminal token that a row ended by, or None for a row that ended for want of room.
        """
        rows = self._requests(prompts, max_tokens, Sampling(temperature, top_k, seed=seed))
        self.waiting.extend(rows)
        try:
            while not all(row.done for row in rows):
                self.step()
        finally:
            self._leave(rows)
        sequences, masks, ends = [], [], []
        for row in rows:
            stopped = row.finish_reason == "stop"
            end = len(row.ids) - stopped
            sequences.append([*row.prompt, *row.ids[:end]])
            masks.append([0] * len(row.prompt) + row.mask[:end])
            ends.append(row.ids[-1] if stopped else None)
        return sequences, masks, ends

    def _leave(self, rows: list[Request]) -> None:
        """After the rows, or in the middle of them; by the next call the weights may be others."""
        for row in rows:
            self.cancel(row)
        if not self.busy:
            self.release()

    def _requests(self, prompts: Sequence[Sequence[int]], max_tokens: int | None, sampling: Sampling) -> list[Request]:
        rows, seen = [], Counter[tuple[int, ...]]()
        for tokens in prompts:
            row = self._request(tokens, max_tokens, sampling, seen[tuple(tokens)])
            seen[row.prompt] += 1
            rows.append(row)
        return rows

    def _request(self, tokens: Sequence[int], max_tokens: int | None, sampling: Sampling, sample: int) -> Request:
        config = self.model.config
        if max_tokens is not None and max_tokens < 0:
            raise InputError(f"max_tokens must be at least 0, got {max_tokens}")
        prompt = tuple(tokens)
        if not prompt:
            raise InputError("the prompt is empty; begin it with <|bos|>")
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            raise InputError(f"the prompt has ids that are not from 0 to {self.vocab_size - 1}, the tokenizer's")
        if len(prompt) > config.max_positions:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, more than the {config.max_positions} positions of "
                "this model; shorten it"
            )
        room = (config.sequence_len if max_tokens is None else config.max_positions) - len(prompt)
        budget = max(0, room if max_tokens is None else min(room, max_tokens))
        if budget and len(prompt) + budget > self.slots.max_tokens:
            raise InputError(
                f"prompt and answer may come to {len(prompt) + budget} tokens, but the cache holds "
                f"{self.slots.max_tokens}; ask for fewer max_tokens, or raise the engine's cache_bytes"
            )
        # Python's generator, seeded by text, gives the same numbers on every machine and version.
        key = f"{sampling.seed}/{sample}/".encode() + array("q", prompt).tobytes()
        return Request(prompt, budget, sampling, random.Random(key))

    # A step -------------------------------------------------------------------------------------

    def _decode(self) -> list[Request]:
        """Feed each running row's last token, and write its next."""
        rows = list(self.slots.running)
        if not rows:
            return []
        cache = self.slots.view(rows, 1)
        idx = torch.tensor([row.ids[-1] for row in rows]).to(self.model.device)
        if self.cpu_decoder is not None and len(rows) <= CPU_ROWS:
            logits = self.cpu_decoder.step(idx, cache)
        elif self.graphs is not None:
            logits = self.graphs.step(idx, cache)
        else:
            logits = self.model(idx[:, None], cache=cache)[:, -1]
        for row in rows:
            row.length += 1
        self._write_next(rows, logits)
        return rows

    def _admit(self) -> list[Request]:
        """Give waiting requests slots, in their order; returns those that have no token to get."""
        ended = []
        while self.waiting:
            row = self.waiting[0]
            if row.budget == 0:
                row.finish_reason = "length"
                ended.append(row)
            elif not self.slots.take(row, len(self.waiting)):
                break
            self.waiting.popleft()
        return ended

    def _prefill(self) -> list[Request]:
        """Compute some of the prompts; rows whose prompt is complete get their first token."""
        filling = [row for row in self.slots.filling if row.source is None]
        most = self.prefill_tokens if len(filling) == 1 else max(1, self.prefill_tokens // 2)  # leaves some for others
        chunks, left = [], self.prefill_tokens
        for row in filling:
            if n := min(len(row.prompt) - row.length, most, left):
                chunks.append((row, n))
                left -= n
        complete: list[Request] = []
        logits: list[Tensor] = []
        for group in self.slots.groups(chunks):
            self._prefill_group(group, complete, logits)
        if complete:
            for row in complete:
                self.slots.start(row)
            self._write_next(complete, torch.cat(logits))
        return complete

    def _prefill_group(self, group: list[tuple[Request, int]], complete: list[Request], logits: list[Tensor]) -> None:
        """Compute a chunk of each row, padded to the longest; what padding leaves behind a row's end is overwritten."""
        rows, T = [row for row, _ in group], max(n for _, n in group)
        idx = torch.zeros(len(rows), T, dtype=torch.int64)
        for i, (row, n) in enumerate(group):
            idx[i, :n] = torch.tensor(row.prompt[row.length : row.length + n])
        last = torch.tensor([[n - 1] for _, n in group])
        device = self.model.device
        x = self.model.features(idx.to(device), self.slots.view(rows, T), last.to(device))[:, 0]  # (B, C)
        for row, n in group:
            row.length += n
            self.prompt_tokens += n
        place = {row: i for i, row in enumerate(rows) if row.length == len(row.prompt)}
        for row, source in self.slots.copy_shared():  # equal prompts get equal logits
            place[row] = place[source]
        if place:
            complete += place
            logits.append(self._logits(x)[list(place.values())])

    def _logits(self, x: Tensor) -> Tensor:
        """(B, C) features -> (B, V), on a CPU in a buffer."""
        if self.cpu_decoder is not None and len(x) <= CPU_ROWS:
            return self.cpu_decoder.logits(x)
        return self.model.logits(x)

    def _write_next(self, rows: list[Request], logits: Tensor) -> None:
        """Draw and write the next token of rows: (B, V) logits. Those that end by it leave."""
        logits = logits[:, : self.vocab_size]  # the model may have padding ids that mean nothing
        settings = [row.sampling for row in rows]
        scores = logits
        if any(s.repetition_penalty != 1 for s in settings):
            scores = penalise(logits, *self.slots.tokens(rows), settings)
        drawn = sample(scores, settings, [row.rng.random() for row in rows]).tolist()
        for row, token in zip(rows, drawn, strict=True):
            self._write(row, token)
        if asking := [i for i, s in enumerate(settings) if s.logprobs is not None]:
            written, counts = [rows[i].ids[-1] for i in asking], [settings[i].logprobs or 0 for i in asking]
            for i, found in zip(asking, logprobs(logits[asking], written, counts), strict=True):
                rows[i].logprobs.append(found)
        self.generated_tokens += len(rows)
        for row in reversed(rows):
            if row.done:
                self.slots.retire(row)

    def _write(self, row: Request, sampled: int) -> None:
        """Append the row's next token: one that the tool forces, else the sampled one."""
        is_forced = bool(row.forced)
        token = row.forced.popleft() if is_forced else sampled
        row.mask.append(int(not is_forced))
        row.ids.append(token)
        python_start, python_end, output_start, output_end = self.tool
        if token in self.terminal:
            row.finish_reason = "stop"
        elif len(row.ids) >= row.budget:
            row.finish_reason = "length"
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


def _cpu_decoder(model: GPT) -> CPUDecoder | None:
    if model.device.type != "cpu" or type(model) is not GPT:  # a subclass may compute something else
        return None
    from nanochat.cpu_decode import CPUDecoder  # other machines need not have built its kernels

    return CPUDecoder(model)


def _repeat(tokens: Sequence[int], num_samples: int) -> list[Sequence[int]]:
    if num_samples < 1:
        raise InputError(f"num_samples must be at least 1, got {num_samples}")
    return [tokens] * num_samples
