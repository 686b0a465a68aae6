#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: the tests marked gpu, tuning of the kernels, their benchmarks, the
# demo, and UNETR at the published size on full-size synthetic scans, in float32 and bf16, with the kernels and without.
# Prints a short table last; writes it, the test report, the tuned configurations and the benchmarks to $OUT.
#
#   bash benchmarks/gpu_suite.sh
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-benchmarks/results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export GLIOFORGE_CACHE=${GLIOFORGE_CACHE:-$work/cache}
python=${PYTHON:-python}
mkdir -p "$OUT"
status=0

parallel=$("$python" -c "import xdist; print('-n 8')" 2>/dev/null)
timeout 150 "$python" -m pytest -m gpu -q $parallel --junitxml "$OUT/gpu_tests.xml" >"$OUT/gpu_tests.log" 2>&1 || status=1
tail -n 25 "$OUT/gpu_tests.log"
timeout 120 "$python" -m benchmarks.tune >"$OUT/tune.log" 2>&1 || { status=1; tail -n 5 "$OUT/tune.log"; }
cp -f kernels/tuned.json "$OUT/" 2>/dev/null
timeout 150 "$python" -m pytest --benchmark -q >"$OUT/benchmark.log" 2>&1 || status=1

run() { # name, then options
  local name=$1
  shift
  timeout 60 "$python" launch/train.py --train.device cuda --run_dir "$work/$name" "$@" >"$OUT/$name.log" 2>&1 ||
    { status=1; tail -n 3 "$OUT/$name.log"; }
}
size=(--config launch/configs/brats.yaml --data.phantom.cases 6 --data.crops_per_case 20 --train.epochs 2
  --train.val_every_epochs 2)
run demo --config launch/configs/demo.yaml
run unetr_float32 "${size[@]}"
run unetr_bf16 "${size[@]}" --train.precision bf16
run unetr_bf16_reference "${size[@]}" --train.precision bf16 --kernels reference

tail -n 90 "$OUT/benchmark.log"
tail -n 1 "$OUT/tune.log"
"$python" - "$work" "$OUT/gpu_suite.json" <<'PY'
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
    print(f"{name:22}", *(f"{key} {value:.3g}" for key, value in values.items()), sep="  ")
PY
exit "$status"
