"""The tree against exhaustive enumeration, and its bounds: branches, distance, budget, horizon."""

import math
from itertools import pairwise, product
from statistics import fmean

import pytest

from tests.forks.toy import VOCABULARY, greedy, probabilities, record, record_after, run
from vllm_entropix.forks.choice import chooser
from vllm_entropix.forks.tree import Birth, Tree
from vllm_entropix.records import branches as told
from vllm_entropix.settings.server import Forks


def logprobs(answer):
    return [math.log(probabilities(answer[:place])[token]) for place, token in enumerate(answer)]


def answers(tree):
    return {tuple(branch.token_ids): branch for branch in tree.branches}


@pytest.mark.parametrize("depth", [1, 2])
def test_all_branches_together_are_all_answers_with_their_probabilities(depth):
    found = answers(run(depth, branches=64, width=VOCABULARY))
    assert set(found) == set(product(range(VOCABULARY), repeat=depth))
    for answer, branch in found.items():
        assert branch.logprobs == pytest.approx(logprobs(answer))
    assert sum(math.exp(sum(branch.logprobs)) for branch in found.values()) == pytest.approx(1)


def test_with_greedy_branches_the_most_confident_is_the_best_of_all_answers():
    tree = run(2, branches=64, width=VOCABULARY, select="confidence")
    best = max(product(range(VOCABULARY), repeat=2), key=lambda answer: fmean(logprobs(answer)))
    assert tuple(tree.branches[tree.choose()].token_ids) == best


def test_a_horizon_of_nothing_more_is_a_greedy_choice_by_the_token_itself():
    # Compared by the very token at which they part, none beats the most probable one.
    tree = run(8, branches=8, width=3, horizon=1, distance=2, select="confidence", entropy=1.0)
    assert len(tree.branches) > 3
    kept = [branch for branch in tree.branches if branch.pruned_at is None]
    assert [branch.id for branch in kept] == [tree.choose()]


def test_width_one_changes_nothing():
    tree = run(6, branches=64, width=1)
    assert [branch.token_ids for branch in tree.branches] == [tree.branches[0].token_ids]
    alone = []
    while len(alone) < 6:
        alone.append(greedy(alone))
    assert tree.branches[0].token_ids == alone
    assert (tree.choose(), tree.spent) == (0, 0)


def test_no_more_branches_live_at_once_than_are_allowed():
    most = []
    tree = run(7, branches=4, width=3, seen=lambda tree: most.append(len(tree.live)))
    assert max(most) == 4
    assert len(tree.branches) > 4  # the last tokens' branches end where they begin


def test_forks_of_a_branch_keep_their_distance():
    tree = run(12, branches=64, width=2, distance=5)
    for branch in tree.branches:
        children = [child.position for child in tree.branches if child.parent is branch]
        places = ([] if branch.parent is None else [branch.position]) + children
        assert all(later - earlier >= 5 for earlier, later in pairwise(places))


def test_the_budget_ends_all_branches_but_the_best():
    tree = run(40, branches=8, width=3, distance=2, budget=20)
    kept = [branch for branch in tree.branches if branch.pruned_at is None]
    assert len(kept) == 1
    assert len(kept[0].token_ids) == 40
    # A step of all branches at most, and what the best had fallen behind.
    assert 20 <= tree.spent <= 20 + 8
    assert all(branch.position < 20 for branch in tree.branches)


def test_where_all_are_wanted_the_budget_ends_those_that_still_run():
    tree, _ = scripted({0: 1.0, 1: 2.0, 2: 3.0}, select="all", branches=3, width=3, budget=6)
    tree.feed(0, [4], [record_after([])], ended=False)
    go_on(tree, 0, [1], ended=True)
    for number in (1, 2):
        go_on(tree, number, [1, 1, 1], ended=False)
    assert tree.spent >= 6
    assert tree.settle() == [1]
    assert [branch.pruned_at for branch in tree.branches] == [None, 4, None]
    go_on(tree, 2, [1], ended=True)
    assert tree.chosen(tree.choose()) == [2, 0]
    assert tree.described(2).beside([2, 0]) == 4  # those of the branch that was given up


def test_what_several_answers_share_is_theirs_once():
    lines = told.ForkTree(
        branches=[
            told.Branch(id=0, tokens=10),
            told.Branch(id=1, parent=0, position=4, tokens=5),
            told.Branch(id=2, parent=1, position=6, tokens=3),
            told.Branch(id=3, parent=0, position=8, tokens=2),
        ]
    )
    assert lines.generated == 20
    assert lines.beside([2]) == 20 - (4 + 2 + 3)
    assert lines.beside([2, 3]) == 20 - (8 + 2 + 3 + 2)
    assert lines.beside([0, 2]) == 20 - (10 + 2 + 3)
    assert lines.beside([]) == 20


