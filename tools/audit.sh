#!/usr/bin/env bash
# What is known against the packages of images and page, and bills of materials of them (`make audit`).
#   tools/audit.sh BIN     the folder with pip-audit and cyclonedx-py
# Writes build/audit/. Fails if there is a finding, and if an index couldn't be asked: no answer isn't a clean one.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:?usage: tools/audit.sh BIN}
out=build/audit
failed=()
mkdir -p "$out"

for name in cluster notebook gpu; do
  "$bin/cyclonedx-py" requirements "deploy/$name.txt" --output-reproducible --output-file "$out/$name.cdx.json"
  "$bin/pip-audit" --strict --disable-pip --requirement "deploy/$name.txt" --progress-spinner off \
    > "$out/$name.txt" 2>&1 || failed+=("$name ($out/$name.txt)")
done
npm sbom --sbom-format cyclonedx --package-lock-only > "$out/page.cdx.json"
npm audit --package-lock-only > "$out/page.txt" 2>&1 || failed+=("page ($out/page.txt)")

echo "bills of materials (CycloneDX): $out/*.cdx.json"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'findings, or not audited: %s\n' "${failed[@]}"
  exit 1
fi
echo "no package of images and page has a known vulnerability"
