#!/usr/bin/env bash
# Fashion-MNIST, class-conditional, 28x28 grey.       bash recipes/fashion_mnist.sh DATA OUT
# NOT YET RUN ON A GPU: the settings are those of the literature for networks of this size, not
# tuned here, and no figures are claimed.
# DATA  folder with train-images-idx3-ubyte.gz and the three files beside it, as published by
#       Zalando Research (github.com/zalandoresearch/fashion-mnist, MIT licence).
# OUT   folder of the run. After an interruption the same line goes on where it stopped.
set -euo pipefail
data=${1:?where Fashion-MNIST lies} out=${2:?folder for the run}
size=(--width 64 --depth 2 --batch-size 256 --steps 40000 --save-every 2000 --sample-every 2000)
speed=(--precision bf16 --compile --workers 2)
judge=(-n 10000 --bits 1000)
if [ -n "${SMOKE:-}" ]; then # a few updates on any machine, to see that all is in its place
    size=(--width 16 --depth 1 --batch-size 8 --steps 3) speed=() judge=(-n 16 --steps 2)
fi
diffnotes train --data "$data" --out "$out" --process cosine --dropout 0.1 --lr 5e-4 --warmup 1000 \
    --ema 0.9995 --clip 1 --label-dropout 0.1 --resume "${size[@]}" "${speed[@]}"
diffnotes sample "$out" -n 100 --out "$out/grid.png" --force
diffnotes evaluate "$out" --data "$data" "${judge[@]}" --out "$out/report.json" --force
