#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: the tests marked gpu, the demo, and UNETR at the published size on
# full-size synthetic scans, in float32 and bf16. Prints a short table last; writes it and the test report to $OUT.
#
#   bash benchmarks/gpu_suite.sh
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export GLIOFORGE_CACHE=${GLIOFORGE_CACHE:-$work/cache}
python=${PYTHON:-python}
mkdir -p "$out"

timeout 200 "$python" -m pytest -m gpu -q --junitxml "$out/gpu_tests.xml"
status=$?

run() { # name, then options
  local name=$1
  shift
  timeout 150 "$python" launch/train.py --train.device cuda --run_dir "$work/$name" "$@" >"$out/$name.log" 2>&1 ||
    { status=1; tail -n 3 "$out/$name.log"; }
}
size=(--config launch/configs/brats.yaml --data.phantom.cases 6 --data.crops_per_case 20 --train.epochs 2
  --train.val_every_epochs 2)
run demo --config launch/configs/demo.yaml
run unetr_float32 "${size[@]}"
run unetr_bf16 "${size[@]}" --train.precision bf16

"$python" - "$work" "$out/gpu_suite.json" <<'PY'
import csv, json, pathlib, sys
import torch
work, out = map(pathlib.Path, sys.argv[1:])
runs = {}
for log in sorted(work.glob("*/log.csv")):
    row = list(csv.DictReader(log.open()))[-1]
    runs[log.parent.name] = {key: float(row[key]) for key in ("loss", "samples_per_s", "val_WT") if row.get(key)}
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
out.write_text(json.dumps({"gpu": gpu, "torch": torch.__version__, "runs": runs}, indent=2) + "\n")
print(f"\n{gpu}, torch {torch.__version__}")
for name, values in runs.items():
    print(f"{name:16}", *(f"{key} {value:.3g}" for key, value in values.items()), sep="  ")
PY
exit "$status"
