#!/bin/sh
# Build llama-server and llama-bench, once, from the llama.cpp that the bindings of this project are compiled from.
#
#   benchmarks/build_peer.sh [SDIST.tar.gz]     prints the directory that holds the two programs
#
# Needs gcc, g++, cmake; uses ninja where there is one. JOBS (2) and XDG_CACHE_HOME are read.
set -eu

cd "$(dirname "$0")/.."
lock=images/locks/core.txt
version=$(sed -n 's/^llama-cpp-python==\([^ ]*\).*/\1/p' "$lock")
sha256=$(sed -n '/^llama-cpp-python==/,/sha256/ s/.*sha256:\([0-9a-f]\{64\}\).*/\1/p' "$lock")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/slm-edge/llama-server/$version

if [ -x "$cache/llama-server" ] && [ -x "$cache/llama-bench" ]; then
  echo "$cache"
  exit 0
fi

python=.venv/bin/python
[ -x "$python" ] || python=python3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

sdist=${1:-}
if [ -z "$sdist" ]; then
  echo "Fetching llama-cpp-python $version" >&2
  "$python" -m pip --disable-pip-version-check download --quiet --no-deps --no-binary :all: \
    --dest "$work" "llama-cpp-python==$version" >&2
  sdist=$(ls "$work"/llama_cpp_python-*.tar.gz)
fi
echo "$sha256  $sdist" | sha256sum --check --quiet >&2

tar -xzf "$sdist" -C "$work" --strip-components 1 "llama_cpp_python-$version/vendor/llama.cpp"
generator=$(command -v ninja > /dev/null && echo Ninja || echo "Unix Makefiles")
# Static, so that two files are the whole of it; no web UI, whose parts would be downloaded; no TLS, which loopback needs not.
# The kernels are the bindings': Release, native, everything else as llama.cpp has it by default.
cmake -S "$work/vendor/llama.cpp" -B "$work/build" -G "$generator" -Wno-dev \
  -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
  -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF > "$work/cmake.log" 2>&1 ||
  { tail -n 30 "$work/cmake.log" >&2; exit 1; }
echo "Compiling llama-server (about 10 minutes on two cores, once)" >&2
nice -n 10 cmake --build "$work/build" --parallel "${JOBS:-2}" --target llama-server llama-bench > "$work/build.log" 2>&1 ||
  { tail -n 30 "$work/build.log" >&2; exit 1; }

mkdir -p "$cache"
for program in llama-server llama-bench; do
  cp "$work/build/bin/$program" "$cache/.$program.new"
  mv "$cache/.$program.new" "$cache/$program"  # a build that was cut short leaves none
done
echo "$cache"
