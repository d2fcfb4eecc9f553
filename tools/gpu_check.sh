#!/usr/bin/env bash
# Measure one GPU part by part, each in a process of its own.  Needs no network and no data.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tools/gpu_check.sh --part PART --output DIR [--budget-seconds 420] [--device cuda]

  --part            tests, kernels, training, generation, or all of them
  --output          folder for PART.jsonl and PART.md, which it must not hold yet, and kernels.png
  --budget-seconds  time for the rows of one part; the part is stopped 60 seconds after it
  --device          cuda; or cpu, a rehearsal at micro shapes that is no result

Each row is on the disk as soon as it ends.  PYTHON names the interpreter (default: .venv/bin/python
of this checkout, else python3).
Exit code: 0 good; 1 a row failed or was stopped; 2 nothing could be measured.
TEXT
}

refuse() {
  echo "error: $1" >&2
  exit 2
}

part="" output="" budget=420 device=cuda
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --part | --output | --budget-seconds | --device)
      (($# > 1)) || refuse "$1 needs a value; see --help"
      case $1 in
        --part) part=$2 ;;
        --output) output=$2 ;;
        --budget-seconds) budget=$2 ;;
        --device) device=$2 ;;
      esac
      shift 2 ;;
    *) refuse "unknown argument '$1'; see --help" ;;
  esac
done

case $part in
  tests | kernels | training | generation) parts=("$part") ;;
  all) parts=(tests kernels training generation) ;;
  *) refuse "--part '$part': must be tests, kernels, training, generation or all" ;;
esac
[[ -n $output ]] || refuse "--output: name a folder for the results"
[[ $budget =~ ^[1-9][0-9]*$ ]] || refuse "--budget-seconds '$budget': must be a whole number of seconds"
[[ $device == cuda || $device == cpu ]] || refuse "--device '$device': must be cuda or cpu"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1

worst=0
for name in "${parts[@]}"; do
  code=0
  timeout --kill-after=10 "$((budget + 60))" "$python" "$root/tools/gpu_check.py" \
    --part "$name" --output "$output" --budget-seconds "$budget" --device "$device" || code=$?
  if ((code == 124 || code == 137 || code == 143)); then
    echo "error: part $name was stopped $((budget + 60)) s after its start" >&2
    code=1
  fi
  ((code == 2)) && exit 2
  ((code == 0)) || worst=1
done
exit "$worst"
