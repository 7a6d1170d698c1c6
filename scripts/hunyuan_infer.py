"""Generate images with Hunyuan-DiT under a quantization configuration.

python scripts/hunyuan_infer.py --outdir hunyuan_sample_w4a8 --q_config quant_configs/hunyuan_40.pkl --quant_act --n_imgs 4
python scripts/hunyuan_infer.py --outdir hunyuan_sample --model_id embedded --q_config uniform:kmeans-4 --n_imgs 10
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("infer", "hunyuan")
