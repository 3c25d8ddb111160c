#!/bin/sh
# All that a card can show in ten minutes: bash tests/bench/gpu_day.sh [--out DIR] [--device cpu]. See gpu_day.py.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_day.py" "$@"
