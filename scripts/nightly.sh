#!/usr/bin/env bash
# Every test, the slow ones too; those marked `gpu` where torch sees an accelerator.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
marks='not gpu'
if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    marks='gpu or not gpu'
fi
exec bash scripts/test.sh -m "$marks" --timeout 3600 "$@"
