#!/usr/bin/env bash
# Replays a pod's life from the rendered manifest (pod_life.py), and a sidecar's beside its worker (pod_sidecar.py). Needs
# root, for the namespaces that make a container. 77: skipped, the last line says why.
set -euo pipefail
cd "$(dirname "$0")/../.."
[[ $(id -u) -eq 0 ]] || { echo "pod_life: skipped: a container's namespaces need root"; exit 77; }
tests/k8s/get_kubectl.sh || true
[[ -x build/release/bin/structkv-server && -x build/release/bin/structkv ]] ||
  scripts/build release structkv-server structkv
said=$(mktemp)
trap 'rm -f "$said"' EXIT
for program in pod_life.py pod_sidecar.py; do
  tests/k8s/k8s_test.sh "$PWD/build/release" "$PWD" "$(command -v python3)" --program "$program" | tee -a "$said"
done
echo "pod_life: passed; left out: $(sed -n 's/.*left out: //p' "$said" | paste -sd';')"
