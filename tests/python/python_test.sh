#!/usr/bin/env bash
# Installs the Python package into a virtual environment of the build directory, from the libraries that are there,
# and runs a command in it. 77, which CTest shows as skipped: there is no python3-dev, python3-venv or PyPI.
#   python_test.sh BUILD_DIR SOURCE_DIR PYTHON install|pytest|mypy|torch|hf|vllm|quality
set -euo pipefail
build=$1
source=$2
python=$3
what=$4
environment=$build/python
requirements=$source/tests/python/requirements.txt

skip() { echo "python_test: skipped: $*"; exit 77; }
quietly() { "$@" >"$environment/log" 2>&1 || { cat "$environment/log" >&2; return 1; }; }

install() {
  "$python" -c 'import sysconfig, os; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
    skip "$python has no headers (python3-dev)"
  "$python" -c 'import ensurepip' 2>/dev/null || skip "$python has no ensurepip (python3-venv)"
  mkdir -p "$environment"
  # Anew where what it was made from has changed.
  local made_from
  made_from=$("$python" -VV; cat "$requirements")
  if [[ $(cat "$environment/made-from" 2>/dev/null) != "$made_from" ]]; then
    rm -rf "$environment"/{venv,build,made-from}
    quietly "$python" -m venv "$environment/venv"
    quietly "$environment/venv/bin/pip" install --no-deps --retries 1 --timeout 20 -r "$requirements" ||
      skip "PyPI cannot be reached, or lacks what $requirements names"
    echo "$made_from" >"$environment/made-from"
  fi
  quietly "$environment/venv/bin/pip" install --no-deps --no-build-isolation --force-reinstall "$source/client/python" \
    --config-settings=build-dir="$environment/build" --config-settings=cmake.define.STRUCTKV_BUILD_DIR="$build"
}

export STRUCTKV_BIN=$build/bin
bin=$environment/venv/bin
if [[ $what == install ]]; then
  install
  exit 0
fi
[[ -x $bin/pytest && -d $(echo "$environment"/venv/lib/python3*/site-packages/structkv) ]] ||
  skip "the package was not installed"
cd "$source/tests/python"
case $what in
  pytest) "$bin/pytest" -q -rs -p no:cacheprovider --ignore=test_torch.py --ignore-glob='test_hf*.py' --ignore=test_vllm.py . ;;
  mypy) "$bin/mypy" --strict --cache-dir "$environment/mypy" -p structkv &&
    "$bin/mypy" --strict --cache-dir "$environment/mypy" --ignore-missing-imports . &&
    cd "$source/tests/quality" && "$bin/mypy" --config-file "$source/tests/python/mypy.ini" --strict \
      --cache-dir "$environment/mypy" --ignore-missing-imports . ;;
  torch)
    "$bin/python" -c 'import torch' 2>/dev/null || skip "there is no torch: $bin/pip install torch, or PYTHONPATH"
    "$bin/pytest" -q -rs -p no:cacheprovider test_torch.py
    ;;
  hf)
    "$bin/python" -c 'import structkv.hf' 2>/dev/null ||
      skip "there is no torch or no transformers from 5.20 on: $bin/pip install torch transformers, or PYTHONPATH"
    "$bin/pytest" -q -rs -p no:cacheprovider test_hf*.py
    ;;
  quality)
    "$bin/python" -c 'import torch, transformers, matplotlib, jinja2' 2>/dev/null ||
      skip "torch, transformers, matplotlib or jinja2 is missing: $bin/pip install them, or PYTHONPATH"
    cd "$source/tests/quality" && "$bin/pytest" -q -rs -p no:cacheprovider .
    ;;
  vllm)
    "$bin/python" -c 'import vllm.distributed.kv_transfer.kv_connector.v1.base' 2>/dev/null ||
      skip "there is no vLLM that can be imported (docs/engines.md says what of it is needed)"
    "$bin/pytest" -q -rs -p no:cacheprovider test_vllm.py
    ;;
esac
