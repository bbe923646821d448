#!/usr/bin/env bash
# Every test, the slow ones too, and a soak: 300 iterations under kills, stops and full disks. Nothing needs an accelerator.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/test.sh -m 'slow or not slow' --timeout 3600 "$@"
exec .venv/bin/python scripts/benchmarks/soak.py --iterations 300
