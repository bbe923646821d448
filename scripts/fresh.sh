#!/usr/bin/env bash
# What a newcomer has: builds the wheel, installs it with the newest of all that it depends on into a new environment, and
# runs the quickstart's configuration for one iteration in an empty folder, with nothing of the caller's environment.
#
#   bash scripts/fresh.sh
#   bash scripts/fresh.sh -c constraints.txt   # arguments are those of `uv pip install`, or of pip where there is no uv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
. scripts/registry.sh
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder"/{sources,home,empty}
python=$folder/env/bin/python

step() {
    local began=$SECONDS
    "${@:2}"
    echo "fresh: $1, $((SECONDS - began)) s"
}
build() {
    # A build leaves files beside the sources.
    git ls-files -z flowalign rewards pyproject.toml README.md LICENSE | tar --null -cf - -T - | tar -xf - -C "$folder/sources"
    .venv/bin/python -m pip wheel --quiet --no-deps -w "$folder" "$folder/sources"
}
install() {
    .venv/bin/python -m venv "$folder/env"
    if [[ -x .venv/bin/uv ]]; then
        .venv/bin/uv pip install --quiet --python "$python" "$@"
    else
        "$python" -m pip install --quiet "$@"
    fi
}
alone() {
    (cd "$folder/empty" && env -i HOME="$folder/home" PATH="$folder/env/bin:/usr/local/bin:/usr/bin:/bin" LANG=C.UTF-8 "$@")
}

step "the wheel is built" build
step "installed" install "$(echo "$folder"/flowalign-*.whl)[train]" "$@"
alone python -m pip list 2>/dev/null | grep -E '^(flowalign|torch|torchvision|transformers|diffusers|deepspeed|ray) '
alone python -c 'import flowalign, rewards, sys; assert flowalign.__file__.startswith(sys.prefix) and rewards.__file__.startswith(sys.prefix)'
step "init" alone flowalign init --shapes --to quickstart.yaml
step "check" alone flowalign check quickstart.yaml
step "align" alone flowalign align quickstart.yaml iterations=1 evaluation.num_samples=8
[[ -f $folder/empty/runs/shapes-quickstart/report.html ]]
step "doctor" alone flowalign doctor
echo "fresh: all of it, $SECONDS s"
