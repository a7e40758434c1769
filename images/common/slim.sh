#!/bin/sh
# Usage: slim.sh PREFIX
# Takes out of an installed Python tree what a device never reads, keeps each shared library once, and compiles the
# bytecode: the root file system is read-only at run time, so nothing could be cached later.
set -eu
cd "$1"
find . -type d \( -name tests -o -name include -o -name cmake -o -name pkgconfig -o -name f2py \) -prune -exec rm -rf {} +
find . \( -name '*.a' -o -name '*.pyi' -o -name '*.pxd' -o -name '*.h' \) -type f -delete
# Of the programs only ours, and Python, which is a link; of llama.cpp's libraries not the one of its own programs.
find bin -type f ! -name edge -delete
find . -path '*/llama_cpp/lib/libllama-common.so*' -delete
# A wheel is a zip and holds no links: llama-cpp-python's has libX.so, libX.so.0 and libX.so.0.25.3 as three copies.
find . -path '*/llama_cpp/lib/*.so' -type f | while read -r library; do
    for name in "$library".*; do
        if [ -e "$name" ] && cmp -s "$name" "$library"; then ln -sf "${library##*/}" "$name"; fi
    done
done
# Unchecked: the sources never change under it, which saves a stat per module and makes the layer repeatable.
find . -name __pycache__ -prune -exec rm -rf {} +
python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash lib
