#!/bin/sh
# kernels-pack.sh TREE DEBIAN INIT MODULES TEST...: an initial root file system in TREE.cpio that holds the tests' programs, what
# these programs are linked to and call, and drivers from the unpacked kernel package in DEBIAN.
set -eu
# Debian's own programs: what else stands before them may be a script that leads elsewhere.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
tree=$1 debian=$2 init=$3 modules=$4
shift 4
rm -rf "$tree"
mkdir -p "$tree/bin" "$tree/sbin" "$tree/usr/bin" "$tree/lib/modules"
cp "$init" "$tree/init"
cp /bin/busybox "$tree/bin/busybox"

# A program or library with all that it is linked to, each where it is looked for.
bring() {
    for file in "$@"; do
        mkdir -p "$tree$(dirname "$file")"
        cp -L "$file" "$tree$file"
        ldd "$file" 2>/dev/null | grep -o '/[^ ]*' | while read -r library; do
            [ -e "$tree$library" ] || { mkdir -p "$tree$(dirname "$library")" && cp -L "$library" "$tree$library"; }
        done
    done
}
for program in sh cat sleep mkdir rm ls ip tc nsenter unshare python3 env; do
    bring "$(command -v "$program")"
done
# Python's own library, but for its tests and what draws windows.
version=$(python3 -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
mkdir -p "$tree/usr/lib/$version"
(cd "/usr/lib/$version" && find . -type f ! -path '*/test/*' ! -path '*/__pycache__/*' ! -path './lib2to3/*' \
    ! -path './idlelib/*' ! -path './tkinter/*' -print | cpio -p -dmu --quiet "$tree/usr/lib/$version")
for library in "/usr/lib/$version"/lib-dynload/*.so; do bring "$library"; done

# A suite without the hash in its name, and the examples that cargo built beside it, where the suite looks for them.
mkdir -p "$tree/target/deps" "$tree/target/examples"
for test in "$@"; do
    name=$(basename "$test")
    bring "$test"
    mv "$tree$test" "$tree/target/deps/${name%-*}"
    strip "$tree/target/deps/${name%-*}"
    cp "$(dirname "$test")/../examples/stand_in" "$tree/target/examples/stand_in"
    strip "$tree/target/examples/stand_in"
done
: > "$tree/lib/modules/order"
for module in $modules; do
    found=$(find "$debian/lib/modules" "$debian/usr/lib/modules" -name "$module.ko*" 2>/dev/null | head -n 1)
    # What is not there is built in, or the tests say what they miss.
    [ -n "$found" ] || continue
    case $found in
    *.xz) xz -dc "$found" > "$tree/lib/modules/$module.ko" ;;
    *) cp "$found" "$tree/lib/modules/$module.ko" ;;
    esac
    echo "$module" >> "$tree/lib/modules/order"
done
(cd "$tree" && find . | cpio -o -H newc --quiet) > "$tree.cpio"
rm -rf "$tree"
