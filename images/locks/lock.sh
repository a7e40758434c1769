#!/bin/sh
# Writes the lock files: hashed requirement files, one per kind of installation. Run it after a change of
# pyproject.toml; needs `uv` on the PATH. Add options of `uv pip compile` (such as --upgrade) as arguments.
set -eu
cd "$(dirname "$0")/../.."
here=images/locks
override=$(mktemp)
trap 'rm -f "$override"' EXIT
# torch stands outside the locks: its default build brings gigabytes of CUDA. An override that never holds keeps it
# and its CUDA wheels out; `--no-emit-package` would still list the latter.
echo 'torch ; python_version < "3"' > "$override"
# instructor holds back three packages that the tests of the other clients have newer; its own test says that it works.
printf 'rich>=14\nopenai>=2\njiter>=0.10\n' >> "$override"
compile() {
    out=$1; shift
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
        --no-annotate --override "$override" --output-file "$here/$out" "$@"
    echo "$here/$out: $(grep -c '==' "$here/$out") packages"
}
compile core.txt pyproject.toml "$@"
compile workstation.txt pyproject.toml --extra quantize --constraint $here/core.txt "$@"
compile dev.txt pyproject.toml --extra quantize --extra sign --group dev --constraint $here/workstation.txt "$@"
compile build.txt pyproject.toml --extra build --constraint $here/workstation.txt "$@"
# For images: the tools that build wheels inside one, and the engine apart from the rest, so that another version of
# some other package does not compile llama.cpp anew.
uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate \
    --output-file $here/native.txt $here/native.in "$@"
sed -n '/^llama-cpp-python==/,/^[^ ]*==/{/^llama-cpp-python==\|^ /p}' $here/core.txt > $here/llama.txt
