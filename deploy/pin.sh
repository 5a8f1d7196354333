#!/usr/bin/env bash
# Puts the digest of each Dockerfile's base image behind its tag, as the registry tells it now:
#   deploy/pin.sh                    all Dockerfiles of deploy/; commit what it changed
# Needs docker with buildx, and the registries. A base that is pinned is asked for again by its tag.
set -euo pipefail
cd "$(dirname "$0")"

for file in Dockerfile */Dockerfile; do
  base=$(sed -n 's/^ARG BASE=//p' "$file")
  tag=${base%@*}
  digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$tag")
  [[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] || { echo "$tag: no digest, but: $digest" >&2; exit 1; }
  sed -i "s|^ARG BASE=.*|ARG BASE=$tag@$digest|" "$file"
  echo "$file: $tag@$digest"
done
