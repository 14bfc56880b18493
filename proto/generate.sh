#!/usr/bin/env bash
# Generates the stubs next to their .proto files; run through `make proto`.
# The path of a .proto equals its Python package, so that the stubs import without patching.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-../.venv/bin/python}
bin=$(dirname "$python")
mapfile -t protos < <(find hive_proto -name '*.proto' | sort)
"$python" -m grpc_tools.protoc -I . \
  --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" \
  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. "${protos[@]}"
for proto in "${protos[@]}"; do
  touch "$(dirname "$proto")/__init__.py" "$(dirname "$(dirname "$proto")")/__init__.py"
done
