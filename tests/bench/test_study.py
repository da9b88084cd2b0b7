"""The study file: what is drawn from it, and what is refused, in one sentence that names the key, the value and the way out."""

import math
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from vllm_entropix.bench.study import Range, Study
from vllm_entropix.bench.tasks import KINDS
from vllm_entropix.settings.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "benchmarks" / "evidence" / "STUDY.toml"
SMALL = """
name = "small"
seed = 3
configurations = 6
[models.one]
endpoint = "http://127.0.0.1:1/v1"
[tasks.sums]
kind = "arithmetic"
tuning = 5
test = 10
[samplers.greedy]
fixed = { temperature = 0 }
[samplers.min_p]
sampler = "min_p"
fixed = { top_k = 20 }
ranges = { temperature = [0.2, 2], min_p = { low = 0.01, high = 0.3, scale = "log" } }
"""


def study(text=SMALL, **changes):
    data = tomllib.loads(text)
    for key, value in changes.items():
        *path, last = key.split("__")
        table = data
        for name in path:
            table = table[name]
        table[last] = value
    return Study.model_validate(data)


def refused(tmp_path, text):
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        Study.load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_configurations_are_drawn_from_the_ranges():
    drawn = study().parameters("min_p")
    assert len(drawn) == 6
    for parameters in drawn:
        assert parameters["top_k"] == 20
        assert 0.2 <= parameters["temperature"] <= 2
        assert 0.01 <= parameters["min_p"] <= 0.3
    assert len({parameters["temperature"] for parameters in drawn}) == 6
    assert study().parameters("greedy") == [{"temperature": 0}]


def test_configurations_depend_on_the_seed_and_on_nothing_of_other_samplers():
    drawn = study().parameters("min_p")
    assert study(samplers__new={"ranges": {"temperature": [0.1, 1.0]}}).parameters("min_p") == drawn
    assert study(configurations=9).parameters("min_p")[:6] == drawn
    assert study(seed=4).parameters("min_p") != drawn


def test_ranges_are_uniform_in_what_they_say():
    import random

    rng = random.Random(0)
    logarithmic = Range(low=0.01, high=1, scale="log")
    assert sum(logarithmic.draw(rng) < 0.1 for _ in range(1000)) == pytest.approx(500, abs=60)
    linear = Range.model_validate([0, 2])
    assert sum(linear.draw(rng) < 1 for _ in range(1000)) == pytest.approx(500, abs=60)
    assert {Range(low=1, high=3, integer=True).draw(rng) for _ in range(100)} == {1, 2, 3}
    assert {Range(choices=("a", 2)).draw(rng) for _ in range(50)} == {"a", 2}


def test_splits_share_nothing():
    split = study().split("sums")
    assert (len(split.tuning), len(split.test)) == (5, 10)
    assert not {item.question for item in split.tuning} & {item.question for item in split.test}


def test_seeds_are_the_same_for_all_samplers_and_differ_by_draw():
    seeds = {study().draw_seed("sums", item.id, draw) for item in study().split("sums").test for draw in range(5)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_chain_is_a_sampler_with_settings_of_its_own():
    chain = {"sampler": "greedy_threshold;temperature", "ranges": {"temperature": [0.1, 1.0], "greedy_threshold": [0.1, 0.9]}}
    [first, *_] = study(samplers__new=chain).parameters("new")
    assert 0.1 <= first["greedy_threshold"] <= 0.9
    with pytest.raises(ValueError, match=r"its ranges\.greedy_threshold"):
        study(samplers__new={**chain, "ranges": {"greedy_threshold": [0.1, 3.0]}})
    with pytest.raises(ValueError, match="unknown sampler 'nonsense'"):
        study(samplers__new={"sampler": "nonsense;temperature"})


def test_greedy_answers_once():
    assert study().draws_of("greedy", "test") == 1
    assert study().draws_of("min_p", "test") == 5
    assert study().draws_of("min_p", "tuning") == 1


FORKS = {"entropix_forks": 4, "entropix_fork_entropy": 1}


def voting(**changes):
    """A study in which draws vote, and answers fork."""
    arms = {
        "samplers__many": {"fixed": {"temperature": 0.7}, "draws": 20},
        "samplers__three": {"majority_of": "many", "votes": 3},
        "samplers__forks": {"sampler": "temperature", "fixed": {"temperature": 0.7, **FORKS}},
        "samplers__chance": {
            "sampler": "temperature",
            "fixed": {"temperature": 0.7, **FORKS},
            "ranges": {"entropix_fork_share": [0.1, 1]},
            "as_many_forks_as": "forks",
        },
    }
    return study(**{**arms, **changes})


def test_draws_vote_in_groups_that_share_none():
    found = voting()
    assert (found.draws_of("many", "test"), found.draws_of("many", "tuning")) == (20, 1)
    assert found.votes_of("three") == [range(3), range(4, 7), range(8, 11), range(12, 15), range(16, 19)]
    assert found.votes_of("many") == []
    assert {name for _, names in found.servers() for name in names} == {"greedy", "min_p", "many", "forks", "chance"}
    # Their names change what is asked; a study without any is as it was before there were any.
    assert voting().fingerprint() != study().fingerprint()
    assert Study.load(EVIDENCE).fingerprint() == "9128bc7eab7ebc76"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samplers__three": {"majority_of": "many"}}, "it should have both majority_of and votes, or neither"),
        (
            {"samplers__three": {"majority_of": "some", "votes": 3}},
            "majority_of is 'some', but it should be one of greedy",
        ),
        (
            {"samplers__three": {"majority_of": "many", "votes": 5}},
            "5 draws there are 4 of many; give that one draws = 25",
        ),
        ({"samplers__three": {"majority_of": "greedy", "votes": 2}}, "there are 0 of greedy"),
        ({"samplers__three": {"majority_of": "many", "votes": 2, "draws": 3}}, "it asks for nothing, .* so draws says nothing"),
        ({"samplers__new": {"as_many_forks_as": "forks"}}, "it has as_many_forks_as without ranges"),
        ({"samplers__chance__as_many_forks_as": "three"}, "it should be one of greedy, min_p, many, forks"),
        ({"ladder": ["many"]}, "ladder has one sampler, and a mixture takes two"),
        ({"ladder": ["many", "some"]}, "ladder names 'some'; there are greedy"),
    ],
)
def test_votes_and_ladders_that_cant_be_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        voting(**changes)


