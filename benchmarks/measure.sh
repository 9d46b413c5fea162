#!/usr/bin/env bash
# Measures what the pages say of the bundled weights of this checkout, two processes side by side; see docs/training.md.
#
#     benchmarks/measure.sh DATA OUT
#
# OUT gets a text file for each table and `panel.jsonl`, the runs of benchmarks/panel.jsonl and the new ones. The
# same command goes on after an interruption: networks that are measured and trainings that are on record are kept.
# It takes some four hours of two cores with AMX, by the sum of its parts; 100 test networks on all test images are 75 minutes to two hours of one.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
data=$1 out=$2
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
mkdir -p "$out"
[[ -e $out/panel.jsonl ]] || cp "$root/benchmarks/panel.jsonl" "$out/panel.jsonl"

# kept NAME COMMAND...: its output in OUT/NAME.txt, unless that is there and whole
kept() {
    [[ -e $out/$1.txt ]] && return
    "${@:2}" > "$out/$1.part" 2> "$out/$1.log"
    mv "$out/$1.part" "$out/$1.txt"
}

evaluate() {
    kept "$1" python -m ghn_init evaluate ghn3-cifar10 --data "$data" --workers 1 -o "$out/$1.json" "${@:2}"
}

panel() { kept "$1" python -W ignore "$root/benchmarks/starting_point.py" "$data" "$out/panel.jsonl" --batch 32 --rates 1 --no-search --search-steps 50 "${@:2}"; }

few_images() {
    kept "$1" python -m ghn_init transfer "$data" --network ghn_init.training.teacher:SmallResNet --set classes=10 --set width=16 \
        --shots 10 50 100 --seeds 5 --start predicted -o "$out/few.jsonl" "${@:2}"
}

accuracy() {
    evaluate float32 --images 1000 --sample 10 --split test
    evaluate splits --bf16 --images 1000 --sample 100 --split test --split deep --split dense --split bnfree --split vit
    evaluate wide --bf16 --images 1000 --sample 100 --split wide
    evaluate all-images --bf16 --sample 100 --split resnet50 --split test
    kept familiarity python -W ignore "$root/benchmarks/familiarity.py" "$data" --images 256 --sample 1
    kept picture python -W ignore "$root/benchmarks/sgd_equivalence.py" "$data" "$out/picture.jsonl" \
        --networks 0 --also small-resnet --optimizers sgd --steps 100 --tuning 20 --batch 32 --every 10 --images 300 \
        --seeds 3 --draw "$out/training-start.svg"
    few_images few-sgd --start whole
    few_images few-adamw --optimizer adamw
}

training() {
    panel panel --steps 50 --seeds 1 --starts predicted other-classes
    panel panel-seeds --steps 50 --seeds 3 --starts predicted --networks plain-cnn vgg small-resnet lstm deepnets-gates \
        deepnets-bn densenet mobilenet-v3 shufflenet unet deepnets-bnfree deepnets-attention
    panel panel-300 --steps 300 --seeds 1 --starts predicted --networks small-resnet vgg plain-cnn mobilenet-v3 \
        shufflenet unet resnet18 densenet lstm pyramid
}

accuracy &
first=$!
trap 'kill "$first" 2> /dev/null || true' EXIT # an error of the one ends the other, too
training
wait "$first"
