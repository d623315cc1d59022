import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from valora_jax.media import StopStrings

few_letters = st.text("ab", max_size=12)


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def streamed(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    watcher = StopStrings(stops, include_in_output=include)
    text = "".join(watcher.add(piece) for piece in pieces) + watcher.finish()
    return text, watcher.matched


@settings(max_examples=500)
@given(
    st.lists(few_letters, max_size=6),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    st.booleans(),
)
def test_any_cutting_gives_what_a_search_of_the_whole_text_gives(pieces, stops, include):
    assert streamed(pieces, stops, include) == naive("".join(pieces), stops, include)


@given(st.lists(few_letters, max_size=6), st.text("ab", min_size=1, max_size=5))
def test_no_more_is_held_back_than_could_become_a_stop_string(pieces, stop):
    watcher = StopStrings([stop])
    shown = "".join(watcher.add(piece) for piece in pieces)
    if watcher.matched is None:
        held = "".join(pieces)[len(shown) :]
        assert held == "" or (stop.startswith(held) and len(held) < len(stop))


def test_text_before_a_stop_comes_at_once():
    watcher = StopStrings(["\nUSER:"])
    assert [watcher.add(t) for t in ("one", " two\nUS", "A", "\nUSER", ": x", "y")] == [
        "one",
        " two",
        "\nUSA",
        "",
        "",
        "",
    ]
    assert watcher.matched == "\nUSER:"
    assert watcher.finish() == ""


def test_without_stop_strings_everything_passes():
    watcher = StopStrings([])
    assert watcher.add("text") == "text"
    assert watcher.finish() == ""


@pytest.mark.parametrize("stops", [[""], "text", [3]], ids=str)
def test_a_wrong_stop_string_is_refused(stops):
    with pytest.raises(ValueError, match="non-empty strings"):
        StopStrings(stops)
