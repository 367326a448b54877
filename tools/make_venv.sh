#!/bin/sh
# Makes a virtual environment that holds exactly what a lock names, and the given projects as editable installs.
#   tools/make_venv.sh ENVIRONMENT LOCK [PROJECT...]
# PYTHON names the Python to use; when empty, python3.11 is taken, or else python3. With an empty LOCK only the
# environment and uv are made. The file .installed says that an environment is complete, and where it was made.
set -eu
cd "$(dirname "$0")/.."

environment=$1
lock=$2
shift 2
python=$environment/bin/python

fail() {
    echo "error: $*" >&2
    exit 1
}

is_usable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_usable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or newer with its venv module"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3; do
        if is_usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "neither python3.11 nor python3 is a Python 3.11 or newer with its venv module (on Debian: package" \
        "python3-venv); install one, or name it: make setup PYTHON=/path/to/python"
}

# Two at once would pull the environment from under each other; where flock is missing, they may.
if command -v flock >/dev/null 2>&1; then
    exec 9>"$environment.lock"
    flock --nonblock 9 || {
        echo "Waiting for another setup of $environment ..."
        flock 9
    }
fi

installed=$environment/.installed
here=$(pwd -P)

# What is incomplete, was made elsewhere, or has lost its Python is not mended but made anew.
if [ "$(cat "$installed" 2>/dev/null)" != "$here" ] || ! is_usable "$python"; then
    base=$(find_python)
    rm -rf "$environment"
    "$base" -m venv "$environment"
fi
echo "Filling $environment ($("$python" --version)) ..."

log=$(mktemp)
uv_requirement=$(mktemp)
trap 'rm -f "$log" "$uv_requirement"' EXIT
trap 'echo "interrupted; run it again" >&2; exit 130' INT TERM

# By default uv trusts only the certificates that it brings along, not those that were added to the machine.
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-true}"

# The lock holds uv itself, with its hashes.
sed -n '/^uv==/,/^[^ ]/{/^uv==/p;/^ *--hash/p;}' requirements.lock >"$uv_requirement"
if [ -s "$uv_requirement" ] &&
    "$python" -m pip install -qq --disable-pip-version-check --require-hashes -r "$uv_requirement" 2>"$log"; then
    has_uv=true
else
    has_uv=false
fi

with_uv() {
    # The Python is named, so that an active environment is not taken for the one that is meant.
    "$python" -m uv pip sync --quiet --compile-bytecode --no-python-downloads --python "$python" --require-hashes \
        "$lock" || return 1
    [ "$#" -eq 0 ] || "$python" -m uv pip install --quiet --no-python-downloads --python "$python" \
        --no-deps --no-build-isolation "$@"
}

with_pip() {
    "$python" -m pip install -qq --disable-pip-version-check --require-hashes -r "$lock" || return 1
    [ "$#" -eq 0 ] || "$python" -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation "$@"
}

[ -n "$lock" ] || exit 0

editables=
for project in "$@"; do
    editables="$editables -e ./$project"
done

# uv does not read pip's configuration: where it cannot reach the index, pip may.
# shellcheck disable=SC2086  # names of our own folders
if ! $has_uv || ! with_uv $editables 2>"$log"; then
    echo "uv could not install the packages, pip does it (slower). It said:" >&2
    tail -n 5 "$log" >&2
    with_pip $editables
fi
"$python" -m pip check --disable-pip-version-check >"$log" 2>&1 || {
    cat "$log" >&2
    fail "$lock does not hold what the projects ask for; 'make lock' resolves it anew"
}
echo "$here" >"$installed"
