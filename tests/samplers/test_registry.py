"""Which samplers there are: a bad one of another package is refused by name, and harms nobody else."""

import inspect
import logging
import re
import sys
from types import SimpleNamespace

import pytest

from vllm_entropix import ConfigError
from vllm_entropix._version import __version__
from vllm_entropix.engine.resolved import RESOLVED, Resolved
from vllm_entropix.records import fields, line
from vllm_entropix.samplers import chain, min_p, registry, top_n_sigma

SHIPPED = {"chain", "entropix", "min_p", "top_n_sigma"}
GOOD = """
from typing import ClassVar, Literal
from vllm_entropix.records.fields import Field
from vllm_entropix.records.line import SamplerPart
from vllm_entropix.samplers.base import Plan, Sampler
from vllm_entropix.settings.section import Section, setting

class WarmSettings(Section):
    \"\"\"Settings of warm.\"\"\"
    level: float = setting("How warm.", default=1.0, ge=0, le=2)

class WarmPart(SamplerPart):
    name: Literal["warm"] = "warm"

class Warm(Sampler):
    name = "warm"
    Settings = WarmSettings
    Part = WarmPart
    fields = (Field("warmth", "float", "", True, "warmth", "How warm it was."),)

    def plan(self, rows):
        return Plan(rows.base)
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Makes packages with a sampler each, from (entry point's name, what it names, source), and gives what is found."""

    def install(*packages):
        for number, (name, value, source) in enumerate(packages):
            (tmp_path / f"package_{number}.py").write_text(source)
            info = tmp_path / f"package_{number}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: package-{number}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = package_{number}:{value}\n")
        found = registry.registry.__wrapped__()
        monkeypatch.setattr(registry, "registry", lambda: found)
        for model in models:
            model.cache_clear()
        return found

    models = (registry.server_settings, registry.request_settings)
    monkeypatch.syspath_prepend(tmp_path)
    for number in range(2):
        monkeypatch.delitem(sys.modules, f"package_{number}", raising=False)
    columns, parts = fields.names(), dict(line._parts)
    yield install
    for model in models:
        model.cache_clear()
    fields.register("warm", ())
    line._parts.clear()
    line._parts.update(parts)
    line._rebuild()
    assert fields.names() == columns


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(
        ConfigError, match="unknown sampler 'warm'; there are chain, entropix, min_p and top_n_sigma, and chains of ada"
    ):
        registry.check("warm")
    with pytest.raises(
        ConfigError, match="samplers is 'warm', but there are chain, entropix, min_p, top_n_sigma, and chains of ada"
    ):
        registry.parse_request({"samplers": "warm"})
    for name in (3, None, ["warm"], "x" * 10_000):
        with pytest.raises(ConfigError, match="unknown sampler") as refused:
            registry.check(name)
        # Beside the list of a chain's samplers.
        assert len(str(refused.value)) - len(", ".join(chain.names())) < 250
    assert registry.check("vllm", others=("vllm",)) == "vllm"
    with pytest.raises(ConfigError, match="unknown sampler 'nope'"):
        registry.load_server({"sampler": "nope"})


def test_one_of_another_package_is_as_good_as_ours(installed):
    found = installed(("warm", "Warm", GOOD))
    assert (set(found.classes), found.refused) == (SHIPPED | {"warm"}, {})
    assert "warmth" in fields.names()
    assert registry.load_server({"sampler": "warm", "warm": {"level": 1.5}}).warm.level == 1.5
    request = registry.parse_request({"samplers": "warm", "warm_level": 0.5}, {"sampler": "entropix"})
    assert registry.sampler_of(request, {"sampler": "entropix"}) == "warm"
    assert request.of_sampler("warm") == {"level": 0.5}
    with pytest.raises(ConfigError, match="warm_level is 7, but"):
        registry.parse_request({"samplers": "warm", "warm_level": 7})
    told = registry.instances(registry.load_server(True))["warm"].described(request)
    assert told.model_dump() == {"name": "warm", "level": 0.5}


def changed(*pairs):
    source = GOOD
    for old, new in pairs:
        assert old in source
        source = source.replace(old, new)
    return source