def test_no_budget_no_fork():
    assert len(run(6, branches=8, width=3, budget=0).branches) == 1


def test_another_may_forbid_forks():
    forks = Forks(branches=4, entropy=0, floor=0, distance=1)
    tree = Tree(forks, chooser("confidence"), may_fork=lambda: False)
    assert tree.feed(0, [1], [record_after([])], ended=False) == []


def test_a_share_of_the_places_forks():
    forks = Forks(branches=64, entropy=0, floor=0, distance=1, share=0.25)
    tree = Tree(forks, chooser("confidence"), coin_of=lambda branch, position: (10 * branch + position) % 4 / 4)
    births = [tree.feed(0, [greedy([])], [record_after([])], ended=False) for _ in range(8)]
    assert [[birth.position for birth in one] for one in births] == [[0], [], [], [], [4], [], [], []]
    births = [tree.feed(1, [greedy([])], [record_after([])], ended=False) for _ in range(4)]
    assert [[birth.position for birth in one] for one in births] == [[], [2], [], []]


def scripted(scores, **settings):
    """A tree whose chooser looks the contenders' scores up by branch, and what it was asked."""
    asked = []

    def choose(contenders):
        asked.append([(one.branch, list(one.token_ids[one.start : one.stop])) for one in contenders])
        return [scores[one.branch] for one in contenders]

    forks = Forks(**{"entropy": 0, "floor": 0, "distance": 1, "branches": 8, "width": 2, **settings})
    return Tree(forks, choose), asked


def go_on(tree, number, tokens, ended=False):
    """Tokens at which nothing forks, because nothing is known of them."""
    assert tree.feed(number, tokens, [None] * len(tokens), ended) == []


def test_branches_are_compared_at_the_horizon_and_the_losers_given_up():
    tree, asked = scripted({0: 1.0, 1: 2.0}, horizon=2)
    go_on(tree, 0, [3, 3])
    [birth] = tree.feed(0, [4], [record_after([3, 3])], ended=False)
    assert birth == Birth(1, 0, 2, birth.token, probabilities([3, 3])[birth.token])
    go_on(tree, 0, [1, 1])
    go_on(tree, 1, [2])
    assert tree.settle() == []  # the child isn't there yet
    go_on(tree, 1, [2])
    assert tree.settle() == [0]
    assert asked == [[(0, [4, 1, 1]), (1, [birth.token, 2, 2])]]
    assert tree.branches[0].pruned_at == 5
    assert tree.choose() is None
    go_on(tree, 1, [0], ended=True)
    assert tree.choose() == 1
    assert len(asked) == 1


def test_tokens_of_branches_that_were_given_up_are_spent():
    tree, _ = scripted({0: 1.0, 1: 2.0}, horizon=1)
    go_on(tree, 0, [3, 3])
    tree.feed(0, [4], [record_after([3, 3])], ended=False)
    assert tree.spent == 1  # the token that the other begins with
    go_on(tree, 0, [1, 1, 1])
    go_on(tree, 1, [2])
    assert tree.spent == 2
    assert tree.settle() == [0]
    go_on(tree, 1, [2])
    assert tree.spent == 3
    go_on(tree, 1, [2, 2, 2])
    assert tree.spent == 4  # now those of the first are beside the answer


def test_a_branch_that_has_ended_waits_for_the_others():
    tree, _ = scripted({0: 1.0, 1: 0.0}, horizon=3)
    tree.feed(0, [4], [record_after([])], ended=True)
    go_on(tree, 1, [2, 2])
    assert tree.settle() == []
    go_on(tree, 1, [2])
    assert tree.settle() == [1]
    assert tree.choose() == 0


def test_a_fork_within_a_horizon_is_decided_first_and_stands_for_its_side():
    tree, asked = scripted({0: 1.0, 1: 0.0, 2: 5.0}, horizon=3)
    tree.feed(0, [4], [record_after([])], ended=False)  # 1 parts from 0 at 0
    [birth] = tree.feed(1, [4], [record_after([2])], ended=False)  # 2 parts from 1 at 1
    assert (birth.branch, birth.parent, birth.position) == (2, 1, 1)
    for number in (0, 1, 2):
        go_on(tree, number, [3, 3, 3, 3])
    assert tree.settle() == [1, 0]
    assert [[branch for branch, _ in one] for one in asked] == [[1, 2], [0, 2]]


def test_with_a_branch_its_own_branches_are_given_up():
    tree, _ = scripted({0: 9.0, 1: 0.0, 2: 0.0}, horizon=3, distance=2)
    tree.feed(0, [4], [record_after([])], ended=False)
    go_on(tree, 1, [1])
    tree.feed(1, [4], [record_after([1, 1])], ended=False)  # 2 parts from 1 at 2
    go_on(tree, 0, [3, 3, 3])
    go_on(tree, 1, [3])
    go_on(tree, 2, [3])
    assert sorted(tree.settle()) == [1, 2]


