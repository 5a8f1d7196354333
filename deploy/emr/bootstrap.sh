#!/usr/bin/env bash
# Installs Pomona on a node of an EMR cluster: bootstrap.sh s3://BUCKET/packages/
# The node can reach S3 only, so all wheels must be in that folder (docs/cloud.md tells how).
set -euo pipefail
packages=${1:?usage: bootstrap.sh s3://BUCKET/packages/}

sudo dnf install --assumeyes --quiet python3.11 python3.11-pip
aws s3 cp --recursive --only-show-errors "$packages" /tmp/packages

sudo python3.11 -m venv /opt/pomona
pip=(sudo /opt/pomona/bin/pip install --quiet --no-index --find-links /tmp/packages)
# All requirements but PySpark, which EMR has.
"${pip[@]}" --require-hashes --requirement /tmp/packages/cluster.txt
"${pip[@]}" --no-deps /tmp/packages/pomona-*.whl

sudo install --directory --mode 1777 /mnt/tmp # the driver works on a local copy of OUT there
rm -r /tmp/packages
