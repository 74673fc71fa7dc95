#!/usr/bin/env bash
# venv.sh NAME [OPTION...]: makes a virtual environment with requirements/NAME.txt and prints its folder. The options are
# pip's.
#
# Its programs also find the packages of .venv (torch, the checkout). The folder is named after a hash of the
# requirements and the interpreter, so it is made once and again when one of them changes. FASTSAM_VENVS is where such
# folders are kept; the default is .venvs.
set -euo pipefail
cd "$(dirname "$0")/.."

name=$1
shift
base=$PWD/.venv/bin/python
hash=$({ "$base" -VV && cat "requirements/$name.txt"; } | sha256sum | cut -c1-12)
folder=${FASTSAM_VENVS:-$PWD/.venvs}/$name-$hash

if [ ! -e "$folder/complete" ]; then
  echo "setting up $folder" >&2
  rm -rf "${folder%-*}"-*
  "$base" -m venv "$folder" >&2
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@" -r "requirements/$name.txt" >&2
  touch "$folder/complete"
fi
# Written every time: folders may be shared by checkouts. addsitedir also reads the .pth files there.
packages=$("$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$packages')" > "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/checkout.pth"
echo "$folder"
