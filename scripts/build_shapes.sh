#!/usr/bin/env bash
# Builds the networks of the embedded world from procedural data, stage by stage; a stage that is done is skipped, one
# that was interrupted goes on. WORK is where checkpoints live (default: build/shapes). STEPS=3 trains every network for
# three steps only: of no use but to see that the whole way works.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
unset PYTHONDONTWRITEBYTECODE
work=${WORK:-build/shapes}
python=.venv/bin/python
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p "$work"
build() { $python -m flowalign.shapes.build "$1" --work-dir "$work" ${STEPS:+--steps "$STEPS"}; }
bank=() phases=()
if [ -n "${STEPS:-}" ]; then
  bank=(--num-images 500)
  phases=("phases=[{iterations: $STEPS, learning_rate: 1.0e-3, final_learning_rate: 1.0e-4}]" learner.compile=false learner.batch_size=8)
fi

[ -d "$work/vae" ] || build autoencoder
[ -d "$work/open_clip" ] || build text
[ -d "$work/pickscore" ] || build pickscore
[ -d "$work/detector" ] || build detector
[ -d "$work/colors" ] || build colors
[ -d "$work/untrained" ] || build untrained
[ -f "$work/bank/prompts.json" ] || $python -m flowalign.making.shapes_latents "$work/untrained" "$work/bank" "${bank[@]}"
.venv/bin/flowalign pretrain configs/shapes/pretrain.yaml \
  "model.path=$work/untrained" "latents=$work/bank" "runs_dir=$work/runs" "${phases[@]}"
build finish
echo "the finished pipeline lies in $work/pipeline, the reward models in $work/open_clip, $work/pickscore, $work/detector and $work/colors"