def test_a_study_is_read_again_from_what_it_wrote():
    assert Study.model_validate(voting(ladder=["many", "three"]).model_dump(mode="json")) == voting(ladder=["many", "three"])


def test_the_fingerprint_follows_what_changes_answers():
    before = study().fingerprint()
    assert study(concurrency=2, name="other", against=["min_p"]).fingerprint() == before
    assert study(models__one__endpoint="http://127.0.0.1:2/v1").fingerprint() == before
    assert study(seed=4).fingerprint() != before
    assert study(tasks__sums__test=11).fingerprint() != before


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ('kind = "arithmetic"', 'kind = "poetry"', "tasks.sums.kind is 'poetry', but there are arithmetic, word_problems"),
        (
            'sampler = "min_p"',
            'sampler = "max_p"',
            "samplers.min_p.sampler is 'max_p', but unknown sampler 'max_p'; there are vllm",
        ),
        (
            "temperature = [0.2, 2]",
            "temperature = [0.2, 11]",
            "its ranges.temperature, which is 11.0, should be a number from 0 to 10",
        ),
        ("temperature = [0.2, 2]", "temperature = [2, 0.2]", "low should be below high"),
        ("temperature = [0.2, 2]", "temperature = 0.2", "samplers.min_p.ranges.temperature"),
        ("temperature = [0.2, 2]", "temperature = [0.2]", "it should be [low, high], or a table"),
        (
            "temperature = [0.2, 2]",
            "temprature = [0.2, 2]",
            "ranges.temprature is no parameter of min_p; there are temperature",
        ),
        ("low = 0.01, high", "low = 0, high", "low should be above 0 on a logarithmic scale"),
        ("top_k = 20", "top_k = 20.5", "fixed.top_k, which is 20.5, should be a whole number"),
        ("top_k = 20", "temperature = 1", "temperature is both fixed and drawn"),
        ("high = 0.3", "high = 3", "ranges.min_p, which is 3.0, should be a number from 0 to 1"),
        ("tuning = 5", "tuning = -5", "tasks.sums.tuning is -5"),
        ("tuning = 5", "tuning = 0", "no task with right answers has a tuning split"),
        ("tuning = 5", "tunning = 5", "unknown setting 'tasks.sums.tunning'; here are kind, tuning"),
        (
            "test = 10",
            "test = 10\noptions = { colour = 1 }",
            "of the options of arithmetic: unknown setting 'colour'; here are terms",
        ),
        ('endpoint = "http', 'endpoint = "ftp', "models.one.endpoint is 'ftp://127.0.0.1:1/v1'"),
        ('endpoint = "http://127.0.0.1:1/v1"', "", "but it should have a path, which is served, or an endpoint"),
        ('endpoint = "http://127.0.0.1:1/v1"', 'endpoint = "http://a/v1"\nplugin = false', "can't run with plugin = false"),
        (
            "top_k = 20 }",
            "top_k = 20 }\nserver = { regimes = false }",
            "needs a server of its own, but models.one is an endpoint",
        ),
        (
            "fixed = { temperature = 0 }",
            'as_tuned = "max_p"',
            "samplers.greedy.as_tuned is 'max_p', but it should be one of min_p",
        ),
        ("seed = 3", 'seed = 3\nagainst = ["plain"]', "against names 'plain'; there are greedy, min_p"),
        (
            "[samplers.min_p]",
            '[samplers.late]\nmodels = ["two"]\n[samplers.min_p]',
            "samplers.late.models names 'two'; there are one",
        ),
        ("[samplers.greedy]", '[samplers.greedy]\nmodels = ["one"]', "is one that others are compared with, so it runs on all"),
        (
            "fixed = { temperature = 0 }",
            "fixed = { temperature = 0 }\nwith_shares = true",
            "it has with_shares without as_tuned",
        ),
        (
            "fixed = { temperature = 0 }",
            'as_tuned = "min_p"\nwith_shares = true',
            "which a server takes only with experiments.constants",
        ),
        ('name = "small"', "", "name is missing"),
        ("[models.one]", '[models."a b"]', "models.a b"),
        ("seed = 3", "seed = ", "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, before, after, told):
    assert before in SMALL
    message = refused(tmp_path, SMALL.replace(before, after, 1))
    assert told in message
    assert len(message) < 900


def test_an_arm_may_run_on_some_models_alone():
    text = SMALL.replace("[models.one]", '[models.two]\nendpoint = "http://127.0.0.1:2/v1"\n[models.one]')
    text += '[samplers.late]\nas_tuned = "min_p"\nmodels = ["two"]\n'
    found = study(text)
    assert [found.runs("late", model) for model in ("one", "two")] == [False, True]
    assert all(found.runs(arm, model) for arm in ("greedy", "min_p") for model in ("one", "two"))
    with pytest.raises(ValidationError, match="follows min_p, which has models; give it the same"):
        study(text.replace('models = ["two"]\n', "").replace("[samplers.min_p]", '[samplers.min_p]\nmodels = ["two"]'))
    with pytest.raises(ValidationError, match="follows min_p, which doesn't run on two"):
        study(text.replace("[samplers.min_p]", '[samplers.min_p]\nmodels = ["one"]'))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"can't read the study .*nothing.toml: No such file"):
        Study.load(tmp_path / "nothing.toml")


