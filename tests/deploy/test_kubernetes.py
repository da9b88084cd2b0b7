"""The Helm chart, by Helm's own library, Kubernetes' own schemas."""

import json

import helm_python
import kubernetes_validate
import pytest
import yaml

from tests.support.deployments import CHART, manifests, rendered, replica
from vllm_entropix import EntropixConfig
from vllm_entropix.samplers import registry

KUBERNETES = "1.34"
EVERYTHING = {
    "gpus": 2,
    "samplerConfig": {"preset": "torch-2024-10", "attention": {"layers": "all"}},
    "extraArgs": ["--max-model-len=8192", "--chat-template={{ a: b # c }}"],
    "extraEnv": [{"name": "VLLM_LOGGING_LEVEL", "value": "INFO"}],
    "extraVolumes": [{"name": "traces", "persistentVolumeClaim": {"claimName": "traces"}}],
    "extraVolumeMounts": [{"name": "traces", "mountPath": "/traces"}],
    "huggingFaceSecret": "token",
    "apiKeySecret": "clients",
    "cache": {"claim": "models"},
    "serviceMonitor": {"enabled": True, "interval": "30s"},
    "shutdown": {"graceSeconds": 300, "drainSeconds": 20},
    "autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 4, "waitingRequests": 3, "scaleDownSeconds": 300},
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "podAnnotations": {"team": "a"},
}


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
    pod, container = replica(EVERYTHING)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    sampler = {"--sampler=entropix", "--sampler-config=/etc/vllm-entropix/sampler.json"}
    reached = {"--host=0.0.0.0", "--port=8000"}
    assert sampler | reached | {"--tensor-parallel-size=2", *EVERYTHING["extraArgs"]} <= set(container["args"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert "replicas" not in objects["Deployment"]["spec"]  # the autoscaler's
    assert container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] == 1800
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    [cache] = [volume for volume in pod["volumes"] if volume["name"] == "cache"]
    assert cache["persistentVolumeClaim"] == {"claimName": "models"}
    assert "nvidia.com/gpu" not in replica({"gpus": 0})[1]["resources"]["limits"]
    assert EVERYTHING["extraVolumes"][0] in pod["volumes"]
    assert EVERYTHING["extraVolumeMounts"][0] in container["volumeMounts"]
    assert EVERYTHING["extraEnv"][0] in container["env"]
    secrets = {
        entry["name"]: entry["valueFrom"]["secretKeyRef"]
        for entry in container["env"]
        if "secretKeyRef" in entry.get("valueFrom", {})
    }
    assert secrets == {"HF_TOKEN": {"name": "token", "key": "token"}, "VLLM_API_KEY": {"name": "clients", "key": "key"}}


def test_a_name_that_yaml_would_read_otherwise():
    _, container = replica({"servedModelName": "a: b # c"})
    assert "--served-model-name=a: b # c" in container["args"]


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_graces_add_up(values):
    pod, container = replica(values)
    [timeout] = [int(arg.partition("=")[2]) for arg in container["args"] if arg.startswith("--shutdown-timeout=")]
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert timeout == values.get("shutdown", {"graceSeconds": 120})["graceSeconds"]
    assert pod["terminationGracePeriodSeconds"] == int(seconds) + timeout + 15


def test_without_a_drain_nothing_waits():
    pod, container = replica({"shutdown": {"drainSeconds": 0}})
    assert "lifecycle" not in container
    assert pod["terminationGracePeriodSeconds"] == 135


# https://kubernetes.io/docs/concepts/security/pod-security-standards/, "Restricted", which includes "Baseline".
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
RESTRICTED = {
    "host namespaces": lambda pod, _: not any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")),
    "privileged": lambda _, container: not container["securityContext"].get("privileged"),
    "capabilities": lambda _, container: (
        container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        and set(container["securityContext"]["capabilities"].get("add", ())) <= {"NET_BIND_SERVICE"}
    ),
    "volume types": lambda pod, _: all(set(volume) - {"name"} <= VOLUMES for volume in pod["volumes"]),
    "host ports": lambda _, container: not any(port.get("hostPort") for port in container["ports"]),
    "host of probes": lambda _, container: (
        not any(container[probe]["httpGet"].get("host") for probe in ("startupProbe", "readinessProbe", "livenessProbe"))
    ),
    "AppArmor and SELinux": lambda pod, container: (
        not any(
            name in found["securityContext"] for name in ("appArmorProfile", "seLinuxOptions") for found in (pod, container)
        )
    ),
    "procMount": lambda _, container: container["securityContext"].get("procMount", "Default") == "Default",
    "sysctls": lambda pod, _: not pod["securityContext"].get("sysctls"),
    "seccomp": lambda pod, container: (
        all(
            found["securityContext"].get("seccompProfile", {"type": "RuntimeDefault"})["type"]
            in ("RuntimeDefault", "Localhost")
            for found in (pod, container)
        )
        and "seccompProfile" in pod["securityContext"]
    ),
    "privilege escalation": lambda _, container: container["securityContext"]["allowPrivilegeEscalation"] is False,
    "runAsNonRoot": lambda pod, container: (
        pod["securityContext"]["runAsNonRoot"] is True and container["securityContext"].get("runAsNonRoot", True)
    ),
    "runAsUser": lambda pod, container: (
        pod["securityContext"]["runAsUser"] > 0 and container["securityContext"].get("runAsUser", 1) > 0
    ),
}


@pytest.mark.parametrize("control", RESTRICTED)
@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_the_restricted_profile_is_the_default(control, values):
    assert RESTRICTED[control](*replica(values))


def test_security_contexts_are_values():
    pod, container = replica(
        {"podSecurityContext": {"runAsUser": 1234, "fsGroup": 99}, "securityContext": {"readOnlyRootFilesystem": False}}
    )
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) == (1234, 99)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is False
    pod, container = replica({"podSecurityContext": None, "securityContext": None})
    assert "securityContext" not in {**pod, **container}


