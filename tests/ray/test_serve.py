"""deploy/ray/serve.py: two replicas under load, while an engine and then a replica is killed; what Ray exports of them."""

import contextlib
import json
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support import dashboards, prometheus, ray_cluster
from tests.support.deployments import DEPLOY
from tests.support.engine import close_engine
from tests.support.server import free_port
from vllm_entropix.client import trace_of

pytestmark = pytest.mark.engine


def test_arguments_of_a_command_line():
    from deploy.ray.serve import Arguments

    given = {"max_replicas": "4", "sampler_config": "torch-2024-10", "engine_kwargs": '{"enforce_eager": true}'}
    arguments = Arguments.model_validate(given)
    assert (arguments.max_replicas, arguments.sampler_config) == (4, "torch-2024-10")
    assert arguments.engine_kwargs == Arguments.model_validate({"engine_kwargs": {"enforce_eager": True}}).engine_kwargs
    with pytest.raises(ValueError, match="engine_kwargs"):
        Arguments.model_validate({"engine_kwargs": "enforce_eager"})


def test_the_file_is_served_to_this_machine_alone():
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load((DEPLOY / "ray" / "serve.yaml").read_text()))
    assert schema.http_options.host == "127.0.0.1"


def test_an_empty_key_is_refused(tmp_path):
    from deploy.ray.serve import Ingress

    (tmp_path / "key").write_text("\n")
    with pytest.raises(ValueError, match="key is empty"):
        Ingress({}, {}, api_key_file=str(tmp_path / "key"))


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer key", 200),
        ("bearer key", 200),
        ("Bearer keys", 401),
        ("Bearer ké", 401),
        ("Bearer", 401),
        ("Basic key", 401),
        ("key", 401),
    ],
)
def test_the_key_admits(header, status):
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from deploy.ray.serve import KeyRequired

    application = FastAPI()
    application.add_middleware(KeyRequired, key="key")

    @application.get("/v1/models")
    def models():
        return {}

    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    assert TestClient(application).get("/v1/models", headers=headers).status_code == status


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    close_engine()
    # Otherwise vLLM binds both replicas to the same CPU.
    alone = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return ray_cluster.run(tmp_path_factory.mktemp("serve") / "log", "serve_script", free_port(), timeout=700, **alone)


def test_the_sampler_serves(seen):
    assert seen["expected"]["finish"] == "length"
    assert seen["expected"]["text"]
    assert trace_of({"entropix": seen["trace"]}).tokens


def test_only_this_machine_and_only_with_the_key(seen):
    assert seen["addresses"] == ["127.0.0.1"]
    assert seen["statuses"] == {"none": 401, "wrong": 401, "right": 200, "other path": 401}


@pytest.fixture(scope="module")
def totals(seen):
    """Sample → replica → its value, over all other labels but the border of a bucket."""
    found = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(seen["metrics"]):
        for sample in family.samples:
            name = sample.name + sample.labels.get("le", "")
            found[name][sample.labels.get("ReplicaId")] += sample.value
    return found


def test_ray_exports_the_tokens_of_every_replica(totals):
    tokens = totals["ray_entropix_tokens_total"]
    assert len(tokens) == 2
    assert "" not in tokens
    # vLLM's own, which it gives to Ray itself, less those of the one greedy stream.
    generated = totals["ray_vllm_generation_tokens_total"]
    assert generated.keys() == tokens.keys()
    assert sum(generated.values()) - sum(tokens.values()) == 400
    assert any(generated[replica] == number for replica, number in tokens.items())
    assert sum(totals["ray_entropix_requests_total"].values()) == sum(totals["ray_vllm_request_success_total"].values())


def test_rays_histograms_are_whole(totals):
    for replica, tokens in totals["ray_entropix_tokens_total"].items():
        count = totals["ray_entropix_entropy_bits_count_total"][replica]
        assert count == tokens
        assert totals["ray_entropix_entropy_bits_bucket_total+Inf"][replica] == count
        # The sum is that of the entropies, not of the middles of their buckets.
        assert 0 < totals["ray_entropix_entropy_bits_sum_total"][replica] < 16 * count


@contextlib.contextmanager
def exporting(text):
    """An address at which this text is exported."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_prometheus_knows_rays_metrics_by_the_names_of_the_dashboard(seen, totals, tmp_path):
    program = prometheus.program("prometheus", tmp_path)
    config = yaml.safe_load((dashboards.FOLDER / "prometheus-ray.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    del config["rule_files"]
    [job] = config["scrape_configs"]
    job["file_sd_configs"][0]["files"] = [str(tmp_path / "nodes.json")]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        program,
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]

    def value(expression):
        """Value of the one series that an expression gives, or None."""
        url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(expression)}"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            result = json.load(answer)["data"]["result"]
            return float(result[0]["value"][1]) if result else None

    with exporting(seen["metrics"]) as address, (tmp_path / "log").open("w") as log:
        (tmp_path / "nodes.json").write_text(json.dumps([{"targets": [address]}]))
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 60
            while value("sum(entropix_tokens_total)") is None:
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.2)
            assert value("sum(entropix_tokens_total)") == sum(totals["ray_entropix_tokens_total"].values())
            assert value("count(count by (instance) (entropix_tokens_total))") == 2
            assert 0 < value("histogram_quantile(0.9, sum by (le) (entropix_entropy_bits_bucket))") < 16
            # Ray's agent may let gauges lapse that nobody sets, as vLLM does while nothing runs.
            gauges = {"vllm:num_requests_waiting", "vllm:num_requests_running"}
            assert {name for name in dashboards.metric_names() - gauges if value(f"count({name})") is None} == set()
        finally:
            process.terminate()
            process.wait(20)


@pytest.mark.parametrize("killed", ["engine", "replica"])
def test_requests_in_flight_are_whole_or_end_in_an_error(seen, killed):
    streams = seen[killed]["streams"]
    whole = [stream for stream in streams if stream["error"] is None]
    # The other replica's went on; none was cut in silence.
    for stream in whole:
        assert stream["finish"] == "length"
        assert stream["text"] == seen["expected"]["text"]
    assert whole
    assert len(whole) < len(streams), "nothing was in flight on what was killed"
    for stream in streams:
        if stream["error"] is not None:
            assert stream["finish"] is None
            assert seen["expected"]["text"].startswith(stream["text"])


@pytest.mark.parametrize("killed", ["engine", "replica"])
def test_new_requests_are_served_within_five_seconds(seen, killed):
    failed = [request for request in seen[killed]["new"] if request["error"] is not None]
    late = [request for request in seen[killed]["new"] if request["asked"] >= 5]
    assert len(late) > 20
    assert all(request["asked"] < 5 for request in failed), failed
    assert all(request["seconds"] < 5 for request in late)
