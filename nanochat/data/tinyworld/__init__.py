"""Tinyworld: a generated corpus of simple English about a small true world. No file to fetch, no licence to ask.

`documents(split, block)` is the pretraining text, `conversation(kind, split, index)` the chats,
`write_core_bundle(directory)` a small evaluation bundle. All three are pure functions of their arguments.
"""

from nanochat.data.tinyworld.bundle import write_core_bundle
from nanochat.data.tinyworld.conversations import KINDS, conversation
from nanochat.data.tinyworld.documents import NUM_BLOCKS, documents
from nanochat.data.tinyworld.phrases import SPLITS

__all__ = ["KINDS", "NUM_BLOCKS", "SPLITS", "conversation", "documents", "write_core_bundle"]
