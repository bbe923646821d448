"""Which prompts an iteration draws."""

import pytest

from flowalign.data.prompts import GroupSampler, PromptsError, load_prompts, task_cycle

OWN_TASKS = [
    {"prompt": "p0", "tag": "colors", "task": "mine"},
    {"prompt": "p1", "tag": "colors"},
    {"prompt": "p2", "task": "mine"},
    {"prompt": "p3", "tag": "counting", "task": ""},
]
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


def read(tmp_path, content, name="p.jsonl"):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row["prompt"] for row in load_prompts(str(tmp_path / name))]


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n', ["a", "b"]),
        ('{"prompt": "one\u2028two"}\n{"prompt": "x\x85y"}', ["one\u2028two", "x\x85y"]),
        ('{"prompt": "a\u2029b"}\n   \n\t\n{"prompt": "c"}', ["a\u2029b", "c"]),
        ('\f\n{"prompt": "\\ud83d\\ude00 \\u2028"}', ["\U0001f600 \u2028"]),
        ('{"prompt": "naïve 猫 \U0001f600", "tag": null, "extra": {"a": [1, 2.5, null]}}', ["naïve 猫 \U0001f600"]),
    ],
)
def test_lines_end_in_a_newline_alone_and_a_byte_order_mark_is_no_text(tmp_path, content, prompts):
    assert read(tmp_path, content) == prompts


GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GOOD + '{"text": "y"}', r'line 2: "prompt" is missing; write a text \(it has .text'),
        (GOOD + '{"Prompt": "y"}', r'line 2: "prompt" is missing; write a text \(it has .Prompt'),
        (GOOD + '{"prompt": 3}', 'line 2: "prompt" is a number'),
        (GOOD + '{"prompt": null}', 'line 2: "prompt" is null'),
        (GOOD + '{"prompt": ["a"]}', 'line 2: "prompt" is a list'),
        (GOOD + '{"prompt": "a", "tag": {}}', "line 2: 'tag' is a mapping"),
        (GOOD + '{"prompt": "a", "negative_prompt": ["b"]}', 'line 2: "negative_prompt" is a list; write a text'),
        (GOOD + '\n{"prompt": " "}', 'line 3: "prompt" is empty'),
        (GOOD + '{"prompt": "a\\u0000b"}', 'line 2: "prompt" holds a NUL'),
        (GOOD + '{"prompt": "a \\ud83d"}', r"line 2: holds half a character \(\\ud83d"),
        (GOOD + '{"prompt": "a", "tag": "\\udc00x"}', r"line 2: holds half a character \(\\udc00"),
        (GOOD + '{"prompt": "a", "x": {"\\ude00": 1}}', "line 2: holds half a character"),
        (GOOD + '{"prompt": "a", "prompt": "b"}', "line 2: the key 'prompt' is given twice"),
        (GOOD + '{"prompt": "a", "x": NaN}', "line 2: NaN is no number"),
        (GOOD + '{"prompt": "a", "x": -Infinity}', "line 2: -Infinity is no number"),
        (GOOD + '{"prompt": "a", "x": 1e999}', "line 2: the number 1e999 is too large"),
        (GOOD + '{"prompt": "a", "x": ' + "9" * 5000 + "}", "line 2: the number 9+… has 5000 digits"),
        (GOOD + '{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2 is nested too deeply"),
        (GOOD + '"just text"', "line 2 holds a text, not an object; write a row a line"),
        (GOOD + "[1]", "line 2 holds a list"),
        (GOOD + "a red dog", r"line 2 is not JSON \(.*column 1\); write a row a line"),
        (GOOD + "{'prompt': 'a'}", "line 2 is not JSON"),
        ('{\n  "prompt": "a"\n}\n', "line 1 is not JSON"),
        ('[{"prompt": "a"}]', "is a JSON array, not JSON Lines"),
        ("\n \n", "is empty; write a row a line"),
        ("", "is empty; write a row a line"),
        (GOOD.encode("utf-16"), "looks like UTF-16 text; save it as UTF-8"),
        (GOOD.encode("utf-16-le"), "looks like UTF-16 text"),
        (GOOD.encode("utf-16-be"), "looks like UTF-16 text"),
        (GOOD.encode("utf-32"), "looks like UTF-32 text"),
        ((GOOD + '{"prompt": "café au lait"}').encode("cp1252"), "line 2 is not UTF-8: the byte 0xe9 looks like 'é'"),
        ((GOOD + '{"prompt": "a “dog” here"}').encode("cp1252"), "line 2 is not UTF-8: the byte 0x93 looks like '“'"),
        ((GOOD + '{"prompt": "猫"}').encode("shift-jis"), "line 2 is not UTF-8"),
        ((GOOD + '{"prompt": "猫').encode()[:-1], "line 2 is not UTF-8: it ends within a character"),
        (GOOD.encode() + b'{"prompt": "a\x00"}', "line 2 holds a NUL byte"),
        (GOOD.encode() + b"\x00" * 512, "line 2 holds a NUL byte"),
        (b"PK\x03\x04\x14\x00", r"is a zip archive, such as a spreadsheet \(.xlsx\)"),
        (b"PAR1\x15\x04", "is a parquet file"),
    ],
)
def test_what_is_no_prompt_file_is_refused_with_its_line(tmp_path, content, said):
    with pytest.raises(PromptsError, match=rf"^data.prompts: .*p\.jsonl.*{said}"):
        read(tmp_path, content)


