#!/usr/bin/env bash
# Starts the campaign that trains the bundled weights, or goes on with it; see docs/training.md.
#
#     benchmarks/campaign.sh DATA RUN [--time 2h] [--processes 2]
#
# PYTHON is the interpreter, if it is not the one that `python` starts. Where Linux schedules by sessions
# (autogroup), `nice` counts within one only: `echo 10 > /proc/PID/autogroup` is for a session of its own.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1
exec nice -n 10 "${PYTHON:-python}" "$root/benchmarks/campaign.py" "$@"
