"""The Helm chart, by Helm's own library and Kubernetes' own schemas."""

import json
from pathlib import Path

import helm_python
import kubernetes_validate
import pytest
import yaml

from vllm_entropix import EntropixConfig

CHART = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "vllm-entropix"
KUBERNETES = "1.34"
EVERYTHING = {
    "gpus": 2,
    "samplerConfig": {"preset": "torch-2024-10", "attention": {"layers": "all"}},
    "extraArgs": ["--max-model-len=8192"],
    "extraEnv": [{"name": "VLLM_LOGGING_LEVEL", "value": "INFO"}],
    "huggingFaceSecret": "token",
    "cache": {"claim": "models"},
    "serviceMonitor": {"enabled": True, "interval": "30s"},
    "autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 4, "waitingRequests": 3, "scaleDownSeconds": 300},
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "podAnnotations": {"team": "a"},
}


def rendered(values):
    """Kind → object."""
    manifests = helm_python.Chart.load(CHART).render(values, name="test", namespace="default")
    objects = [found for text in manifests.values() for found in yaml.safe_load_all(text) if found]
    return {found["kind"]: found for found in objects}


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_lint(values):
    report = helm_python.lint(CHART, values, strict=True)
    assert [message for message in report["messages"] if message["severity"] > 1] == []
    assert not report["errors"]


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_objects_are_what_kubernetes_takes(values):
    objects = rendered(values)
    for kind, found in objects.items():
        if kind != "ServiceMonitor":  # the Prometheus operator's, not Kubernetes' own
            kubernetes_validate.validate(found, KUBERNETES, strict=True)
    assert set(objects) == {"ConfigMap", "Deployment", "Service"} | (
        {"HorizontalPodAutoscaler", "ServiceMonitor"} if values else set()
    )


def test_a_replica():
    objects = rendered(EVERYTHING)
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert {"--tensor-parallel-size=2", "--sampler=entropix", "--max-model-len=8192"} <= set(container["args"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert "replicas" not in objects["Deployment"]["spec"]  # the autoscaler's
    [on_cpu] = rendered({"gpus": 0})["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in on_cpu["resources"]["limits"]


def test_the_sampler_takes_its_settings():
    settings = json.loads(rendered(EVERYTHING)["ConfigMap"]["data"]["sampler.json"])
    config = EntropixConfig.from_dict(settings)
    assert config.attention.layers == "all"
    EntropixConfig.from_dict(json.loads(rendered({})["ConfigMap"]["data"]["sampler.json"]))


def test_metrics_and_scaling():
    objects = rendered(EVERYTHING)
    [endpoint] = objects["ServiceMonitor"]["spec"]["endpoints"]
    [port] = objects["Service"]["spec"]["ports"]
    assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")
    labels = objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert labels.items() <= objects["Service"]["metadata"]["labels"].items()
    [metric] = objects["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["target"]["averageValue"] == "3"


@pytest.mark.parametrize(
    "values",
    [
        {"gpus": -1},
        {"replica": 2},
        {"autoscaling": {"enabled": True, "minReplicas": 0}},
        {"service": {"type": "Ingress", "port": 80}},
        {"samplerConfig": "jax-2024-10"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_wrong_values_are_refused(values):
    with pytest.raises(helm_python.HelmError):
        rendered(values)
