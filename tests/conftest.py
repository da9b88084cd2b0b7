"""What every test process needs before vLLM is imported."""

import os

from tests.support import runners

# Model Runner V2 with ENTROPIX_TEST_RUNNER=v2.
runners.choose()

# In process: the tests look into the engine, and three imports less per engine.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# The first compilation stalls for up to 25 s; numerics are the same.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
