"""Generate images with Stable Diffusion 1.5 under a quantization configuration.

python scripts/sdv15_infer.py --outdir sdv15_sample_w4a16 --q_config quant_configs/sdv15_40.pkl --n_imgs 4
python scripts/sdv15_infer.py --outdir sdv15_sample --model_id embedded --q_config uniform:kmeans-4 --n_imgs 10
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("infer", "sdv15")
