#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# cuda_compiler.sh FOLDER: nvcc and what it needs, from Python packages, where a container has no CUDA toolkit.
set -eu
folder=$1
python=$(command -v python3.11 || command -v python3)
"$python" -m pip install --target "$folder.packages" --no-deps nvidia-cuda-nvcc==13.0.88 \
  nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
ln -sfn "$folder.packages/nvidia/cu13" "$folder"
ln -sfn lib "$folder/lib64"
"$folder/bin/nvcc" --version
