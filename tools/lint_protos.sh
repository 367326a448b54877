#!/bin/sh
# Runs Buf over proto/. Buf comes as an npm package; where that cannot be had, this says so and passes.
set -eu
cd "$(dirname "$0")/.."

buf="@bufbuild/buf@1.75.0"
if ! command -v npx >/dev/null 2>&1; then
    echo "buf lint: skipped, there is no npx (Node.js) on this machine"
elif ! npx --yes --loglevel=error "$buf" --version >/dev/null 2>&1; then
    echo "buf lint: skipped, npx could not get $buf"
else
    echo "buf lint proto"
    npx --yes --loglevel=error "$buf" lint proto 2>&1
fi
