"""Byte-level BPE: exact, parallel training and encoding in linear time. Progress goes to the logger "rustbpe"."""

from collections.abc import Callable, Iterable, Sequence

class Tokenizer:
    """Untrained, it holds the 256 bytes. Ids: 0 to 255 are bytes, then merges in the order they were learned."""

    def __init__(self) -> None: ...
    @staticmethod
    def from_merges(pattern: str, bytes: bytes, merges: bytes) -> Tokenizer:
        """From the bytes of the ids 0 to 255 and the (left id, right id) of each merge, as uint32.

        Raises:
            ValueError: a bad pattern, a byte that is missing, a merge of ids that do not exist yet.
        """

    @staticmethod
    def from_tokens(pattern: str, tokens: Sequence[bytes]) -> Tokenizer:
        """From the bytes of every token in id order.

        Raises:
            ValueError: a bad pattern, or a token that no pair of earlier ones makes.
        """

    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Learn merges until the vocabulary has `vocab_size` tokens, or no pair is left.

        Most frequent pair first; of equals the smallest (left id, right id). The result does not depend on
        `buffer_size` (texts counted at a time, at the most). `pattern` None is GPT-4's, digits by up to three.
        `progress` is called with (merges done, merges planned) ten times a second.

        Raises:
            ValueError: vocab_size below 256 or above 2^31, buffer_size 0, no text at all, a bad pattern, half a
                surrogate pair, or a text the pattern chokes on.
            TypeError: the iterator yields something that is not a str.
            KeyboardInterrupt: Ctrl-C; the tokenizer is then as it was before.
        """

    def get_pattern(self) -> str: ...
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """(bytes, id) of every token in id order."""

    def get_merges(self) -> bytes:
        """(left id, right id) of each merge in turn, as uint32."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            ValueError: half a surrogate pair, or a text the pattern chokes on.
        """

    def batch_encode(self, texts: Sequence[str], num_threads: int = 0) -> list[list[int]]:
        """encode() of each text; num_threads 0 = one a core."""

    def encode_to_buffer(
        self, texts: Sequence[str], prepend: int | None = None, num_threads: int = 0
    ) -> tuple[bytes, list[int]]:
        """All ids end to end as uint32, each text's after `prepend`, and how many each has."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            KeyError: an id is not in the vocabulary.
        """
