#!/usr/bin/env bash
# Builds the networks of the embedded world from procedural data, stage by stage; a stage that is
# done is skipped, one that was interrupted goes on. WORK is where checkpoints live (default: build/shapes).
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
unset PYTHONDONTWRITEBYTECODE
work=${WORK:-build/shapes}
python=.venv/bin/python
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p "$work"

[ -d "$work/vae" ] || $python -m flowalign.shapes.build autoencoder --work-dir "$work"
[ -d "$work/open_clip" ] || $python -m flowalign.shapes.build text --work-dir "$work"
[ -d "$work/pickscore" ] || $python -m flowalign.shapes.build pickscore --work-dir "$work"
[ -d "$work/untrained" ] || $python -m flowalign.shapes.build untrained --work-dir "$work"
[ -f "$work/bank/prompts.json" ] || $python -m flowalign.data.shapes_latents "$work/untrained" "$work/bank"
.venv/bin/flowalign pretrain configs/shapes/pretrain.yaml \
  "model.path=$work/untrained" "latents=$work/bank" "runs_dir=$work/runs"
$python -m flowalign.shapes.build finish --work-dir "$work"
echo "the finished pipeline lies in $work/pipeline, the reward models in $work/open_clip and $work/pickscore"
