"""Generate images with Stable Diffusion XL under a quantization configuration.

python scripts/sdxl_infer.py --outdir sdxl_sample_w37a16 --q_config quant_configs/sdxl_37.pkl --n_imgs 4
python scripts/sdxl_infer.py --outdir sdxl_sample --model_id embedded --q_config uniform:kmeans-4 --n_imgs 10
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("infer", "sdxl")
