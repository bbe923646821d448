#!/usr/bin/env bash
# Every test, the slow ones too. No test needs an accelerator.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash scripts/test.sh -m 'slow or not slow' --timeout 3600 "$@"
