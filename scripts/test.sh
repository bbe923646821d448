#!/usr/bin/env bash
# Sets up and runs pytest; without arguments the suite that leaves out `slow`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
unset PYTHONDONTWRITEBYTECODE  # importing torch and diffusers without bytecode takes three times as long
# One thread a process: tests start several at once, and equal thread counts make results comparable bit for bit.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline WANDB_SILENT=true
export RAY_USAGE_STATS_ENABLED=0 RAY_DISABLE_IMPORT_WARNING=1 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
# Two files at a time, in the order of tests/conftest.py: a Ray cluster of a test mostly waits. Another count: -n 4; one
# process: -n 0.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
