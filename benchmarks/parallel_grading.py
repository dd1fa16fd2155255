"""How long a request waits for the verdicts of a judge behind a network.

The published server asks its judge about one answer after another. Here all answers of a request are sent at once, and
the inner loop trains other requests meanwhile. The judge is a stand-in service with a fixed time for each call, so only
the waiting is compared.
"""

import tempfile
import time
from typing import Any

from benchmarks.grading import answers
from benchmarks.stand_in import stand_in_process
from seal_nb.engines.api import ApiSettings
from seal_nb.grading.choose import make_grader

LATENCY_S = 0.5  # of a call; GPT-4.1 takes about as long for one word


def measure_grading(n_questions: int, *, latency_s: float = LATENCY_S) -> dict[str, Any]:
    """Seconds for the verdicts of one request, whose answers (base and adapter) are all new to the judge."""
    n, at_once = 2 * n_questions, ApiSettings().max_parallel
    with stand_in_process("yes", service_time_s=latency_s, lanes=n) as url:
        one_by_one_s, _ = _seconds(url, n, max_parallel=1)
        at_once_s, cpu_s = _seconds(url, n, max_parallel=at_once)
    return {
        "latency_s": latency_s,
        "answers": n,
        "calls_at_a_time": at_once,
        "one_by_one_s": one_by_one_s,
        "at_once_s": at_once_s,
        "factor": one_by_one_s / at_once_s,
        "cpu_s": cpu_s,
    }


def _seconds(url: str, n: int, *, max_parallel: int) -> tuple[float, float]:
    """Wall and processor seconds with an empty cache; the connections exist already."""
    with tempfile.TemporaryDirectory() as folder:
        options = f"base_url={url}&api_key_env=&max_parallel={max_parallel}&cache_dir={folder}"
        grader = make_grader(f"judge:stand-in?{options}")
        both = answers(2 * n)
        grader.grade(both[:n])
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        assert "UNGRADED" not in grader.grade(both[n:])
        return time.perf_counter() - wall_s, time.process_time() - cpu_s
