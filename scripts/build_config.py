"""Build a configuration within a size from a predictor of train_predictor.py, or without any labels.

python scripts/build_config.py --family pixart_alpha --scores predictors/pixart_alpha.pt --avg_bits 3.7
python scripts/build_config.py --family dit --scores none --model_id embedded --avg_bits 4 --output quant_configs/dit_40.pkl
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("build_config")