def test_what_a_read_only_root_needs_is_on_volumes():
    pod, container = replica({})
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    writable = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
    mounts = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in writable}
    assert mounts == {"/dev/shm", "/tmp", "/home/vllm", "/cache"}
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"], "which may write to a claim, too"
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert {environment["HOME"], environment["HF_HOME"]} <= mounts


def notes(values):
    [text] = [text for path, text in manifests(values).items() if path.endswith("NOTES.txt")]
    return text


def test_notes_say_what_to_do():
    assert "service/test-vllm-entropix 8000:8000" in notes({})
    assert "set apiKeySecret" in notes({})
    assert "set apiKeySecret" not in notes({"apiKeySecret": "clients"})
    assert "serves on for 10 s and then gives its requests 120 s" in notes({})
    nowhere = {"samplerConfig": {"trace": {"path": "/traces/a.jsonl"}}}
    assert "is on no volume of yours" in notes(nowhere)
    assert "is on no volume of yours" not in notes({**EVERYTHING, **nowhere})


def test_the_sampler_takes_its_settings():
    settings = json.loads(rendered(EVERYTHING)["ConfigMap"]["data"]["sampler.json"])
    config = registry.load_server(settings)
    assert config.attention.layers == "all"
    registry.load_server(json.loads(rendered({})["ConfigMap"]["data"]["sampler.json"]))


def test_another_sampler():
    chosen = rendered({"samplerConfig": {"sampler": "min_p", "min_p": {"min_p": 0.1}}})
    [container] = chosen["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert "--sampler=min_p" in container["args"]


def test_other_settings_of_the_sampler_restart_the_replicas():
    templates = [
        rendered({"samplerConfig": {"preset": preset}})["Deployment"]["spec"]["template"]
        for preset in EntropixConfig.preset_names()
    ]
    assert len({json.dumps(template) for template in templates}) == len(templates)


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
        {"replicas": "2"},
        {"autoscaling": {"enabled": True, "minReplicas": 0}},
        {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}},
        {"service": {"type": "Ingress", "port": 80}},
        {"samplerConfig": "jax-2024-10"},
        {"samplerConfig": {"presett": "jax-2024-10"}},
        {"shutdown": {"graceSeconds": 0}},
        {"shutdown": {"graceSeconds": 1.5}},
        {"shutdown": {"drainSeconds": "10"}},
        {"shutdown": {"grace": 10}},
        {"extraArgs": ["--shutdown-timeout=0"]},
        {"extraArgs": ["--shutdown_timeout", "0"]},
        {"extraArgs": ["--port=9"]},
        {"extraArgs": ["-tp=2"]},
        {"extraArgs": "--max-model-len=8192"},
        {"extraEnv": {"name": "A"}},
        {"extraEnv": [{"name": "A", "value": 1}]},
        {"extraEnv": [{"name": "A", "valeu": "1"}]},
        {"extraVolumes": [{"name": "traces"}]},
        {"extraVolumes": [{"name": "cache", "emptyDir": {}}]},
        {"extraVolumeMounts": [{"name": "traces", "mountPath": "traces"}]},
        {"extraVolumeMounts": [{"name": "traces", "path": "/traces"}]},
        {"podSecurityContext": {"runAsUser": "nobody"}},
        {"podSecurityContext": {"readOnlyRootFilesystem": True}},
        {"securityContext": {"readOnlyRootFileSystem": True}},
        {"securityContext": {"capabilities": ["ALL"]}},
        {"resources": {"limit": {"memory": "1Gi"}}},
        {"resources": {"limits": {"memory": "1 GB"}}},
        {"scratch": "10GB"},
        {"apiKeySecret": "Not A Name"},
        {"nodeSelector": {"gpu": True}},
    ],
    ids=str,
)
def test_wrong_values_are_refused(values):
    with pytest.raises(helm_python.HelmError):
        rendered(values)


def test_every_value_is_in_the_schema_and_every_name_of_the_schema_has_a_default():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values) == set(schema["properties"]) - {"global"}
    assert list(schema["properties"]["samplerConfig"]["properties"]) == list(EntropixConfig.model_json_schema()["properties"])
