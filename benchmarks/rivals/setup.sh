#!/usr/bin/env bash
# An environment per rival, with the versions that the published figures were taken with.
#
# Run:  bash benchmarks/rivals/setup.sh DIR [gptqmodel llmcompressor autoround hqq llamacpp bitsandbytes]
set -euo pipefail
environments=${1:?usage: setup.sh DIR [RIVAL ...]}
shift
rivals=${*:-gptqmodel llmcompressor autoround hqq llamacpp bitsandbytes}
python=${PYTHON:-python3}
mkdir -p "$environments"

# torch comes first and stays: an open range fetches gigabytes of CUDA packages on a machine without a GPU.
for rival in $rivals; do
  case $rival in
    gptqmodel) packages="gptqmodel==7.6.0 transformers==5.24.0" ;;
    llmcompressor) packages="llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0" ;;
    autoround) packages="auto-round==0.16.1 transformers==5.24.0" ;;
    hqq) packages="hqq==0.2.8 transformers==5.24.0 accelerate==1.15.0" ;;
    llamacpp) packages="llama-cpp-python==0.3.36 gguf==0.19.0 transformers==5.24.0 safetensors" ;; # is compiled
    bitsandbytes) packages="bitsandbytes==0.50.2 transformers==5.24.0 accelerate==1.15.0" ;;
    *) echo "$rival is no rival; accepted are gptqmodel, llmcompressor, autoround, hqq, llamacpp and bitsandbytes" >&2; exit 2 ;;
  esac
  folder=$environments/$rival
  [ -e "$folder/installed" ] && continue
  "$python" -m venv "$folder"
  pip="$folder/bin/python -m pip --disable-pip-version-check install -q"
  $pip torch==2.13.0 numpy setuptools wheel
  # shellcheck disable=SC2086
  $pip -c <(echo torch==2.13.0) $packages
  touch "$folder/installed"
done
