#!/usr/bin/env bash
# Every ablation of RESULTS.md; what is there already is not run again. On a GPU take --jobs 1, and larger phantoms or a
# larger base config for the same rows.
# Usage: examples/ablations.sh [OUTPUT_DIR] [JOBS]
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-outputs/ablations}
jobs=${2:-2}
python=${PYTHON:-python}

# claims: five seeds at equal time and at equal steps
for budget in time steps; do
    "$python" examples/run_ablation.py examples/configs/ablation_phantoms_unpaired.yaml --output_dir "$output" \
        --budget "$budget" --jobs "$jobs"
done
# choices of the full method: five seeds of what the paper claims, three of the others
choices=examples/configs/ablation_phantoms_choices.yaml
"$python" examples/run_ablation.py "$choices" --output_dir "$output" --budget time --jobs "$jobs" --rows \
    "full, no AttMIM" "full, no EntMLM" "full, random patches" "full, random words" "full, an eighth of the rows rebuilt" \
    "full, 75 % of patches"
"$python" examples/run_ablation.py "$choices" --output_dir "$output" --budget time --jobs "$jobs" --seeds 0 1 2
# a text tower that knows how reports are worded, for the text bench: EntMLM alone on 5,000 other phantoms
if [ ! -d outputs/text_tower/checkpoint ]; then
    "$python" examples/run_pretrain.py examples/configs/phantom_tiny.yaml --output_dir outputs/text_tower \
        --phantom_seed 100 --num_unpaired_phantoms 0 --num_validation_phantoms 0 --max_steps 1200 \
        --contrastive_weight 0 --prompt_weight 0 --local_weight 0 --mim_weight 0 --mlm_weight 1 --mlm_row_ratio 1 \
        --eval_strategy no --save_strategy no --load_best_model_at_end false
fi
for bench in low low_long text mid long; do
    "$python" examples/run_ablation.py "examples/configs/ablation_phantoms_$bench.yaml" --output_dir "$output" \
        --budget time --jobs "$jobs"
done
if [ -d ../shared/data/cxr-mini ]; then
    "$python" examples/run_ablation.py examples/configs/ablation_cxr_mini.yaml --output_dir "$output" --budget time \
        --jobs "$jobs"
fi
