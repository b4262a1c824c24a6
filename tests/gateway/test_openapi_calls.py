"""Every operation of the OpenAPI document is called with what it allows and with what it does not: no server error."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(sys.executable).with_name("schemathesis")


@pytest.mark.slow
@pytest.mark.skipif(not TOOL.exists(), reason="schemathesis is not installed")
@pytest.mark.timeout(600)
def test_no_operation_answers_with_a_server_error(start_gateway, start_worker, tmp_path):
    gateway = start_gateway()
    start_worker(gateway.settings)
    options = {
        "checks": "not_a_server_error",
        "phases": "fuzzing",
        "max-examples": "2",
        "seed": "1",
        "generation-database": "none",
        "request-timeout": "30",
        "suppress-health-check": "all",
        # Below these names are paths that there are without them, too.
        "exclude-path-regex": "^/(cohere|gpustack|infinity|jina|localai|plain|sglang|siliconflow|tei|xinference)/",
    }
    command = [TOOL, "run", f"{gateway.url}/openapi.json", *(f"--{name}={value}" for name, value in options.items())]
    run = subprocess.run([*command, "--no-color"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stdout[-8_000:] + run.stderr[-2_000:]
    # It has called something: the first line of what it tells of its cases.
    (generated,) = re.findall(r"(\d+) generated, ", run.stdout)
    assert int(generated) > 100