def test_a_folder_without_prompts_and_nothing_are_refused(tmp_path):
    with pytest.raises(PromptsError, match="is a directory without prompts"):
        load_prompts(str(tmp_path))
    with pytest.raises(PromptsError, match="does not exist; give shapes:train, shapes:eval"):
        load_prompts(str(tmp_path / "absent.jsonl"))
    with pytest.raises(PromptsError, match="there is no shapes:test; the shipped ones are shapes:train and"):
        load_prompts("shapes:test")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(PromptsError, match=r"loop\.jsonl"):
        load_prompts(str(tmp_path / "loop.jsonl"))


def test_a_file_that_is_written_again_is_read_again_and_rows_are_the_caller_s_own(tmp_path):
    assert read(tmp_path, '{"prompt": "a"}') == ["a"]
    load_prompts(str(tmp_path / "p.jsonl"))[0]["prompt"] = "changed"
    assert load_prompts(str(tmp_path / "p.jsonl")) == [{"prompt": "a"}]
    assert read(tmp_path, '{"prompt": "other"}') == ["other"]


def test_of_several_wrong_rows_the_first_is_said_and_how_many_more(tmp_path):
    content = GOOD + '{"prompt": 3}\nno JSON\n' + GOOD + '{"text": "y"}\n'
    with pytest.raises(PromptsError, match=r'line 2: "prompt" is a number; write a text \(2 more rows are wrong\)$'):
        read(tmp_path, content)
    with pytest.raises(PromptsError, match=r"line 3 is not JSON .*\(1 more row is wrong\)$"):
        read(tmp_path, content.replace("3}", '"b"}'))


def test_a_prompt_is_drawn_by_its_task_else_by_its_tag_as_rewards_know_it() -> None:
    sampler = GroupSampler(OWN_TASKS, groups=3, group_size=1, seed=0, task_weights={"colors": 0, "counting": 2})
    assert [{"p0": "mine", "p2": "mine", "p3": "counting"}[p] for p in sampler.batch(0).prompts].count("counting") == 2
    assert {row["prompt"] for row in sampler.rows(9)} == {"p0", "p2", "p3"}
    with pytest.raises(PromptsError, match="no prompt has the task 'color'; the prompts have: mine, colors, counting"):
        GroupSampler(OWN_TASKS, groups=1, group_size=1, seed=0, task_weights={"color": 1})
