#!/usr/bin/env bash
# Builds dist/: the source distribution, and from it the wheel for manylinux_2_28; checks both.
#
#   wheel.sh            FASTSAM_BUILD=cpu unless it is set
#   wheel.sh --quick    the wheel from the checkout, whose objects are used again
#   wheel.sh --twice    also builds the wheel a second time, in another folder, and compares
#
# The wheel does not depend on the folder or the time: SOURCE_DATE_EPOCH, if not set, is the last commit's time.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/.venv/bin/python
tools=$(tools/venv.sh wheel)/bin
platform=manylinux_2_28_$(uname -m)
export FASTSAM_BUILD=${FASTSAM_BUILD:-cpu}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2> /dev/null || echo 1577836800)}
umask 022

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
rm -rf dist build/lib* build/bdist* && mkdir dist

# unpack FOLDER: the source distribution's files.
unpack() {
  mkdir "$1"
  tar -xzf dist/*.tar.gz -C "$1" --strip-components=1
}

# build SOURCES FOLDER: builds a wheel of the sources, in the folder; prints its path.
build() {
  "$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$2/dist" "$1" >&2
  if [ "$FASTSAM_BUILD" = none ]; then
    mkdir "$2/repaired" && mv "$2"/dist/*.whl "$2/repaired"
  else
    # torch's library comes with torch. Fails if the extension needs newer symbols than the platform has.
    PATH=$tools:$PATH "$tools/auditwheel" repair --plat "$platform" --only-plat --exclude 'libtorch*.so' \
      --wheel-dir "$2/repaired" "$2"/dist/*.whl >&2
  fi
  ls "$2"/repaired/*.whl
}

echo "source distribution"
"$python" -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > "$scratch/log" 2>&1 ||
  { cat "$scratch/log"; exit 1; }
if [ "${1:-}" = --quick ]; then
  echo "wheel, from the checkout"
  wheel=$(build . "$scratch/wheel")
else
  echo "wheel, from the source distribution (compiles for about two minutes on two cores)"
  unpack "$scratch/sources"
  wheel=$(build "$scratch/sources" "$scratch/wheel")
fi
if [ "${1:-}" = --twice ]; then
  echo "wheel, in another folder"
  unpack "$scratch/more-sources"
  cmp "$wheel" "$(build "$scratch/more-sources" "$scratch/same-wheel")"
  echo "the same bytes"
fi
cp "$wheel" dist/

"$tools/twine" check --strict dist/*
case $wheel in *abi3*) "$tools/abi3audit" --strict --summary dist/*.whl ;; esac
sha256sum dist/*
