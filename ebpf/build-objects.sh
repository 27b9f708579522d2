#!/bin/sh
# Compiles ebpf/src/bpf/*.bpf.c into ebpf/objects and writes ebpf/objects/MANIFEST (sha256, file; compiler and flags).
# With --check it writes nothing and fails if the committed objects are not what the sources give.
# The object depends on the path given to the compiler (it is in the BTF line info), hence always from the repository's root.
set -eu
cd "$(dirname "$0")/.."
CLANG=${CLANG:-clang-19}
STRIP=${STRIP:-llvm-strip-19}
FLAGS="-target bpf -mcpu=v3 -O2 -g -std=gnu11 -Wall -Wextra -Werror -Wno-unused-const-variable -Wno-address-of-packed-member -nostdinc -fdebug-compilation-dir=."

out=ebpf/objects
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
	echo "# Made by ebpf/build-objects.sh; do not edit."
	echo "# compiler: $($CLANG --version | sed -n 's/.*clang version \([0-9]*\).*/clang \1/p')"
	echo "# flags: $FLAGS"
} >"$work/MANIFEST"
for source in ebpf/src/bpf/*.bpf.c; do
	name=$(basename "$source" .c).o
	# shellcheck disable=SC2086
	$CLANG $FLAGS -c "$source" -o "$work/$name"
	$STRIP -g "$work/$name"
	(cd "$work" && sha256sum "$name") >>"$work/MANIFEST"
done
if [ "${1:-}" = --check ]; then
	diff -u "$out/MANIFEST" "$work/MANIFEST"
	(cd "$out" && grep -v '^#' MANIFEST | sha256sum -c --quiet)
	echo "objects match their sources"
	exit 0
fi
mkdir -p "$out"
cp "$work"/*.bpf.o "$work/MANIFEST" "$out/"
cat "$out/MANIFEST"
