#!/bin/sh
# Gather in ./wheels what a machine with JAX, torch and transformers, but no package registry, lacks for `make gpu`.
set -eu
names="grain array-record tensorflow-datasets tensorflow-metadata etils importlib-resources fsspec zipp immutabledict promise
dm-tree simple-parsing docstring-parser toml termcolor absl-py wrapt six attrs psutil protobuf cloudpickle more-itertools
googleapis-common-protos tyro typeguard pydantic pydantic-core annotated-types typing-inspection typing-extensions
tensorboardX tenacity imagehash PyWavelets nltk joblib textblob ijson openpyxl et-xmlfile jaxtyping wadler-lindig tokamax
beartype pillow portpicker prometheus-client rich markdown-it-py mdurl pygments"
most=62914560 # 60 MiB
# Some are published as sources only: their wheels are pure Python, and built here.
mkdir -p wheels
for name in $(echo "$names" | tr ' ' '\n' | sort -u); do
  python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 \
    --abi abi3 --abi none --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_28_x86_64 --platform any --dest wheels "$name" ||
    python3 -m pip wheel --quiet --no-deps --wheel-dir wheels "$name"
done
total=$(cat wheels/*.whl | wc -c)
echo "wheels: $((total / 1048576)) MiB in $(ls wheels/*.whl | wc -l) files"
if [ "$total" -gt "$most" ]; then
  echo "wheels: more than $((most / 1048576)) MiB; remove the largest that the machine has: $(ls -S wheels | head -3 | tr '\n' ' ')" >&2
  exit 1
fi
