"""Which prompts an iteration draws."""

import pytest

from flowalign.data.prompts import GroupSampler, PromptsError, load_prompts, task_cycle

ROWS = [{"prompt": f"{tag}{i}", "tag": tag} for tag in ("a", "b", "c") for i in range(4)]


def drawn(iterations, **options):
    sampler = GroupSampler(ROWS, groups=3, group_size=2, seed=0, **options)
    return [row["prompt"] for i in range(iterations) for row in sampler.batch(i).metadata[::2]]


def test_without_weights_tasks_take_turns_and_a_pass_draws_every_prompt_once():
    prompts = drawn(4)
    assert [p[0] for p in prompts] == ["a", "b", "c"] * 4
    assert sorted(prompts) == sorted(row["prompt"] for row in ROWS)


def test_a_weight_of_three_gives_a_task_three_turns_spread_over_the_cycle():
    assert task_cycle(ROWS, {"b": 3}) == ["b", "a", "b", "c", "b"]
    prompts = drawn(5, task_weights={"b": 3})
    assert [sum(p[0] == tag for p in prompts) for tag in "abc"] == [3, 9, 3]


def test_a_weighted_task_repeats_no_prompt_before_its_pass_is_over():
    prompts = [p for p in drawn(5, task_weights={"b": 3}) if p[0] == "b"]
    assert len(set(prompts[:4])) == len(set(prompts[4:8])) == 4


def test_a_weight_of_zero_leaves_a_task_out():
    assert {p[0] for p in drawn(4, task_weights={"c": 0})} == {"a", "b"}


def test_a_group_is_one_prompt_with_one_id_and_sample_ids_never_repeat():
    sampler = GroupSampler(ROWS, groups=3, group_size=2, seed=0)
    batches = [sampler.batch(i) for i in range(3)]
    assert batches[1].group_ids == (3, 3, 4, 4, 5, 5)
    assert [i for batch in batches for i in batch.sample_ids] == list(range(18))
    assert batches[0].prompts[0] == batches[0].prompts[1] != batches[0].prompts[2]


@pytest.mark.parametrize(
    ("weights", "said"), [({"d": 2}, "no prompt has the task 'd'"), (dict.fromkeys("abc", 0), "all")]
)
def test_weights_that_fit_no_prompt_are_refused(weights, said):
    with pytest.raises(PromptsError, match=said):
        task_cycle(ROWS, weights)


def test_a_prompt_file_s_error_names_its_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    with pytest.raises(PromptsError, match="line 2"):
        load_prompts("p.jsonl", tmp_path)
