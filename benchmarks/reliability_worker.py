"""A worker process of the fuzzer: reads the inputs given by its argument, a JSON object."""

from __future__ import annotations

import json
import sys

from benchmarks.reliability_fuzz import all_kinds, run_worker


def main() -> None:
    spec = json.loads(sys.argv[1])
    run_worker(all_kinds(), spec)


if __name__ == "__main__":
    main()
