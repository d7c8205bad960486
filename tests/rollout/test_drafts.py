"""Drafts: what a response is expected to go on with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nabla_fast.rollout.drafts import Drafter

OLD = (1, 2, 3, 4, 5, 6, 7, 8, 9)


def follow(drafter: Drafter, tokens: tuple[int, ...]) -> None:
    for token in tokens:
        drafter.add(token)


def test_a_rollout_follows_the_first_earlier_trajectory_from_where_it_begins() -> None:
    drafter = Drafter((50, 51), (1, 20), [OLD, (1, 20, 30)], most=4)
    assert drafter.draft(99) == (3, 4, 5, 6)
    follow(drafter, (3, 4, 5, 6))
    assert drafter.draft(2) == (7, 8)


def test_after_a_mismatch_the_longest_known_end_leads_on() -> None:
    drafter = Drafter((50,), (20,), [OLD], most=8)
    assert drafter.draft(99) == OLD[1:]
    follow(drafter, (40, 5, 6))
    # Two tokens are found again: a short draft, and one twice as long when it proved right.
    assert drafter.draft(99) == (7, 8, 9)
    follow(drafter, (41, 3))
    assert drafter.draft(99) == (4, 5, 6)
    follow(drafter, (4, 5, 6, 7))
    assert drafter.draft(99) == (8, 9)


def test_a_draft_that_proves_right_grows_up_to_the_longest() -> None:
    text = tuple(range(100, 160))
    drafter = Drafter((50,), (20,), [(20, *text)], most=12)
    follow(drafter, (60, 105))
    for length in (3, 6, 12, 12):
        found = drafter.draft(99)
        assert len(found) == length
        follow(drafter, (*found, found[-1] + 1))


def test_of_equal_ends_the_nearest_position_wins() -> None:
    old = (7, 1, 0, 0, 0, 0, 7, 2, 0)
    early, late = (Drafter((50,), (9,) * begin, [old], most=2) for begin in (1, 6))
    for drafter in (early, late):
        follow(drafter, (7,))
    assert early.draft(1) == (1,)
    assert late.draft(1) == (2,)


def test_the_prompt_and_the_response_itself_are_the_last_resort() -> None:
    drafter = Drafter((50, 51, 52, 53), (), (), most=2)
    assert drafter.draft(99) == ()
    follow(drafter, (51,))
    assert drafter.draft(99) == (52, 53)
    follow(drafter, (60, 61, 60))
    assert drafter.draft(99) == (61, 60)


def test_without_room_nothing_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Drafter((50,), (20,), [OLD], most=8)
    follow(drafter, (40, 5, 6))
    monkeypatch.setattr(Drafter, "_look_up", lambda self: pytest.fail("looked up"))
    assert drafter.draft(0) == ()


def test_the_rest_is_all_that_followed() -> None:
    drafter = Drafter((50, 51), (1, 20), [OLD], most=2)
    assert drafter.rest() == OLD[2:]
    follow(drafter, (3, 99))
    assert drafter.rest() == ()
    follow(drafter, (6, 7))
    assert drafter.rest() == (8, 9)
    follow(drafter, (51,))
    assert drafter.rest() == (1, 20, 3, 99, 6, 7, 51)
    assert Drafter((50,), (), [OLD], most=0).rest() == ()


def test_no_drafts_are_asked_for() -> None:
    drafter = Drafter((50, 51), (50,), [OLD], most=0)
    follow(drafter, (50,))
    assert drafter.draft(99) == ()


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
    st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=3),
    st.lists(st.integers(0, 3), min_size=1, max_size=20),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_any_history_gives_a_draft_within_bounds(
    prompt: list[int], earlier: list[list[int]], response: list[int], most: int, room: int
) -> None:
    drafter = Drafter(prompt, (), earlier, most)
    known = [*map(tuple, earlier)]
    for i, token in enumerate(response):
        draft = drafter.draft(room)
        assert len(draft) <= min(most, room)
        own = (*prompt, *response[:i])
        assert not draft or any(
            draft == text[j : j + len(draft)] for text in (*known, own) for j in range(len(text))
        ), "a draft is a piece of something that was drawn"
        drafter.add(token)


@pytest.mark.parametrize("most", [1, 8])
def test_a_repeated_trajectory_is_foreseen_whole(most: int) -> None:
    drafter = Drafter((50,), (), [OLD], most)
    done, calls = 0, 0
    while done < len(OLD):
        right = 0
        for token in drafter.draft(len(OLD) - done - 1):
            assert token == OLD[done + right]
            right += 1
        follow(drafter, OLD[done : done + right + 1])
        done, calls = done + right + 1, calls + 1
    assert calls == -(-len(OLD) // (most + 1))


def test_certain_drafts_need_a_text_that_was_followed_for_long() -> None:
    text = tuple(range(100, 140))
    drafter = Drafter((50,), (20,), [(20, *text)], most=6)
    assert drafter.draft(99, certain=True) == (), "that it begins there is not enough"
    follow(drafter, text[:7])
    assert drafter.draft(99, certain=True) == ()
    follow(drafter, text[7:8])
    assert drafter.draft(99, certain=True) == text[8:14]
    follow(drafter, (60, *text[20:23]))
    assert drafter.draft(99, certain=True) == ()
    # Four were found when it was looked up, or three and one that followed.
    follow(drafter, text[23:28])
    found = drafter.draft(99, certain=True)
    assert found
    assert found == text[28 : 28 + len(found)]
