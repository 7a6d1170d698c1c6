"""Train a predictor on labelled configurations: it ranks others, and build_config.py builds the best with it.

python scripts/train_predictor.py --family pixart_alpha --cache alpha_random_seed42 --target '-1*log(FID-GT-1k)'
python scripts/train_predictor.py --family dit --cache labels/dit_embedded --loss srcc --output predictors/dit_embedded.pt
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("train_predictor")
