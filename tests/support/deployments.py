"""What the files of deploy/ say."""

import json
import re
from pathlib import Path

import helm_python
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "kubernetes" / "vllm-entropix"
DOCKERFILES = sorted((DEPLOY / "docker").iterdir())


def manifests(values):
    """File → its text."""
    return helm_python.Chart.load(CHART).render(values, name="test", namespace="default")


def rendered(values):
    """Kind → object."""
    texts = [text for path, text in manifests(values).items() if path.endswith(".yaml")]
    objects = [found for text in texts for found in yaml.safe_load_all(text) if found]
    return {found["kind"]: found for found in objects}


def replica(values):
    """A pod's specification, and that of its one container."""
    pod = rendered(values)["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container


def instructions(path):
    """(name, argument) of each instruction of a Dockerfile, continued lines as one."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def argument(path, name):
    """The argument of the last instruction of a name, which is the one that holds."""
    return [text for found, text in instructions(path) if found == name][-1]


def environment(path):
    """What a Dockerfile sets with ENV, but for what it makes of the base image's own."""
    texts = [text for found, text in instructions(path) if found == "ENV"]
    pairs = [pair.split("=", 1) for text in texts for pair in text.split()]
    return {name: value for name, value in pairs if "$" not in value}


def health_command(path):
    """The command of its HEALTHCHECK."""
    return json.loads(argument(path, "HEALTHCHECK").partition(" CMD ")[2])
