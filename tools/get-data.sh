#!/bin/sh
# Print the folder of Fashion-MNIST's four IDX files. Where there is none yet, take Debian's (or Ubuntu's) package
# into the user's cache: no root needed, nothing on the system changes. If that cannot be done: say why, exit 1.
set -eu
package=dataset-fashion-mnist
system=/usr/share/datasets/fashion-mnist
cache=${XDG_CACHE_HOME:-${HOME:?}/.cache}/fastswa

fail() { echo "get-data: $1" >&2; exit 1; }

complete() {
    for part in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
        gzip -t "$1/$part-ubyte.gz" 2>/dev/null || return 1
    done
}

if [ -n "${FASTSWA_DATA:-}" ]; then echo "$FASTSWA_DATA"; exit; fi
for dir in "$system" "$cache/fashion-mnist"; do
    if complete "$dir"; then echo "$dir"; exit; fi
done

command -v apt-get >/dev/null && command -v dpkg >/dev/null || fail "no apt-get here, so no package $package"
mkdir -p "$cache"
tmp=$(mktemp -d "$cache/tmp.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM
mkdir -p "$tmp/lists/partial" "$tmp/archives/partial"
cd "$tmp"

apt() {
    apt-get -qq -o APT::Sandbox::User=root -o Acquire::Retries=0 -o Acquire::http::Timeout=10 "$@" >apt.log 2>&1
}

# The system's package lists may be absent or old: then fetch lists of our own, which needs no root either.
echo "get-data: fetching the package $package (30 MB) into $cache" >&2
if ! apt download $package; then
    set -- -o "Dir::State::Lists=$tmp/lists" -o "Dir::Cache=$tmp"
    { apt "$@" update && apt "$@" download $package; } || fail "apt-get cannot fetch $package: $(tail -n 1 apt.log)"
fi

dpkg -x ./$package*.deb unpacked
complete "unpacked$system" || fail "the package $package does not hold the four IDX files"
if ! complete "$cache/fashion-mnist"; then  # another process may have been faster
    rm -rf "$cache/fashion-mnist"
    mv "unpacked$system" "$cache/fashion-mnist"
fi
echo "$cache/fashion-mnist"
