"""Byte-level BPE: exact, parallel training and plain encoding. Progress goes to the logger "rustbpe"."""

from collections.abc import Iterable, Sequence

class Tokenizer:
    """Untrained, it holds the 256 bytes. Ids: 0 to 255 are bytes, then merges in the order they were learned."""

    def __init__(self) -> None: ...
    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
    ) -> None:
        """Learn merges until the vocabulary has `vocab_size` tokens, or no pair is left.

        Most frequent pair first; of equals the smallest (left id, right id). The result does not depend on
        `buffer_size` (texts counted at a time). `pattern` None is GPT-4's, digits by up to three.

        Raises:
            ValueError: vocab_size below 256, buffer_size 0, a bad pattern, or a text the pattern chokes on.
            TypeError: the iterator yields something that is not a str.
            KeyboardInterrupt: Ctrl-C; the tokenizer is then as it was before.
        """

    def get_pattern(self) -> str: ...
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """(bytes, id) of every token in id order."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def batch_encode(self, texts: Sequence[str]) -> list[list[int]]:
        """encode() of each text, on all cores."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            KeyError: an id is not in the vocabulary.
        """
