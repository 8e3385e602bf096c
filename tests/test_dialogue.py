"""Text in and out of a chat: stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.config import InputError
from nanochat.dialogue import StopStrings


def cut(text: str, stops: list[str]) -> str:
    """The definition: up to where the first stop string is complete, without it (the longest that ends there)."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
def test_a_streamed_text_is_cut_where_the_whole_would_be_however_it_comes_in_pieces(pieces, stops):
    stop = StopStrings(stops)
    whole, shown = "", ""
    for piece in pieces:
        whole += piece
        shown += stop.feed(piece)
        if stop.stopped:
            break
        held = whole[len(shown) :]
        assert whole.startswith(shown)
        assert not held or any(s.startswith(held) and s != held for s in stops)  # nothing waits in vain
    assert stop.stopped == (cut(whole, stops) != whole)
    assert shown + stop.flush() == cut(whole, stops)


def test_after_its_stop_nothing_is_shown():
    stop = StopStrings(["\n"])
    assert stop.feed("a\nb") == "a"
    assert stop.stopped
    assert stop.feed("c") + stop.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="empty"):
        StopStrings(["a", ""])
