#!/usr/bin/env bash
# benchmarks/gpu.py on a machine that has a GPU, Python 3.12 and torch, but neither this package's needs nor a network.
#
#   benchmarks/gpu.sh pack wheels    # where there is a network: fills a folder; copy it over with the repository
#   benchmarks/gpu.sh run wheels     # on the machine with the GPU; further arguments go to gpu.py
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
# What is loaded by the benchmark and is not in common images with torch, each without what it needs itself.
needs=(nnsight==0.8.1 transformers==5.24.0 tokenizers huggingface_hub httpx2 httpcore2 truststore pydantic pydantic_core
    annotated_types typing_inspection dill greenlet zstandard soundfile cffi pycparser soxr lazy_loader websocket_client)

case ${1:-} in
pack)
    platforms=(manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux_2_24_x86_64 manylinux_2_27_x86_64
        manylinux_2_28_x86_64 manylinux_2_31_x86_64 manylinux_2_34_x86_64 manylinux1_x86_64)
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]/#/--platform=}" -d "${2:?a folder for the wheels}" "${needs[@]}"
    ;;
run)
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "${2:?the folder of wheels}"/*.whl
    cd "$here/.."
    PYTHONPATH="$site:$PWD" exec "$python" benchmarks/gpu.py "${@:3}"
    ;;
*)
    sed -n '2,5p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
