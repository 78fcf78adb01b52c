#!/usr/bin/env bash
# Renders and validates every overlay with every set of components that fits it: minutes. The quick tests
# (k8s_*_test of CTest) take a few of them. 77: skipped, the last line says why.
set -euo pipefail
cd "$(dirname "$0")/../.."
tests/k8s/get_kubectl.sh || true
exec tests/k8s/k8s_test.sh "$PWD/build/release" "$PWD" "$(command -v python3)" test_combinations.py
