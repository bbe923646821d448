"""Every algorithm found under flowalign/algorithms keeps the contract."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowalign.algorithm import Algorithm, annotated
from flowalign.algorithms import UnknownAlgorithm, algorithm_class, build_algorithm
from flowalign.types import EncodedPrompts, LatentBatch, SamplingPlan, Trajectories, value_of
from tests.algorithms.every import DEFAULTS
from tests.algorithms.seams.toys import Given, decoder, warmth
from tests.algorithms.toy import SHAPE, LinearVelocity, TwoMaps, condition, make_rollout, make_scores
from tests.algorithms.whole import prepare

# Options that change which networks are asked, or for what; every algorithm runs with its defaults as well.
VARIANTS = {
    "consistency heun": {"type": "consistency", "solver": "heun", "guidance_scale": 3, "loss": "squared"},
    "consistency without teacher": {"type": "consistency", "teacher": "none", "condition_dropout": 0.5},
    "guidance_distill range": {"type": "guidance_distill", "guidance_range": [1, 5], "condition_dropout": 0.5},
    "meanflow guided": {"type": "meanflow", "omega": 0.5, "kappa": 0.3, "equal_fraction": 0.3},
    "progressive guided": {"type": "progressive", "guidance_scale": 2, "shift": 3, "condition_dropout": 0.5},
    "reflow squared": {"type": "reflow", "loss": "squared", "condition_dropout": 0.5},
    "reflow lpips": {"type": "reflow", "loss": "lpips_huber"},
    "reflow lpips over t": {"type": "reflow", "loss": "lpips_huber_over_t"},
}
SEAM = {"direct_reward": {"type": f"{Path(__file__).parent / 'seams' / 'direct_reward.py'}:DirectReward"}}
CONFIGS = {**DEFAULTS, **VARIANTS, **SEAM}


def models_for(algorithm) -> dict[str, Any]:
    models: dict[str, Any] = {role: LinearVelocity(seed) for seed, role in enumerate(algorithm.needs.roles)}
    if algorithm.needs.features:
        models["features"] = TwoMaps()
    return (
        models
        | ({"decoder": decoder} if algorithm.needs.decoder else {})
        | ({"reward": warmth} if algorithm.needs.reward else {})
    )


def batch_for(algorithm, policy):
    """A batch of what the algorithm learns from, and scores if it needs them."""
    needs = algorithm.needs
    scores = make_scores(torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0, 0.0, 0.0, 1.0])) if needs.scores else None
    if needs.batch is Trajectories:
        return make_rollout(policy, algorithm.plan(0, 0)), scores
    if needs.batch is EncodedPrompts:
        return algorithm.source(Given()).batch(0), scores
    assert needs.batch is LatentBatch, f"teach this test to make a {needs.batch.__name__}"
    latents, noise = torch.randn(2, 8, *SHAPE, generator=torch.Generator().manual_seed(0))
    return LatentBatch(latents, condition(8), 0, noise), scores


def prepared(name):
    algorithm = build_algorithm(CONFIGS[name])
    models = models_for(algorithm)
    with torch.no_grad():
        train = prepare(algorithm, *batch_for(algorithm, models["policy"]), models)
    return algorithm, models, train


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_finite_and_its_gradient_reaches_the_policy_only(name):
    algorithm, models, train = prepared(name)
    output = algorithm.loss(models, train)
    assert output.loss.ndim == 0 and torch.isfinite(output.loss)
    assert all(not value_of(m).requires_grad for m in output.metrics.values())
    output.loss.backward()
    assert any(bool((p.grad != 0).any()) for p in models["policy"].parameters() if p.grad is not None)
    others = [p for role, m in models.items() if role != "policy" and isinstance(m, nn.Module) for p in m.parameters()]
    assert all(p.grad is None for p in others)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_is_invariant_to_the_micro_batch_split(name):
    algorithm, models, train = prepared(name)
    parameters = list(models["policy"].parameters())
    whole = torch.autograd.grad(algorithm.loss(models, train).loss, parameters)
    split = [torch.zeros_like(p) for p in parameters]
    for part in torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).split(3):
        grads = torch.autograd.grad(algorithm.loss(models, train.take(part)).loss, parameters)
        split = [a + g * len(part) / len(train) for a, g in zip(split, grads, strict=True)]
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", CONFIGS)
def test_prepare_is_a_function_of_its_arguments(name):
    algorithm, models, train = prepared(name)
    with torch.no_grad():
        again = prepare(algorithm, *batch_for(algorithm, models["policy"]), models)
    assert train.total == again.total and train.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(train.tensors[key], again.tensors[key]) for key in train.tensors)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_item_is_the_same_in_every_selection(name):
    """A rank sees its own share alone: whatever it is, the items are those of the whole, bit for bit."""
    algorithm, models, train = prepared(name)
    batch, scores = batch_for(algorithm, models["policy"])
    credit = algorithm.credit(batch, scores)
    order = torch.randperm(len(credit), generator=torch.Generator().manual_seed(1))
    for index in (order[: len(order) // 3], order[-1:], order[:0]):
        own = credit.take(index)
        with torch.no_grad():
            part = annotated(algorithm.items(batch, own), algorithm.annotate(models, batch, own))
        expected = train.take(index)
        assert part.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(part.tensors[key], expected.tensors[key]) for key in part.tensors)
        for mine, theirs in zip(part.condition.expand().values(), expected.condition.expand().values(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_items_and_calls_are_those_that_it_says(name):
    """What a plan counts by: no more items, and each network asked about each as often, in the mean of all."""
    fields, own = algorithm_class(str(CONFIGS[name]["type"])).Config.model_fields, CONFIGS[name]
    algorithm = build_algorithm({**own, "group_size": 4} if "group_size" in fields else own)
    models, rows = models_for(algorithm), Counter()

    def counting(role):
        def call(x, *args, **options):
            rows[role.partition(":")[0]] += len(x)
            return models[role](x, *args, **options)

        return call if role in algorithm.needs.roles else models[role]

    batch, scores = batch_for(algorithm, models["policy"])
    counted = {role: counting(role) for role in models}
    credit = algorithm.credit(batch, scores)
    most = algorithm.most_items(int(credit.sample.max()) + 1 if scores is None else len(scores.total))
    assert algorithm.says_calls and 0 < len(credit) * algorithm.needs.item_samples <= most
    with torch.no_grad():
        items = annotated(algorithm.items(batch, credit), algorithm.annotate(counted, batch, credit))
    asked, rows = rows, Counter()
    algorithm.loss(counted, items)
    for part, found in ((algorithm.network_calls.annotate, asked), (algorithm.network_calls.loss, rows)):
        said, drawn = defaultdict[str, float](float), set()
        for call in part:
            said[call.role.partition(":")[0]] += call.times * len(credit)
            drawn |= {call.role} if call.times % 1 else set()
        assert said.keys() == found.keys()
        assert all(found[role] == said[role] for role in found if role not in drawn)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_survives_a_round_trip_and_refuses_unknown_keys(name):
    cls = algorithm_class(str(CONFIGS[name]["type"]))
    config = cls.Config.model_validate(CONFIGS[name])
    assert cls.Config.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValueError, match="Extra inputs"):
        cls.Config.model_validate({**CONFIGS[name], "no_such_key": 1})


@pytest.mark.parametrize("name", CONFIGS)
def test_what_it_needs_fits_together(name):
    algorithm = build_algorithm(CONFIGS[name])
    needs = algorithm.needs
    assert isinstance(algorithm, Algorithm) and needs.roles[0] == "policy" and needs.group_size >= 1
    assert needs.batch is Trajectories or not (needs.scores or needs.rollout or needs.rollout_weights == "ema")
    assert needs.batch is EncodedPrompts or not (needs.decoder or needs.reward)
    assert needs.batch is LatentBatch or not (needs.teacher or needs.average or needs.features)
    assert set(needs.inputs) <= {"r", "guidance"} and (needs.teacher_of is None) == (not needs.teachers)
    plan = algorithm.plan(0, 0)
    assert (needs.batch is Trajectories) == isinstance(plan, SamplingPlan)
    assert all(isinstance(row, str) for row in algorithm.card_facts().values())


def test_an_unknown_algorithm_is_refused_with_the_known_names():
    with pytest.raises(UnknownAlgorithm, match="flow_grpo"):
        algorithm_class("flow_grop")
