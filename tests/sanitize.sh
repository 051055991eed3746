#!/bin/bash
# Runs the tests of the compiled parts with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package.
# Arguments go to pytest; PY names another Python.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-python}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r sb3_ezv2 tests setup.py setup.cfg pyproject.toml README.md LICENSE "$copy"
cd "$copy"
find . -name '*.so' -delete
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
CFLAGS="$flags" LDFLAGS="$flags" "$PY" setup.py -q build_ext --inplace
libraries="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so.6)"
# The interpreter itself never frees all of its memory
LD_PRELOAD="$libraries" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc PYTHONPATH="$copy" OMP_NUM_THREADS=1 \
	"$PY" -m pytest -q -p no:cacheprovider -m "not slow" \
	--deselect tests/test_tree.py::test_storage_is_what_was_promised tests/test_tree.py tests/test_driver.py tests/test_noise.py tests/test_inference.py "$@"
