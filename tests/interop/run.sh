#!/usr/bin/env bash
# What plain transformers makes of our checkpoints, with an old and a new compressed-tensors. Loading without
# an exception proves nothing, so the client's logits are compared: float32 both, codes and scales equal,
# so only the order of additions differs; with dequantize the client also rounds weights to bfloat16.
set -euo pipefail
cd "$(dirname "$0")/../.."
project=${PROJECT:-.venv/bin/python}
python=${PYTHON:-python3}
work=build/interop
model=reference/model
mkdir -p "$work"
trap 'echo "failed; the client said:"; tail -n 3 "$work/log"' ERR
for scheme in "int8:--method int8" "int4:--bits 4" "int3:--bits 3" "asym:--bits 4 --asymmetric"; do
  name=${scheme%%:*}
  # shellcheck disable=SC2086
  "$project" -m fewbits quantize "$model" "$work/$name" ${scheme#*:} > /dev/null
done
for version in 0.17.0 0.20.0; do
  client=$work/compressed-tensors-$version
  if [ ! -e "$client/installed" ]; then
    "$python" -m venv "$client"
    "$client/bin/python" -m pip install -q -c constraints.txt torch numpy transformers
    "$client/bin/python" -m pip install -q "compressed-tensors==$version" psutil  # it imports psutil undeclared
    touch "$client/installed"
  fi
  for name in int8 int4 int3 asym; do
    [ "$version/$name" = 0.17.0/int3 ] && continue  # it pads 3-bit words; dense ones came with 0.18
    echo "compressed-tensors $version, $name"
    if [ "$version/$name" = 0.20.0/asym ]; then
      "$client/bin/python" tests/interop/client.py "$work/$name" "$work/logits.pt" dequantize 2> "$work/log"
      "$project" tests/interop/compare.py "$work/$name" "$work/logits.pt" 1e-3
    else
      "$client/bin/python" tests/interop/client.py "$work/$name" "$work/logits.pt" 2> "$work/log"
      "$project" tests/interop/compare.py "$work/$name" "$work/logits.pt" 1e-8
    fi
  done
done
