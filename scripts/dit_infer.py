"""Generate images with DiT-XL/2 under a quantization configuration.

python scripts/dit_infer.py --outdir dit_sample_w4a16 --q_config quant_configs/dit_40.pkl --cls_id 833 --n_imgs 4
python scripts/dit_infer.py --outdir dit_sample --model_id embedded --q_config uniform:kmeans-4 --n_imgs 10
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("infer", "dit")
