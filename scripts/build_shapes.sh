#!/usr/bin/env bash
# Builds the networks of the embedded world from procedural data, stage by stage; a stage that is done is skipped, one
# that was interrupted goes on. WORK is where checkpoints live (default: build/shapes). STEPS=3 trains every network for
# three steps only: of no use but to see that the whole way works, in a WORK of its own. MINUTES (default: 110) is the
# length of a leg: after it the script ends with exit code 75, and the same command goes on where it ended. The bank of
# scenes alone is made in one go, which takes some minutes: a shorter leg never comes past it.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${WORK:-build/shapes}
refuse() {
  echo "$1" >&2
  exit 2
}
[[ ${MINUTES:-110} =~ ^[0-9]+$ ]] || refuse "MINUTES: '$MINUTES' is no whole number of 0 or more"
[[ ${STEPS:-1} =~ ^0*[1-9][0-9]*$ ]] || refuse "STEPS: '$STEPS' is no whole number of 1 or more"
mkdir -p "$work"
exec 9> "$work/.lock"
flock -n 9 || refuse "WORK: another build works in $work"
[ -f "$work/steps.txt" ] || echo "${STEPS:-all}" > "$work/steps.txt"
begun=$(cat "$work/steps.txt")
[ "$begun" = "${STEPS:-all}" ] || refuse "STEPS: $work was begun with $begun steps; give another WORK, or the same STEPS"
bash scripts/setup.sh
unset PYTHONDONTWRITEBYTECODE
python=.venv/bin/python
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
ends=$((SECONDS + 60 * 10#${MINUTES:-110}))
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

lacks() { # tells whether one of the files is not there yet; a folder alone says nothing
  local file
  for file in "$@"; do [ -f "$work/$file" ] || return 0; done
  return 1
}
if lacks vae/config.json; then build autoencoder; fi
if lacks tokenizer/tokenizer_config.json open_clip/open_clip_config.json; then build text; fi
if lacks text_encoder_1/config.json text_encoder_2/config.json; then build encoders; fi
if lacks pickscore/config.json; then build pickscore; fi
if lacks detector/config.json; then build detector; fi
if lacks colors/open_clip_config.json; then build colors; fi
if lacks untrained/model_index.json; then build untrained; fi
[ -f "$work/bank/prompts.json" ] || leg $python -m flowalign.making.shapes_latents "$work/untrained" "$work/bank" "${bank[@]}"
leg .venv/bin/flowalign pretrain configs/shapes/pretrain.yaml \
  "model.path=$work/untrained" "latents=$work/bank" "runs_dir=$work/runs" "${phases[@]}"
build finish
echo "the finished pipeline lies in $work/pipeline, the reward models in $work/open_clip, $work/pickscore, $work/detector and $work/colors"
