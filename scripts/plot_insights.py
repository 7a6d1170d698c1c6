"""Draw which blocks, subgraphs and operations of a denoiser suffer from quantization, as pictures and tables.

python scripts/plot_insights.py --family pixart_alpha --scores predictors/pixart_alpha.pt
python scripts/plot_insights.py --family dit --scores none --model_id embedded --q_config quant_configs/dit_40.pkl
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("plot_insights")