def test_the_branches_of_a_side_that_wins_go_on_until_they_are_compared():
    tree, _ = scripted({0: 0.0, 1: 1.0, 2: 2.0}, horizon=3)
    tree.feed(0, [4], [record_after([])], ended=False)  # 1 parts from 0 at 0
    go_on(tree, 1, [1])
    tree.feed(1, [4], [record_after([1, 1])], ended=False)  # 2 parts from 1 at 2
    for number, tokens in ((0, [3, 3, 3]), (1, [3]), (2, [3])):
        go_on(tree, number, tokens)
    assert tree.settle() == [0]
    for number in (1, 2):
        go_on(tree, number, [3, 3])
    assert tree.settle() == [1]


def test_branches_of_an_earlier_fork_have_no_part_in_a_later_one():
    tree, asked = scripted({0: 0.0, 1: 9.0, 2: 1.0}, horizon=2)
    tree.feed(0, [4], [record_after([])], ended=False)  # 1 parts from 0 at 0, and is slow
    go_on(tree, 0, [3])
    tree.feed(0, [4], [record_after([4, 3])], ended=False)  # 2 parts from 0 at 2
    go_on(tree, 0, [3, 3])
    go_on(tree, 2, [3, 3])
    assert tree.settle() == [0]
    assert [branch for branch, _ in asked[0]] == [0, 2]
    go_on(tree, 1, [3, 3])
    assert tree.settle() == [2]


def test_what_all_branches_have_is_decided():
    tree, _ = scripted({0: 1.0, 1: 2.0}, horizon=2)
    go_on(tree, 0, [3, 3])
    assert tree.decided() == (0, 2)
    [birth] = tree.feed(0, [4], [record_after([3, 3])], ended=False)
    assert tree.decided() == tree.decided(since=2) == (0, 2)
    go_on(tree, 0, [1, 1])
    go_on(tree, 1, [2, 2])
    assert tree.decided(since=2) == (0, 2)
    tree.settle()
    assert tree.decided(since=2) == (1, 5)
    assert tree.branches[1].token_ids == [3, 3, birth.token, 2, 2]


def test_a_branch_that_the_engine_gives_up_competes_no_more():
    tree, asked = scripted({0: 9.0, 1: 1.0})
    tree.feed(0, [4], [record_after([])], ended=False)
    go_on(tree, 0, [3], ended=True)
    tree.fail(0)
    assert tree.branches[0].pruned_at == 2
    assert tree.choose() is None
    go_on(tree, 1, [3], ended=True)
    assert tree.choose() == 1
    assert asked == []


def test_the_last_branch_that_the_engine_gives_up_is_the_answer():
    tree, _ = scripted({})
    tree.feed(0, [4], [record_after([])], ended=False)
    for number in (1, 0):
        go_on(tree, number, [3], ended=True)
        tree.fail(number)
    assert tree.choose() == 0


def test_of_equals_the_earliest_is_kept():
    tree, _ = scripted({0: 1.0, 1: 1.0})
    tree.feed(0, [4], [record_after([])], ended=True)
    go_on(tree, 1, [1], ended=True)
    assert tree.choose() == 0


def test_a_score_that_is_no_number_loses():
    tree, _ = scripted({0: math.nan, 1: -1e9})
    tree.feed(0, [4], [record_after([])], ended=True)
    go_on(tree, 1, [1], ended=True)
    assert tree.choose() == 1
    assert [branch.score for branch in tree.branches] == [None, -1e9]


def test_a_rare_tokens_record_tells_its_log_probability():
    tree, _ = scripted({})
    records = [record([(7, 0.6), (8, 0.3)], logprob=-4.5), record([(7, 0.4)], logprob=-0.9), record([(7, 0.6)]), None]
    tree.feed(0, [9, 7, 9, 9], records, False)
    assert tree.branches[0].logprobs == [-4.5, math.log(0.4), None, None]


def test_the_tree_is_told():
    tree, _ = scripted({0: 1.0, 1: 2.0}, horizon=1)
    go_on(tree, 0, [3])
    [birth] = tree.feed(0, [4], [record_after([3])], ended=False)
    go_on(tree, 0, [1])
    go_on(tree, 1, [2, 2], ended=True)
    tree.settle()
    told = tree.described(tree.choose())
    assert [branch.model_dump() for branch in told.branches] == [
        {"id": 0, "parent": None, "position": 0, "token": None, "tokens": 3, "score": 1.0, "pruned_at": 3, "chosen": False},
        {
            "id": 1,
            "parent": 0,
            "position": 1,
            "token": birth.token,
            "tokens": 3,
            "score": 2.0,
            "pruned_at": None,
            "chosen": True,
        },
    ]
    assert told.generated == 6
    assert told.chosen == told.branches[1]
