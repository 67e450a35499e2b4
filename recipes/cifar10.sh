#!/usr/bin/env bash
# CIFAR-10, class-conditional, 32x32 colour, EDM.     bash recipes/cifar10.sh DATA OUT
# NOT YET RUN ON A GPU: the settings follow Karras et al. (2022), table 7, with a smaller network
# and batch, not tuned here, and no figures are claimed.
# DATA  folder with data_batch_1 ... data_batch_5 and test_batch, the "python version" that
#       www.cs.toronto.edu/~kriz/cifar.html publishes, unpacked.
# OUT   folder of the run. After an interruption the same line goes on where it stopped.
# Several GPUs: torchrun --nproc_per_node 8 -m diffnotes.cli in the place of diffnotes, in `train`.
set -euo pipefail
data=${1:?where CIFAR-10 lies} out=${2:?folder for the run}
size=(--width 128 --depth 3 --batch-size 256 --steps 200000 --save-every 5000 --sample-every 5000)
speed=(--precision bf16 --compile --workers 4)
judge=(-n 10000 --bits 1000)
if [ -n "${SMOKE:-}" ]; then # a few updates on any machine, to see that all is in its place
    size=(--width 16 --depth 1 --batch-size 8 --steps 3) speed=() judge=(-n 16 --steps 2)
fi
diffnotes train --data "$data" --out "$out" --process edm --dropout 0.13 --flip --lr 5e-4 --warmup 5000 \
    --ema 0.9999 --profiles 0.05 0.1 --clip 1 --label-dropout 0.1 --resume "${size[@]}" "${speed[@]}"
diffnotes sample "$out" -n 100 --out "$out/grid.png" --force
diffnotes evaluate "$out" --data "$data" "${judge[@]}" --out "$out/report.json" --force
