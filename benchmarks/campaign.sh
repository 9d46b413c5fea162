#!/usr/bin/env bash
# Starts the campaign that trains the bundled weights, or goes on with it; see docs/training.md.
#
#     benchmarks/campaign.sh DATA RUN [--time 2h] [--processes 2]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
exec nice -n 10 python "$root/benchmarks/campaign.py" "$@"
