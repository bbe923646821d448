#!/usr/bin/env bash
# Builds the networks of the embedded world from procedural data, stage by stage; a stage that is done is skipped, one
# that was interrupted goes on. WORK is where checkpoints live (default: build/shapes). STEPS=3 trains every network for
# three steps only: of no use but to see that the whole way works. MINUTES (default: 110) is the length of a leg: after
# it the script ends with exit code 75, and the same command goes on where it ended.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
unset PYTHONDONTWRITEBYTECODE
work=${WORK:-build/shapes}
python=.venv/bin/python
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
mkdir -p "$work"
ends=$((SECONDS + 60 * ${MINUTES:-110}))
leg() { # a command, asked to end when the leg does
  local left=$((ends - SECONDS)) code=0
  if [ "$left" -gt 0 ]; then timeout --foreground --signal=TERM --kill-after=120 "$left" "$@" || code=$?; else code=124; fi
  if [ "$code" = 124 ] || [ "$code" = 75 ]; then
    echo "this leg has ended; the same command goes on from $work"
    exit 75
  fi
  return "$code"
}
build() { leg $python -m flowalign.shapes.build "$1" --work-dir "$work" ${STEPS:+--steps "$STEPS"}; }
bank=() phases=()
if [ -n "${STEPS:-}" ]; then
  bank=(--num-images 500)
  phases=("phases=[{iterations: $STEPS, learning_rate: 1.0e-3, final_learning_rate: 1.0e-4}]" learner.compile=false learner.batch_size=8)
fi

[ -d "$work/vae" ] || build autoencoder
[ -d "$work/open_clip" ] || build text
[ -d "$work/text_encoder_2" ] || build encoders
[ -d "$work/pickscore" ] || build pickscore
[ -d "$work/detector" ] || build detector
[ -d "$work/colors" ] || build colors
[ -d "$work/untrained" ] || build untrained
[ -f "$work/bank/prompts.json" ] || leg $python -m flowalign.making.shapes_latents "$work/untrained" "$work/bank" "${bank[@]}"
leg .venv/bin/flowalign pretrain configs/shapes/pretrain.yaml \
  "model.path=$work/untrained" "latents=$work/bank" "runs_dir=$work/runs" "${phases[@]}"
build finish
echo "the finished pipeline lies in $work/pipeline, the reward models in $work/open_clip, $work/pickscore, $work/detector and $work/colors"
