#!/usr/bin/env bash
# Sets up, aligns the shipped model with DiffusionNFT, says where the report lies. Arguments are overrides: key=value.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
unset PYTHONDONTWRITEBYTECODE  # importing torch and diffusers without bytecode takes three times as long
.venv/bin/flowalign align configs/shapes/quickstart.yaml "$@"

report=$(ls -t runs/*/report.html 2>/dev/null | head -n 1 || true)
[[ -z $report ]] || echo "report: $PWD/$report"
echo "other commands: .venv/bin/flowalign --help (or \`. .venv/bin/activate\` first, then flowalign …)"
