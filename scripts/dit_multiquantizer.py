"""Fit all six quantizers to every weight of DiT-XL/2 and store them in multiquantizers/dit_mq.pt.

python scripts/dit_multiquantizer.py
python scripts/dit_multiquantizer.py --model_id embedded
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("multiquantizer", "dit")
