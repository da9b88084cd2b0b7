"""The Dockerfiles: no registry of images is reached here, so they aren't built; what they say is checked.

What the CPU image runs is run by test_ending.py: as its user, with its environment, and with its health command.
"""

import re
import tomllib
from pathlib import Path

import pytest

from tests.support.deployments import DOCKERFILES, argument, environment, health_command, instructions, replica

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EACH = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def texts(path, name):
    return [text for found, text in instructions(path) if found == name]


@EACH
def test_what_is_copied_is_there(path):
    copied = [text.split()[:-1] for text in texts(path, "COPY")]
    assert copied
    for source in (source for sources in copied for source in sources):
        assert (ROOT / source).exists(), source


@EACH
def test_what_the_build_reads_of_the_project_is_copied(path):
    sources = " ".join(texts(path, "COPY"))
    for needed in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "vllm_entropix"):
        assert needed in sources


@EACH
def test_ray_finds_the_application_in_it(path):
    """`serve run deploy.ray.serve:app` imports it from the working directory or PYTHONPATH: each image sets one."""
    [root] = texts(path, "WORKDIR") or [environment(path)["PYTHONPATH"]]
    [copied] = [text.split() for text in texts(path, "COPY") if "deploy/ray" in text]
    assert copied[0] == "deploy/ray"
    assert Path(root, copied[1]) == Path(root, "deploy/ray")


@EACH
def test_the_base_is_one_release(path):
    [base] = texts(path, "FROM")
    assert re.search(r"@sha256:[0-9a-f]{64}$|:v\$\{VLLM_VERSION\}\$\{VLLM_DIGEST\}$", base)


@EACH
def test_it_runs_as_the_charts_user(path):
    pod, _ = replica({})
    names = [name for name, _ in instructions(path)]
    # By number, without which Kubernetes can't tell that it isn't root; nothing is done as root after that.
    assert argument(path, "USER") == str(pod["securityContext"]["runAsUser"])
    assert "RUN" not in names[names.index("USER") :]
    assert any("useradd --uid 2000 --create-home vllm" in text for text in texts(path, "RUN"))


@EACH
def test_what_it_writes_is_where_the_chart_has_a_volume(path):
    _, container = replica({})
    mounts = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    variables = environment(path)
    own = {entry["name"]: entry["value"] for entry in container["env"]}
    assert (variables["HOME"], variables["USER"]) == (own["HOME"], own["USER"])
    folders = {name: text for name, text in variables.items() if name.endswith(("_HOME", "_DIR", "_ROOT")) or name == "HOME"}
    assert folders.keys() >= {"HOME", "HF_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR"}
    for name, text in folders.items():
        assert any(Path(text).is_relative_to(mount) for mount in mounts), name


@EACH
def test_its_health_is_that_of_the_server_on_its_port(path):
    _, container = replica({})
    [port] = container["ports"]
    probe = container["readinessProbe"]["httpGet"]["path"]
    assert argument(path, "EXPOSE") == str(port["containerPort"])
    assert f"http://127.0.0.1:{port['containerPort']}{probe}" in health_command(path)[-1]


@EACH
def test_stopping_sends_what_the_server_heeds(path):
    assert argument(path, "STOPSIGNAL") == "SIGTERM"
    assert "--shutdown-timeout" in path.read_text()
    # Shells don't pass signals on.
    assert all(text.startswith("[") for name in ("ENTRYPOINT", "CMD") for text in texts(path, name))


@EACH
def test_examples_open_no_port_to_the_network(path):
    published = re.findall(r"^#   docker run .*?-p (\S+)", path.read_text(), flags=re.M)
    assert published
    assert all(ports.startswith("127.0.0.1:") for ports in published)


def locked(path):
    """Requirement → its hashes."""
    text = re.sub(r"\\\n", " ", path.read_text())
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return {line[0]: set(line[1:]) for line in lines}


def test_what_the_image_installs_is_locked_by_hash():
    install = [text for text in texts(ROOT / "deploy/docker/Dockerfile", "RUN") if "pip install" in text]
    assert all("--require-hashes -r /src/image.lock" in text for text in install)
    requirements = locked(ROOT / "requirements" / "image.lock")
    assert requirements
    everything = locked(ROOT / "requirements" / "cpu.lock")
    for requirement, hashes in requirements.items():
        assert hashes
        assert hashes == everything[requirement]
