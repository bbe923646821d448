#!/usr/bin/env bash
# Every test, the slow ones too, a soak of 300 iterations under kills, stops and full disks, and the wheel in a new
# environment. Nothing needs an accelerator.
# Of each model family that is every kind of algorithm, LoRA and full, killed and exported (tests/families/test_matrix.py),
# real.py, and each recipe; the table of what they found comes last.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
bash scripts/test.sh -m 'slow or not slow' --timeout 3600 --color=no "$@" 2>&1 | tee "$log"
tests=$?
.venv/bin/python scripts/benchmarks/soak.py --iterations 300
soak=$?
bash scripts/fresh.sh
fresh=$?
sed -n '/^=* families =*$/,/^=* .* =*$/{/^=/d;p}' "$log"
((tests == 0)) || exit "$tests"
((soak == 0)) || exit "$soak"
exit "$fresh"
