#!/usr/bin/env bash
# Makes .venv with everything a run and the tests need; a second call finds its stamp and returns at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stop() { echo "setup: $*" >&2; exit 2; }

# A virtual environment does not survive being moved, so the place is part of the stamp.
stamp=.venv/.flowalign-stamp
want=$(cat pyproject.toml constraints.txt scripts/setup.sh scripts/registry.sh <(pwd -P) | sha256sum | cut -d' ' -f1)
[[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$want" ]] && exit 0

python=
for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python3.12 python3.13; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
[[ -n $python ]] || stop "no python >= 3.11 with its venv module was found; install python3.11 (on Debian also" \
    "python3.11-venv), or name one: PYTHON=/path/to/python3.11 bash scripts/setup.sh"
command -v g++ >/dev/null || stop "no g++ was found, which torch and DeepSpeed build extensions with; install it" \
    "(on Debian: apt-get install g++) and run this again"

if ! .venv/bin/python -c 'import pip' >/dev/null 2>&1; then
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
rm -f "$stamp"

. scripts/registry.sh

with_uv() {
    [[ -z ${PIP_NO_INDEX:-} ]] || return 1
    .venv/bin/python -m pip install --quiet -c constraints.txt uv || return 1
    .venv/bin/uv pip install --quiet --python .venv/bin/python \
        -c constraints.txt --build-constraints constraints.txt -e '.[train,ocr,dev]'
}

echo "setup: installing the pinned packages (about 6.5 GB on disk)"
if ! with_uv; then
    echo "setup: uv could not do it, going on with pip, which takes longer" >&2
    PIP_CONSTRAINT=constraints.txt .venv/bin/python -m pip install -e '.[train,ocr,dev]' ||
        stop "pip could not install the packages either; its last lines say which one and why"
fi
echo "$want" >"$stamp"
echo "setup: done"