BAD = {
    "no such module": ("warm", "Warm", "import no_such_module_anywhere", "No module named 'no_such_module_anywhere'"),
    "an import that fails": ("warm", "Warm", "raise RuntimeError('no\\nluck')", "no luck"),
    "an import that exits": ("warm", "Warm", "raise SystemExit('needs a GPU')", "needs a GPU"),
    "no such name": ("warm", "Cold", GOOD, "has no attribute 'Cold'"),
    "no class": ("warm", "x", "x = 3", "3 is no subclass of vllm_entropix.samplers.base.Sampler"),
    "no sampler": ("warm", "WarmSettings", GOOD, "is no subclass of vllm_entropix.samplers.base.Sampler"),
    "an abstract one": ("warm", "Warm", changed(("def plan", "def plans")), "Warm lacks plan"),
    "another name": ("cold", "Warm", GOOD, "its class is named 'warm'"),
    "no name": ("warm", "Warm", changed(('    name = "warm"\n    Settings', "    Settings")), "its class is named None"),
    "a name in capitals": ("Warm", "Warm", changed(('name = "warm"', 'name = "Warm"')), "one name in lower case"),
    "vLLM's name": ("vllm", "Warm", changed(('name = "warm"', 'name = "vllm"')), "there is another of this name"),
    "one of ours": ("min_p", "Warm", changed(('name = "warm"', 'name = "min_p"')), "there is another of this name"),
    "a setting's name": ("trace", "Warm", changed(('name = "warm"', 'name = "trace"')), "there is another of this name"),
    "no settings": ("warm", "Warm", changed(("Settings = WarmSettings", "")), "its Settings are no"),
    "settings of another kind": (
        "warm",
        "Warm",
        changed(("Settings = WarmSettings", "Settings = dict")),
        "its Settings are no",
    ),
    "settings without defaults": ("warm", "Warm", changed(("default=1.0, ", "")), "its Settings need a default each: level is"),
    "a default out of range": ("warm", "Warm", changed(("default=1.0", "default=9.0")), "level is 9.0, but"),
    "a common request key": (
        "sam",
        "Warm",
        changed(('name = "warm"', 'name = "sam"'), ("level", "samplers")),
        "samplers is another",
    ),
    "another's request key": (
        "top",
        "Warm",
        changed(('name = "warm"', 'name = "top"'), ("level", "top_n_sigma")),
        "a request's top_n_sigma is another setting",
    ),
    "a request key twice": (
        "warm",
        "Warm",
        changed(("class WarmPart", '    warm_level: float = setting("Twice.", default=1.0)\n\nclass WarmPart')),
        "a request's warm_level is another setting",
    ),
    "a common field": ("warm", "Warm", changed(('"warmth"', '"entropy"')), "warm can't have a field entropy"),
    "another's field": ("warm", "Warm", changed(('"warmth"', '"regime"')), "warm can't have a field regime"),
    "a field that isn't one": (
        "warm",
        "Warm",
        changed(("(Field(", "(str("), ('"float", "", True, "warmth", "How warm it was."', "")),
        "name",
    ),
    "a part of any name": ("warm", "Warm", changed(('Literal["warm"]', "str")), "its Part lacks name: Literal['warm']"),
    "a setting that is called as the part's name": ("warm", "Warm", changed(("level", "name")), "'name'"),
    "one that can't be made": (
        "warm",
        "Warm",
        changed(("    def plan", "    def __init__(self, server):\n        raise OSError('no weights')\n\n    def plan")),
        "no weights",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_one_is_refused_by_name_and_harms_nobody(installed, caplog, kind):
    name, value, source, reason = BAD[kind]
    before = fields.names()
    with caplog.at_level(logging.WARNING):
        found = installed((name, value, source), ("warm", "Warm", GOOD)) if name != "warm" else installed((name, value, source))
    refused = found.refused[name]
    assert refused.startswith(f"the sampler {name} of the package package-0 can't be used: ")
    assert reason in refused
    assert "\n" not in refused
    assert refused in caplog.text
    # Those that are fine are there, and work; nothing of the bad one stays.
    good = SHIPPED | ({"warm"} if name != "warm" else set())
    assert set(found.classes) == good
    assert fields.names() == ((*before, "warmth") if name != "warm" else before)
    assert registry.instances(registry.load_server({"sampler": "min_p", "top_n_sigma": {"top_n_sigma": 2}})).keys() == good
    assert registry.parse_request({"samplers": "min_p"}, {"sampler": "entropix"}).sampler == "min_p"
    if name in SHIPPED or name == "vllm":
        return
    for ask in (
        registry.check,
        lambda name: registry.parse_request({"samplers": name}),
        lambda name: registry.load_server({"sampler": name}),
    ):
        with pytest.raises(ConfigError, match=re.escape(refused)):
            ask(name)


def test_of_two_of_one_name_the_first_is_taken(installed):
    found = installed(("warm", "Warm", GOOD), ("warm", "Warm", GOOD))
    assert set(found.classes) == SHIPPED | {"warm"}
    assert found.refused["warm"].endswith("there is another of this name")
    assert registry.check("warm") == "warm"


@pytest.mark.parametrize("server", ["entropix", "min_p"])
def test_a_request_names_its_sampler(server):
    config = registry.load_server({"sampler": server})
    for asked in (None, "entropix", "min_p", "top_n_sigma"):
        request = registry.parse_request({} if asked is None else {"samplers": asked}, config)
        assert registry.sampler_of(request, config) == (asked or server)
    for given in ("warm", 3, [3]):
        with pytest.raises(ConfigError, match="samplers is"):
            registry.parse_request({"samplers": given}, config)
    with pytest.raises(ConfigError, match="did you mean 'samplers'"):
        registry.parse_request({"sampler": "min_p"}, config)


@pytest.mark.parametrize(
    ("server", "given", "owner", "chosen"),
    [
        ("entropix", {"top_n_sigma": 1}, "top_n_sigma", "entropix"),
        ("entropix", {"top_n_sigma": 1, "samplers": "min_p"}, "top_n_sigma", "min_p"),
        ("top_n_sigma", {"entropix_preset": "jax-2024-10"}, "entropix", "top_n_sigma"),
        ("min_p", {"entropix_base": "request"}, "entropix", "min_p"),
        ("entropix", {"entropix_temperature": 0.5, "samplers": "min_p"}, "entropix", "min_p"),
    ],
)
def test_a_setting_of_another_sampler_is_refused(server, given, owner, chosen):
    key = next(iter(given))
    with pytest.raises(ConfigError, match=f"^{key} is a setting of the sampler {owner}, but this request's is {chosen}$"):
        registry.parse_request(given, {"sampler": server})
    registry.parse_request({**given, "samplers": owner}, {"sampler": server})


def test_borders_that_an_engine_finds_are_none_without_one():
    with pytest.raises(ConfigError, match=r"^thresholds is auto, which only an engine makes numbers of"):
        registry.load_server({"thresholds": "auto"})


def test_what_all_samplers_read_is_any_samplers():
    common = {"entropix_trace": "on", "entropix": "off", "entropix_clarification": "off", "samplers": "min_p"}
    assert registry.parse_request(common, {"sampler": "entropix"}).trace


@pytest.mark.parametrize("theirs", [["entropix"], ["entropix", "min_p", "top_n_sigma", "warm"]])
def test_a_node_with_other_samplers_is_refused(theirs):
    told = Resolved(registry.load_server({"sampler": "min_p"}), (1, 2), True).to_json()

    def engine(**over):
        return SimpleNamespace(additional_config={RESOLVED: {**told, **over}})

    read = Resolved.from_config(engine(), "worker 1")
    assert (read.config.sampler, read.clarification, read.counted) == ("min_p", (1, 2), True)
    with pytest.raises(
        ConfigError, match=rf"^worker 1 on node .* has the samplers chain, entropix, min_p, top_n_sigma, but .* {theirs[-1]};"
    ):
        Resolved.from_config(engine(samplers=theirs), "worker 1")
    with pytest.raises(ConfigError, match=f"has vllm-entropix {re.escape(__version__)}, but"):
        Resolved.from_config(engine(version="0"), "worker 1")


@pytest.mark.parametrize("module", [min_p, top_n_sigma], ids=["min_p", "top_n_sigma"])
def test_a_sampler_is_a_file_of_sixty_lines_at_most(module):
    """What stands in the documentation as examples of one's own."""
    assert len(inspect.getsource(module).splitlines()) <= 60
