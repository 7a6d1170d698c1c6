"""Generate images with PixArt-Sigma under a quantization configuration.

python scripts/pixart_sigma_infer.py --outdir sigma_sample_w39a8 --q_config quant_configs/sigma_39.pkl --quant_act --n_imgs 4
python scripts/pixart_sigma_infer.py --outdir sigma_sample --model_id embedded --q_config uniform:kmeans-4 --n_imgs 10
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("infer", "pixart_sigma")
