"""Peak memory, measured in a process of its own: nothing of size N x M is ever made."""

import subprocess
import sys

import pytest

PROBE = """
import sys
import numpy as np
import pyattn

n, options = int(sys.argv[1]), eval(sys.argv[2])

def peak():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024

def run(x):
    out, saved = pyattn.attention.forward(x, x, x, **options)
    saved.backward(out)

rng = np.random.default_rng(0)
run(rng.standard_normal((1, 300, 64), dtype=np.float32))
x = rng.standard_normal((1, n, 64), dtype=np.float32)
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = peak()
run(x)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("n", "options", "limit"),
    [
        (32768, {"causal": True, "window": 511}, 200e6),
        (16384, {}, 200e6),  # an N x N float32 array would be 1.07 GB
        (
            8192,
            {
                "causal": True,
                "alibi_slopes": "np.ones(1, np.float32)",
                "sinks": "np.ones(1, np.float32)",
            },
            100e6,
        ),
    ],
    ids=["window", "dense", "alibi"],
)
def test_peak_memory_of_forward_and_backward(n, options, limit):
    text = "dict(" + ", ".join(f"{key}={value}" for key, value in options.items()) + ")"
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(n), text], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < limit
