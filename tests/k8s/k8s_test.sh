#!/usr/bin/env bash
# Runs tests of the manifests in a virtual environment of the build directory.
#   k8s_test.sh BUILD_DIR SOURCE_DIR PYTHON PYTEST_ARGUMENT...|--program FILE
# 77, which CTest shows as skipped: there is no kubectl or kustomize, no python3-venv, or no PyPI.
set -euo pipefail
build=$1
source=$2
python=$3
shift 3
environment=$build/k8s
requirements=$source/tests/k8s/requirements.txt

skip() { echo "k8s_test: skipped: $*"; exit 77; }

export PATH=$PATH:$source/build/kubectl
command -v kubectl >/dev/null || command -v kustomize >/dev/null ||
  skip "there is no kubectl (nor kustomize); tests/k8s/get_kubectl.sh brings one"
"$python" -c 'import ensurepip' 2>/dev/null || skip "$python has no ensurepip (python3-venv)"
mkdir -p "$environment"
# Anew where what it was made from has changed; one at a time.
exec 9>"$environment/lock"
flock 9
made_from=$("$python" -VV; cat "$requirements")
if [[ $(cat "$environment/made-from" 2>/dev/null) != "$made_from" ]]; then
  rm -rf "$environment"/{venv,made-from}
  "$python" -m venv "$environment/venv"
  "$environment/venv/bin/pip" install --quiet --no-deps --retries 1 --timeout 20 -r "$requirements" \
    >"$environment/log" 2>&1 ||
    { cat "$environment/log"; skip "PyPI cannot be reached, or lacks what $requirements names"; }
  echo "$made_from" >"$environment/made-from"
fi
flock -u 9

export STRUCTKV_BIN=$build/bin
cd "$source/tests/k8s"
if [[ $1 == --program ]]; then
  shift
  exec "$environment/venv/bin/python" -B "$@"
fi
# Packages bring plugins of pytest, with needs of their own.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
exec "$environment/venv/bin/pytest" -q -rs -p no:cacheprovider "$@"