def test_the_study_of_the_documentation_is_one():
    page = (ROOT / "docs" / "testing-samplers.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert Study.model_validate(tomllib.loads(example)).parameters("min_p")
    assert all(f"`{kind}`" in page for kind in KINDS)


def test_the_study_of_forks_keeps_its_protocol():
    found = Study.load(EVIDENCE.with_name("FORKS.toml"))
    assert sum(task.test for task in found.tasks.values()) >= 200
    assert found.draws >= 5
    assert len(found.models) >= 2
    assert all(found.runs(name, model) for name in found.samplers for model in found.models)
    assert [found.samplers[name].votes for name in found.ladder] == [None, 2, 4, 8]
    # Three differ in where they fork, and in nothing else.
    asked, servers = [], []
    for place in ("uncertain", "random", "sure"):
        arm = found.samplers[f"forks_{place}"]
        forks = dict(arm.server["forks"])
        assert forks.pop("place", "uncertain") == place
        assert arm.as_many_forks_as == (None if place == "uncertain" else "forks_uncertain")
        asked.append((arm.sampler, arm.fixed))
        servers.append((arm.server.keys(), forks))
    assert asked == asked[:1] * 3
    assert servers == servers[:1] * 3
    assert asked[0][1]["temperature"] == found.samplers["sampled"].fixed["temperature"]
    published = (ROOT / "docs" / "evidence-protocol.md").read_text().partition("## Answers that fork")[2]
    assert all(name in published for name in found.samplers)


def test_the_evidence_study_keeps_its_protocol(monkeypatch, tmp_path):
    found = Study.load(EVIDENCE)
    assert (found.configurations, found.draws) == (24, 5)
    scored = [name for name in found.tasks if found.is_scored(name)]
    assert len(scored) >= 3
    assert sum(found.tasks[name].test for name in scored) >= 500
    assert len(found.models) >= 2
    # Ranges of what is called the same are the same.
    for names in (("temperature", "entropix_temperature"), ("min_p", "entropix_min_p"), ("top_p", "entropix_top_p")):
        ranges = {arm.ranges[name] for arm in found.samplers.values() for name in names if name in arm.ranges}
        assert len(ranges) == 1
    published = (ROOT / "docs" / "evidence-protocol.md").read_text()
    assert all(f"| {name}" in published for name in ("greedy", "temperature", "top_p", "min_p", "top_n_sigma"))
    assert {"greedy_threshold", "edt", "best_of_five"} <= found.samplers.keys()
    assert {f"entropix_{name}" for name in ("published", "calibrated", "neutral_warm", "neutral_cool")} <= found.samplers.keys()
    controls = [name for name, arm in found.samplers.items() if arm.control_of is not None]
    assert len(controls) == 6
    assert all(found.runs(name, model) for name in found.samplers.keys() - set(controls) for model in found.models)
    assert math.isclose(found.samplers["min_p"].ranges["min_p"].low, 0.01)
