#!/bin/sh
# Compose with the files of this folder:
#   docker/compose.sh up                  `make up`: build, start, wait until all is well
#   docker/compose.sh down                `make down`: end everything; what is in the volume stays
#   docker/compose.sh ARGUMENT...         anything else of Compose's, as in `logs --follow evaluator`
# TLS=1 and GPU=1 add compose.tls.yaml and compose.gpu.yaml. WORKERS is how many workers start, KEDGE_PORT this host's
# port, KEDGE_TAG the images' tag, KEDGE_SECRETS where the files for TLS are, STEPS how far the run is trained.
set -eu
cd "$(dirname "$0")"

export COMPOSE_PROJECT_NAME="${COMPOSE_PROJECT_NAME:-kedge}"
export KEDGE_PORT="${KEDGE_PORT:-50051}"
export KEDGE_SECRETS="${KEDGE_SECRETS:-$PWD/secrets}"
workers=${WORKERS:-4}

image=kedge-server:${KEDGE_TAG:-latest}
[ "${GPU:-0}" = 0 ] || image=$image-cuda13

fail() {
    echo "error: $*" >&2
    exit 1
}

command -v docker >/dev/null 2>&1 || fail "there is no docker command: install Docker, or train without containers" \
    "by 'make demo'"
docker info >/dev/null 2>&1 || fail "no Docker engine answers: start it (systemctl start docker), see that you may" \
    "use it (as a member of the group docker), or say in DOCKER_HOST where it is"
if docker compose version >/dev/null 2>&1; then
    compose="docker compose"
elif command -v docker-compose >/dev/null 2>&1; then
    compose=docker-compose
else
    fail "there is no Compose: install docker-compose 1.29 or newer, or Docker's compose plugin"
fi

files="-f compose.yaml"
[ "${GPU:-0}" = 0 ] || files="$files -f compose.gpu.yaml"
[ "${TLS:-0}" = 0 ] || files="$files -f compose.tls.yaml"

run() {
    # shellcheck disable=SC2086  # words of our own
    $compose $files "$@"
}

kedge_server() {
    docker run --rm --network none --hostname server --user "$(id -u):$(id -g)" \
        --volume "$KEDGE_SECRETS:/secrets" "$image" "$@"
}

new_token() {
    [ -s "$KEDGE_SECRETS/$1.token" ] || kedge_server token new "$@" --file /secrets/tokens >"$KEDGE_SECRETS/$1.token"
}

# A development CA, a certificate for the server, and a token for each role. What is there is kept.
make_secrets() {
    mkdir -p "$KEDGE_SECRETS"
    # Compose mounts the files with the owner and the mode that they have here, and the containers' user is not you. So
    # everybody may read them who gets there, which on this host is nobody but you.
    chmod 700 "$KEDGE_SECRETS"
    [ -s "$KEDGE_SECRETS/server.pem" ] || kedge_server certs dev /secrets --host server >/dev/null
    new_token admin --role admin
    new_token worker --role worker --runs digits
    new_token reader --role reader --runs digits
    (cd "$KEDGE_SECRETS" && chmod a+r ca.pem server.pem server-key.pem tokens ./*.token)
}

up() {
    run build
    [ "${TLS:-0}" = 0 ] || make_secrets
    # Returns when the server is healthy and the run is open: that is what the workers wait for.
    run up --detach --scale "worker=$workers" || {
        run logs --tail 20 server opener >&2
        fail "not everything has started, see above; 'make down' ends what has"
    }
    tell
}

tell() {
    cat <<END

The server answers on localhost:$KEDGE_PORT, and $workers workers train runs/digits. What next:

  docker/compose.sh logs --follow evaluator     how good the slow weights are
  make down                                     end it; what the server holds stays, for the next 'make up'

With the SDK of this checkout, which 'make setup' installs:

  export KEDGE_ADDRESS=localhost:$KEDGE_PORT
END
    [ "${TLS:-0}" = 0 ] || cat <<END
  export KEDGE_CA_FILE=$KEDGE_SECRETS/ca.pem KEDGE_TOKEN_FILE=$KEDGE_SECRETS/reader.token
END
    cat <<END
  .venv/bin/kedge top
  .venv/bin/kedge pull digits --weights slow -o slow.safetensors
END
}

case "$*" in
    up) up ;;
    down) run down --remove-orphans ;;
    *) run "$@" ;;
esac
