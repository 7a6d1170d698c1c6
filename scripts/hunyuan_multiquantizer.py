"""Fit all six quantizers to every weight of Hunyuan-DiT and store them in multiquantizers/hunyuan_mq.pt.

python scripts/hunyuan_multiquantizer.py
python scripts/hunyuan_multiquantizer.py --model_id embedded
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("multiquantizer", "hunyuan")
