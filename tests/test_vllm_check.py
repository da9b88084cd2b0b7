"""The check that vLLM is what the adapters expect, against the sources of the installed version and changed copies of them."""

import ast
import shutil
from collections import defaultdict
from importlib import util
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.support import used_of_vllm
from vllm_entropix.engine import vllm_check
from vllm_entropix.engine.expected import ATTRIBUTES, COPY_ON_WRITE, FUNCTIONS, FUNCTIONS_OF_SERVERS, LATER, NAMES
from vllm_entropix.engine.patches import PATCHES
from vllm_entropix.engine.sources import Sources
from vllm_entropix.engine.versions import MINORS

ROOT = Path(util.find_spec("vllm").origin).parent.parent
SAMPLER = "vllm.v1.sample.sampler"
CONTEXT = "vllm.v1.worker.gpu.sample.logits_processor.interface"
# Those of a later version aren't here.
MODULES = sorted(
    module
    for module in {*ATTRIBUTES, *FUNCTIONS, *FUNCTIONS_OF_SERVERS, *NAMES}
    if module not in LATER or Sources(ROOT).names(module) is not None
)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The sources that are looked at, copied."""
    folder = tmp_path_factory.mktemp("sources")
    for module in MODULES:
        spec = ROOT.joinpath(*module.split("."))
        source = spec.with_suffix(".py") if spec.with_suffix(".py").is_file() else spec / "__init__.py"
        target = folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return folder


@pytest.fixture
def change(copied):
    """Replaces text in a module of the copy, until the test ends."""
    changed = {}

    def replace(module, old, new):
        path = copied.joinpath(*module.split(".")).with_suffix(".py")
        changed.setdefault(path, path.read_text())
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    yield replace
    for path, text in changed.items():
        path.write_text(text)


def test_the_installed_version_is_as_expected():
    assert vllm_check.problems() == []
    assert vllm_check.problems_of_sources(ROOT) == []


def test_blocks_can_be_copied_on_write():
    assert vllm_check.copy_on_write_problems() == []


@pytest.mark.parametrize("module", sorted(COPY_ON_WRITE))
def test_where_blocks_cant_be_copied_on_write_it_is_told(monkeypatch, module):
    classes = {f"{name}Else": names for name, names in COPY_ON_WRITE[module].items()}
    monkeypatch.setattr(vllm_check, "COPY_ON_WRITE", {module: classes})
    assert len(vllm_check.copy_on_write_problems.__wrapped__()) == len(classes)


def test_a_copy_is_as_expected(copied):
    assert vllm_check.problems_of_sources(copied) == []


@pytest.mark.parametrize(
    ("module", "old", "new", "problem"),
    [
        (SAMPLER, "def sample(", "def draw(", f"{SAMPLER}.Sampler.sample is missing"),
        (SAMPLER, "class Sampler(", "class Drawer(", f"{SAMPLER}.Sampler.forward is missing"),
        (CONTEXT, "    pos: torch.Tensor", "    place: torch.Tensor", f"{CONTEXT}.LogitsContext has no attribute pos"),
        (CONTEXT, "req_idx: int", "slot: int", f"{CONTEXT}.LogitsProcessor.add_request has no parameter req_idx"),
        (
            "vllm.v1.worker.gpu_model_runner",
            "self.discard_request_mask",
            "self.discarded",
            "vllm.v1.worker.gpu_model_runner.GPUModelRunner has no attribute discard_request_mask",
        ),
        (
            "vllm.v1.worker.gpu.model_runner",
            "self.attn_groups",
            "self.groups",
            "vllm.v1.worker.gpu.model_runner.GPUModelRunner has no attribute attn_groups",
        ),
    ],
)
def test_a_changed_source_is_told(copied, change, module, old, new, problem):
    change(module, old, new)
    assert problem in vllm_check.problems_of_sources(copied)


# Attributes that look like vLLM's in our sources.
NOT_LISTED = {
    **dict.fromkeys(("_k_scale", "_q_scale"), "a buffer that vLLM registers by this name, for which no syntax speaks"),
    **dict.fromkeys(("return_sampling_mask", "enable_return_routed_experts"), "an engine without it doesn't do so"),
    "strategy": "of 0.33's endpoint of decisions alone",
    "context": "of 0.33's endpoint of decisions alone",
    "_option_string_actions": "argparse's own",
    "pid": "of Python's own processes",
    "prog": "argparse's own",
    "value": "of an enum, where the attribute is one",
    "all_special_ids": "of transformers' tokenizers",
    "apply_chat_template": "of transformers' tokenizers",
    "chat_template": "of transformers' tokenizers",
}


def test_all_that_is_used_of_vllm_is_listed():
    for module, names in used_of_vllm.imported().items():
        assert names <= set(NAMES.get(module, ())), f"imported from {module} and not in expected.NAMES"
    functions = [name for table in (FUNCTIONS, FUNCTIONS_OF_SERVERS) for of_module in table.values() for name in of_module]
    listed = {name.rpartition(".")[2] for name in functions}
    for table in (ATTRIBUTES, COPY_ON_WRITE):
        listed.update(name for classes in table.values() for names in classes.values() for name in names)
    listed.update(name for names in NAMES.values() for name in names)
    used = used_of_vllm.attributes()
    ours = {name for name in used if name.startswith("entropix_")}  # hung on vLLM's objects
    unknown = {name: files for name, files in used.items() if name not in listed | ours | set(NOT_LISTED)}
    assert not unknown, "used of vLLM and not in expected.py (or in NOT_LISTED, with the reason)"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_all_that_is_patched_is_listed(patch):
    functions = {**FUNCTIONS, **FUNCTIONS_OF_SERVERS}.get(patch.module, {})
    attributes = ATTRIBUTES.get(patch.module, {})
    for owner in patch.owners:
        if patch.attribute == "__init__":  # which a dataclass doesn't write down
            assert owner in NAMES[patch.module]
        else:
            assert f"{owner}.{patch.attribute}" in functions or patch.attribute in attributes.get(owner, ())
    assert patch.owners or patch.attribute in {**functions, **dict.fromkeys(NAMES.get(patch.module, ()))}


@pytest.mark.parametrize("module", MODULES)
def test_each_listed_name_is_missed_when_it_is_renamed(monkeypatch, module):
    sources = Sources(ROOT)
    monkeypatch.setattr(vllm_check, "Sources", lambda root: sources)
    for name in ("ATTRIBUTES", "FUNCTIONS", "FUNCTIONS_OF_SERVERS", "NAMES"):
        table = getattr(vllm_check, name)
        monkeypatch.setattr(vllm_check, name, {module: table[module]} if module in table else {})
    assert vllm_check.problems_of_sources(ROOT) == []
    places = defaultdict(list)
    for node in ast.walk(sources._tree(module)):
        for field in ("name", "attr", "id", "arg", "asname"):
            if isinstance(getattr(node, field, None), str):
                places[getattr(node, field)].append((node, field))
    wanted = set(vllm_check.NAMES.get(module, ()))
    wanted.update(name for names in vllm_check.ATTRIBUTES.get(module, {}).values() for name in names)
    for functions in (vllm_check.FUNCTIONS, vllm_check.FUNCTIONS_OF_SERVERS):
        for qualified, parameters in functions.get(module, {}).items():
            wanted.update((*qualified.split("."), *parameters))
    for name in sorted(wanted - {"self"}):
        for node, field in places[name]:
            setattr(node, field, "renamed")
        assert any(name in problem for problem in vllm_check.problems_of_sources(ROOT)), name
        for node, field in places[name]:
            setattr(node, field, name)


def test_missing_sources_are_told(tmp_path):
    problems = vllm_check.problems_of_sources(tmp_path)
    tables = (*ATTRIBUTES.values(), *FUNCTIONS.values(), *FUNCTIONS_OF_SERVERS.values())
    assert len(problems) == len(NAMES) + sum(map(len, tables)) - len(LATER)
    assert all(problem.endswith(" is missing") for problem in problems)


def test_attributes_are_read_wherever_a_class_has_them(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "some.py").write_text(
        "class A:\n"
        "    field: int\n"
        "    constant = 1\n"
        "    @property\n"
        "    def computed(self): return self.read\n"
        "    async def run(self, x, /, y, *, z):\n"
        "        self.plain, other.foreign = 1, 2\n"
        "        self.annotated: int = 3\n"
        "    class Inner:\n"
        "        def f(self, a): ...\n"
    )
    sources = Sources(tmp_path)
    has = {"field", "constant", "computed", "run", "plain", "annotated"}
    assert has <= sources.attributes("vllm.some", "A")
    assert not {"read", "foreign"} & sources.attributes("vllm.some", "A")
    assert sources.parameters("vllm.some", "A.run") == {"self", "x", "y", "z"}
    assert sources.parameters("vllm.some", "A.Inner.f") == {"self", "a"}
    assert sources.parameters("vllm.some", "A") is sources.attributes("vllm.some", "A.run") is None
    assert sources.parameters("vllm.other", "A.run") is None


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        (f"0.{MINORS[0] - 1}.0", False),
        *((f"0.{minor}.0", True) for minor in MINORS),
        (f"0.{MINORS[-1]}.1", True),
        (f"0.{MINORS[-1]}.0rc1", True),
        (f"0.{MINORS[-1] + 1}.0", False),
        (f"1.{MINORS[0]}.0", False),
    ],
)
def test_the_range(monkeypatch, version, supported):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    assert vllm_check.problems() == ([] if supported else [f"its version is {version}"])


def test_every_patch_says_why_and_when_to_drop_it():
    for patch in PATCHES:
        assert all((patch.why, patch.how, patch.upstream, patch.remove_when)), patch.name
