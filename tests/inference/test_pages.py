import numpy as np
import pytest

from fqjax.inference.pages import Pages


def tokens(*values):
    return np.array(values, np.int32)


def test_pages_are_taken_for_prompt_and_continuation_and_given_back():
    pages = Pages(5, 4)
    taken, shared = pages.take(tokens(*range(6)), 9)
    assert len(set(taken)) == 3 and shared == 0 and 0 not in taken and pages.used == 3
    assert pages.take(tokens(1), 12) is None and pages.used == 3
    other, _ = pages.take(tokens(1), 8)
    assert not set(other) & set(taken) and pages.available == 0
    pages.give_back(taken)
    assert pages.available == 3


def test_prompts_share_whole_pages_they_begin_with():
    pages = Pages(20, 2)
    first, _ = pages.take(tokens(1, 2, 3, 4, 5), 7)
    assert pages.take(tokens(1, 2, 3, 4, 5), 7)[1] == 0  # Not written yet.
    pages.publish(tokens(1, 2, 3, 4, 5), first, 5)
    second, shared = pages.take(tokens(1, 2, 3, 9, 9), 5)
    assert shared == 2 and second[0] == first[0] and second[1] != first[1]


def test_the_last_token_is_always_computed():
    pages = Pages(8, 2)
    first, _ = pages.take(tokens(1, 2, 3, 4), 4)
    pages.publish(tokens(1, 2, 3, 4), first, 4)
    again, shared = pages.take(tokens(1, 2, 3, 4), 4)
    assert shared == 2 and again[1] != first[1]


def test_equal_pages_after_other_ones_are_not_shared():
    pages = Pages(8, 2)
    first, _ = pages.take(tokens(1, 2, 3, 4, 0), 5)
    pages.publish(tokens(1, 2, 3, 4, 0), first, 5)
    assert pages.take(tokens(9, 9, 3, 4, 0), 5)[1] == 0
    assert Pages(8, 2).take(tokens(3, 4, 0), 3)[1] == 0


def test_kept_pages_are_given_away_last_and_the_longest_unused_first():
    pages = Pages(4, 1)
    for prompt in ((1, 0), (2, 0)):
        taken, _ = pages.take(tokens(*prompt), 2)
        pages.publish(tokens(*prompt), taken, 1)
        pages.give_back(taken)
    assert pages.available == 4
    assert pages.take(tokens(1, 5), 2)[1] == 1  # Used again; what it has besides was free.
    assert pages.take(tokens(7), 1)[1] == 0  # The last free page.
    assert pages.take(tokens(8), 1)[1] == 0  # That of the prompt that began with 2.
    assert pages.take(tokens(2, 5), 2) is None


def test_nothing_is_shared_where_it_is_not_wanted():
    pages = Pages(4, 1, shares=False)
    taken, _ = pages.take(tokens(1, 0), 2)
    pages.publish(tokens(1, 0), taken, 2)
    assert pages.take(tokens(1, 0), 2)[1] == 0
    pages.give_back(taken)
    assert pages.available == 2


@pytest.mark.parametrize("seed", range(3))
def test_no_page_is_ever_written_by_two(seed):
    """Random requests: pages that are written belong to one request, shared ones hold what the prompt says."""
    rng, size = np.random.default_rng(seed), 2
    pages, content, running = Pages(20, size), {}, []
    for _ in range(400):
        if running and rng.random() < 0.5:
            pages.give_back(running.pop(rng.integers(len(running))))
            continue
        prompt = rng.integers(0, 2, rng.integers(1, 9)).astype(np.int32)
        found = pages.take(prompt, len(prompt) + int(rng.integers(0, 4)))
        if found is None:
            continue
        taken, shared = found
        for at in range(shared // size):
            assert content[taken[at]] == prompt[: (at + 1) * size].tolist()
        for at, page in enumerate(taken[shared // size :], shared // size):
            assert all(page not in other for other in running)
            content[page] = prompt[: (at + 1) * size].tolist()
        pages.publish(prompt, taken, len(prompt))
        running.append(taken)
    for taken in running:
        pages.give_back(taken)
    assert pages.available == 20
