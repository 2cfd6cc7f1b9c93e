"""Plans: every prompt computed once, budgets kept, nothing that changes from one making to the next."""

from __future__ import annotations

import json

import pytest
from support.prompts import family_of_prompts, prompt

from xprobe.capture.plan import Wave, group_prompts, make_plan, part_tokens, prefix_length, split

PROMPTS = family_of_prompts(4, 6)
WAYS = ["tree", "prefix", "plain"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("budget", [1, 60, 150, 10_000])
def test_parts_hold_every_prompt_once_within_the_budget(way, budget):
    parts = split(PROMPTS, range(len(PROMPTS)), budget, way)
    assert sorted(i for part in parts for i in part) == list(range(len(PROMPTS)))
    for part in parts:
        assert len(part) == 1 or part_tokens(PROMPTS, part, way) <= budget


@pytest.mark.parametrize("way", WAYS)
def test_waves_hold_every_group_once_in_order_within_the_budget(way):
    groups = group_prompts(PROMPTS)
    for budget in (1, 200, 400, 10_000):
        plan = make_plan(groups, budget, way)
        assert [group for wave in plan.waves for group in wave.groups] == groups
        for wave in plan.waves:
            whole = sum(part_tokens(g.prompts, range(len(g.prompts)), way) for g in wave.groups)
            assert len(wave.groups) == 1 or whole <= budget
    assert len(make_plan(groups, 10_000, way).waves) == 1


def test_tokens_are_those_fed_to_the_model():
    plan = make_plan(group_prompts(PROMPTS), 10_000, "tree")
    assert plan.tokens == sum(len(p.ids) - 1 for p in PROMPTS)
    assert plan.tokens_run == len({p.ids[: i + 1] for p in PROMPTS for i in range(len(p.ids) - 1)})
    assert plan.saved == pytest.approx(1 - plan.tokens_run / plan.tokens)
    plain = make_plan(group_prompts(PROMPTS), 1, "plain")
    assert plain.tokens == plain.tokens_run
    assert plain.saved == 0


def test_sharing_runs_over_fewer_tokens_than_a_prefix_cache_and_that_over_fewer_than_plain_batches():
    tree, prefix, plain = (make_plan(group_prompts(PROMPTS), 400, way).tokens_run for way in WAYS)
    assert tree < prefix < plain


def test_the_order_of_prompts_in_a_group_changes_parts_but_not_tokens():
    forth = make_plan(group_prompts(PROMPTS), 10_000, "tree")
    back = make_plan(group_prompts(PROMPTS[::-1]), 10_000, "tree")
    assert forth.tokens_run == back.tokens_run


def test_a_plan_is_plain_data():
    plan = make_plan(group_prompts(PROMPTS), 400, "tree")
    assert json.loads(json.dumps(plan.to_dict()))["tokens_run"] == plan.tokens_run
    assert make_plan(group_prompts(PROMPTS), 400, "tree") == plan
    positions, examples = plan.largest_wave
    assert positions == max(sum(len(p.targets) for p in wave.prompts) for wave in plan.waves)
    assert examples == max(len(wave.prompts) for wave in plan.waves)


def test_a_cached_beginning_ends_before_any_row_that_is_kept():
    alike = [prompt(12, 3, 0), prompt(12, 3, 0), prompt(12, 3, 0)]
    assert prefix_length(alike) in (0, 2)  # their questions start at token 2
    group = group_prompts(PROMPTS)[0]
    shared = prefix_length(group.prompts)
    assert 0 < shared <= min(p.spans["question"][0] for p in group.prompts)
    assert len({p.ids[:shared] for p in group.prompts}) == 1


def test_a_wave_lists_its_prompts_group_by_group():
    groups = group_prompts(PROMPTS)
    assert Wave(tuple(groups)).prompts == tuple(p for group in groups for p in group.prompts)
