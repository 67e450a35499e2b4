#!/usr/bin/env bash
# What suits a process? The digits with each of them for 600 updates, judged: the table of the page
# "Habits". About 20 minutes on one thread.      bash recipes/habits.sh runs/habits
set -euo pipefail
out=${1:?give a folder for the runs}
train() { # name, then options
    diffnotes train --data digits --steps 600 --dropout 0.1 --out "$out/$1" "${@:2}"
    diffnotes evaluate "$out/$1" -n 500 --out "$out/$1.json"
}
train vp-eps --process vp --predicts eps
train vp-v --process vp --weighting v
for process in vp subvp discrete cosine flow ve edm; do
    train "$process" --process "$process"
done
train edm-uniform --process edm --times uniform
