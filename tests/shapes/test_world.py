import numpy as np

from flowalign.shapes.prompts import TASKS, evaluation_set, meaning, prompts, sample_prompt, scene
from flowalign.shapes.render import render
from rewards.geneval.detectors.palette import PaletteDetector
from rewards.geneval.judge import judge


def rendered(split, count, seed=0):
    rng = np.random.default_rng(seed)
    rows = [sample_prompt(split, rng) for _ in range(count)]
    scenes = [scene(row, rng) for row in rows]
    return rows, scenes, np.stack([render(things, rng) for things in scenes])


def test_the_detector_finds_every_object_of_rendered_truth_with_its_colour():
    rows, scenes, images = rendered("train", 600)
    for things, found in zip(scenes, PaletteDetector().detect(images, rows), strict=True):
        seen = sorted((shape, item["color"]) for shape, items in found.items() for item in items)
        assert seen == sorted((thing.shape, thing.color) for thing in things)


def test_every_rendered_scene_satisfies_its_prompt_to_the_judge():
    for split in ("train", "eval"):
        rows, _, images = rendered(split, 300, seed=1)
        verdicts = [judge(row, found) for row, found in zip(rows, PaletteDetector().detect(images, rows), strict=True)]
        assert all(v.correct and v.strict and v.score == 1 for v in verdicts)


def test_a_scene_of_another_prompt_mostly_fails():
    rows, _, images = rendered("eval", 300, seed=2)
    found = PaletteDetector().detect(images, rows)
    wrong = [judge(rows[(i + 7) % 300], found[i]).correct for i in range(300)]
    assert np.mean(wrong) < 0.1


def test_prompts_are_disjoint_where_a_task_has_forty_and_marked_where_not():
    for task in TASKS:
        train = {row["prompt"] for row in prompts("train", task)}
        held = {row["prompt"] for row in prompts("eval", task)}
        marks = {row["held_out"] for row in prompts("eval", task)}
        if len(train | held) >= 40:
            assert not train & held and marks == {"prompts"}
        else:
            assert train == held and marks == {"seeds"}


def test_a_prompt_and_its_mirror_image_fall_on_the_same_side_of_the_split():
    train = {meaning(row) for task in ("colors", "position", "color_attr") for row in prompts("train", task)}
    held = {meaning(row) for task in ("colors", "position", "color_attr") for row in prompts("eval", task)}
    assert held and not train & held
    by_text = {row["prompt"]: meaning(row) for row in prompts("train") + prompts("eval")}
    assert by_text["a photo of a star left of a ring"] == by_text["a photo of a ring right of a star"]
    assert by_text["a photo of a star above a ring"] != by_text["a photo of a ring above a star"]
    assert by_text["a photo of a red star and a blue ring"] == by_text["a photo of a blue ring and a red star"]
    assert by_text["a photo of a red star and a blue ring"] != by_text["a photo of a blue star and a red ring"]


def test_a_duplicate_is_a_copy_of_one_object_in_a_free_cell_and_as_frequent_as_asked():
    rng = np.random.default_rng(3)
    row = {
        "tag": "color_attr",
        "include": [{"class": "star", "count": 1, "color": "red"}, {"class": "ring", "count": 1}],
    }
    scenes = [scene(row, rng, duplicates=0.35) for _ in range(2000)]
    doubled = [things for things in scenes if len(things) == 3]
    assert abs(len(doubled) / 2000 - 0.35) < 0.04
    for *_, last in doubled:
        assert last.shape in ("star", "ring")
    assert all(len({thing.cell for thing in things}) == len(things) for things in scenes)
    assert all((t[2].shape, t[2].color) in {(t[0].shape, t[0].color), (t[1].shape, t[1].color)} for t in doubled)


def test_four_objects_leave_no_room_for_a_duplicate():
    row = {"tag": "counting", "include": [{"class": "star", "count": 4}]}
    assert len(scene(row, np.random.default_rng(0), duplicates=1.0)) == 4


def test_the_evaluation_set_walks_all_tasks_evenly_and_is_always_the_same():
    rows = evaluation_set(300)
    assert rows == evaluation_set(300)
    assert {task: sum(row["tag"] == task for row in rows) for task in TASKS} == dict.fromkeys(TASKS, 50)


def test_a_render_is_a_function_of_its_seed():
    _, _, a = rendered("train", 20, seed=5)
    _, _, b = rendered("train", 20, seed=5)
    assert (a == b).all()


def test_prompts_have_the_public_benchmark_s_fields():
    for row in prompts("train") + prompts("eval"):
        assert {"tag", "include", "prompt"} <= set(row) and all({"class", "count"} <= set(c) for c in row["include"])
        assert ("exclude" in row) == (row["tag"] == "counting")
