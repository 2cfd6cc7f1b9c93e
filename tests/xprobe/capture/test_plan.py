"""A plan computes every prompt once, keeps the token budget, and is the same each time it is made."""

from __future__ import annotations

import json

import pytest
from support.prompts import family_of_prompts, prompt, requests

from xprobe.capture.plan import Wave, make_plan, part_tokens, prefix_length, split
from xprobe.capture.requests import group_requests

PROMPTS = family_of_prompts(4, 6)
REQUESTS = requests(PROMPTS)
STRATEGIES = ["tree", "prefix", "plain"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("budget", [1, 60, 150, 10_000])
def test_parts_hold_every_prompt_once_within_the_budget(strategy, budget):
    parts = split(REQUESTS, range(len(REQUESTS)), budget, strategy)
    assert sorted(i for part in parts for i in part) == list(range(len(PROMPTS)))
    for part in parts:
        assert len(part) == 1 or part_tokens(REQUESTS, part, strategy) <= budget


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_waves_hold_every_group_once_in_order_within_the_budget(strategy):
    groups = group_requests(REQUESTS)
    for budget in (1, 200, 400, 10_000):
        plan = make_plan(groups, budget, strategy)
        assert [group for wave in plan.waves for group in wave.groups] == groups
        for wave in plan.waves:
            whole = sum(part_tokens(g.requests, range(len(g.requests)), strategy) for g in wave.groups)
            assert len(wave.groups) == 1 or whole <= budget
    assert len(make_plan(groups, 10_000, strategy).waves) == 1


def test_a_plan_counts_the_tokens_that_the_model_runs_over():
    plan = make_plan(group_requests(REQUESTS), 10_000, "tree")
    assert plan.tokens == sum(len(p.ids) - 1 for p in PROMPTS)
    assert plan.tokens_run == len({p.ids[: i + 1] for p in PROMPTS for i in range(len(p.ids) - 1)})
    assert plan.saved == pytest.approx(1 - plan.tokens_run / plan.tokens)
    plain = make_plan(group_requests(REQUESTS), 1, "plain")
    assert plain.tokens == plain.tokens_run
    assert plain.saved == 0


def test_a_tree_runs_over_fewer_tokens_than_a_prefix_cache_and_a_prefix_cache_than_plain_batches():
    tree, prefix, plain = (make_plan(group_requests(REQUESTS), 400, strategy).tokens_run for strategy in STRATEGIES)
    assert tree < prefix < plain


def test_the_order_of_prompts_in_a_group_changes_parts_but_not_tokens():
    forward = make_plan(group_requests(REQUESTS), 10_000, "tree")
    reverse = make_plan(group_requests(REQUESTS[::-1]), 10_000, "tree")
    assert forward.tokens_run == reverse.tokens_run


def test_a_plan_is_plain_data():
    plan = make_plan(group_requests(REQUESTS), 400, "tree")
    assert json.loads(json.dumps(plan.to_dict()))["tokens_run"] == plan.tokens_run
    assert make_plan(group_requests(REQUESTS), 400, "tree") == plan
    most = plan.most_rows
    positions, examples = most["answer"], most["question"]
    assert positions == max(sum(len(p.reads["answer"].positions) for p in wave.requests) for wave in plan.waves)
    assert examples == max(len(wave.requests) for wave in plan.waves)


def test_a_cached_beginning_ends_before_the_first_kept_row():
    alike = requests([prompt(12, 3, 0)] * 3)
    assert prefix_length(alike) in (0, 2)  # their questions start at token 2
    group = group_requests(REQUESTS)[0]
    shared = prefix_length(group.requests)
    assert 0 < shared <= min(p.reads["question"].start for p in group.requests)
    assert len({p.ids[:shared] for p in group.requests}) == 1


def test_a_wave_lists_its_requests_group_by_group():
    groups = group_requests(REQUESTS)
    assert Wave(tuple(groups)).requests == tuple(p for group in groups for p in group.requests)
