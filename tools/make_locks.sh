#!/bin/sh
# Resolves requirements.lock (both distributions and the dev group), docker/*.lock (what the images hold of it) and
# requirements-proto.lock (the proto group) anew.
# Arguments go to `uv pip compile`: `--upgrade` for the newest of everything, `--upgrade-package NAME` for one.
set -eu
cd "$(dirname "$0")/.."

# Not the whole environment, which the lock as it is may not be able to fill.
tools/make_venv.sh .venv ""
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-true}"

compile() {
    output=$1
    shift
    # No URL of any kind is written: see docs/adr/0001-a-lock-without-hosts.md.
    .venv/bin/python -m uv pip compile --quiet --no-python-downloads --universal --python-version 3.11 \
        --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
        --output-file "$output" "$@"
    if grep -nE '://|^ *-e |file:' "$output"; then
        echo "error: $output names a host or a path, see the lines above" >&2
        exit 1
    fi
    echo "$output: $(grep -cE '^[a-z0-9]' "$output") packages"
}

compile requirements.lock --group dev --extra cli --no-emit-package kedge --no-emit-package kedge-server \
    "$@" client/pyproject.toml server/pyproject.toml
# What the images hold, at the same versions.
compile docker/server.lock --constraints requirements.lock --no-emit-package kedge --no-emit-package kedge-server \
    client/pyproject.toml server/pyproject.toml
compile docker/server-cuda13.lock --constraints requirements.lock --group cuda13 --no-emit-package kedge \
    --no-emit-package kedge-server client/pyproject.toml server/pyproject.toml
compile docker/worker.lock --constraints requirements.lock --group worker --no-emit-package kedge client/pyproject.toml
compile docker/build.lock --constraints requirements.lock --group wheel
compile requirements-proto.lock --group proto "$@"
