"""Generate images with PixArt-alpha under a quantization configuration.

python scripts/pixart_alpha_infer.py --outdir alpha_sample_w4a8 --q_config quant_configs/alpha_40.pkl --quant_act --n_imgs 4
python scripts/pixart_alpha_infer.py --outdir alpha_sample --model_id embedded --q_config uniform:kmeans-4 --n_imgs 10
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("infer", "pixart_alpha")
