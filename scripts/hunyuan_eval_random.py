"""Draw random quantization configurations of Hunyuan-DiT and label each with size, error, BOPs and FID.

python scripts/hunyuan_eval_random.py --outdir hunyuan_random_seed42
python scripts/hunyuan_eval_random.py --outdir hunyuan_embedded_random --model_id embedded --num_archs 10 --n_imgs 250
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("labelling.eval_random", "hunyuan")
